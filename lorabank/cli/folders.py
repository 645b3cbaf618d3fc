"""Output folders: refused when they hold something, and complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabank.config.paths import expanded
from lorabank.errors import OutputError


def refuse_existing(output: str, place: str = "--output") -> Path:
    """The folder, which is new or empty. Raises OutputError otherwise. `place`: what the command line calls it."""
    folder = expanded(output, place=place, kind=OutputError)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already and isn't empty. Choose another {place}.")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place at the end; nothing is left behind on an error."""
    scratch = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        if folder.is_dir():
            folder.rmdir()
        scratch.replace(folder)
    except OSError as error:
        raise OutputError(f"{folder}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
