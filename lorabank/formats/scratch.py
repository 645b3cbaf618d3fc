"""Where results are made before they take their place: beside it, under a name that nobody else has."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabank.errors import OutputError

_SHOWN = 40
"""Characters of the target's name that the scratch folder's has: a name may be as long as the disk allows already."""


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Make the folders above `target`; those that were made and are empty at the end go again. Raises OutputError."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{target}: can't be written: {error.strerror or error}") from error
        yield
    finally:
        for folder in made:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which is gone at the end; make the result in it as `target.name` and move it from there.

    The folder itself is its owner's alone, as temporary folders are, so it never takes the target's place. Raises OutputError.
    """
    with parents_of(target):
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:_SHOWN]}.", suffix=".part", dir=target.parent))
        except OSError as error:
            raise OutputError(f"{target}: can't be written: {error.strerror or error}") from error
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
