"""`listed`, `scanned`: what lies in a folder of data; what an entry is; `from_home`: where `~` leads."""

from __future__ import annotations

import os
from pathlib import Path

from lorabank.errors import DataError

HIDDEN = (".", "__MACOSX", "Thumbs.db")
"""How names of files and folders begin that are a system's own."""


def listed(folder: Path) -> list[Path]:
    """Everything in a folder, sorted by path. Raises DataError for a folder that may not be listed, or not be entered."""
    return sorted(folder / entry.name for entry in scanned(folder))


def scanned(folder: Path) -> list[os.DirEntry[str]]:
    """The same in no order, and faster by far where there are many: it isn't asked what each is. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
        os.stat(os.path.join(folder, os.curdir))  # noqa: PTH116, PTH118  (Path drops the dot, by which it must be entered)
    except OSError as error:
        raise DataError(
            f"{folder}: this folder can't be read ({error.strerror}). Allow it (chmod -R a+rX), or take it out of the data."
        ) from error
    return found


def is_folder(entry: Path) -> bool:
    """Whether it is a folder, or a link to one; False for a link into what may not be entered."""
    return os.path.isdir(entry)  # noqa: PTH112  (which raises nothing, unlike Path's)


def is_file(entry: Path) -> bool:
    """Whether it is a file, or a link to one; False for a link into what may not be entered."""
    return os.path.isfile(entry)  # noqa: PTH113  (as above)


def hidden(entry: Path) -> bool:
    """Whether a file or folder is a system's own, no part of the data."""
    return entry.name.startswith(HIDDEN)


def from_home(name: str | Path) -> Path:
    """The path with `~` or `~user` replaced by a home folder; `~draft.png` is a file's name where nobody is called so."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
