"""`listed`: what lies in a folder of data."""

from __future__ import annotations

import os
from pathlib import Path

from lorabank.errors import DataError


def listed(folder: Path) -> list[Path]:
    """Everything in a folder, sorted by path. Raises DataError for a folder that may not be listed, or not be entered."""
    try:
        found = sorted(folder.iterdir())
        os.stat(os.path.join(folder, os.curdir))  # noqa: PTH116, PTH118  (Path drops the dot, by which it must be entered)
    except OSError as error:
        raise DataError(
            f"{folder}: this folder can't be read ({error.strerror}). Allow it (chmod -R a+rX), or take it out of the data."
        ) from error
    return found
