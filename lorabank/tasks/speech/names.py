"""Names of recordings: as a path, and as people and files are told them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from lorabank.data.listing import from_home
from lorabank.data.row import RowError
from lorabank.formats.files import escaped

LONGEST = 255
"""Bytes of a file's name, and of a path, at most, on the usual file systems."""
LONGEST_PATH = 4096
_SHOWN = 60


def shown(name: str) -> str:
    """A name in one line, escaped, and cut where it is longer than a file's may be."""
    whole = escaped("".join(f"\\x{ord(mark):02x}" if mark < " " or mark == "\x7f" else mark for mark in name))
    too_long = len(name) > LONGEST_PATH or any(len(part) > LONGEST for part in Path(name).parts)
    return f"{whole[:_SHOWN]}…" if too_long else whole


def file_named(name: str | Path, near: Path | None) -> Path:
    """The file that a cell or an argument names; relative ones are below `near`. Raises RowError where there is none.

    `~` is the home folder, and a letter of the name where nobody is called so.
    """
    if not str(name).strip():
        raise RowError("the recording's path is empty")
    path = from_home(name)
    path = path if path.is_absolute() or near is None else near / path
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RowError(_missing(path, from_home(name))) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RowError("the recording's path is longer than a file's may be: is it the recording itself, as text?") from error
        raise RowError(f"the recording can't be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeEncodeError is one
        raise RowError("the recording's path holds NUL or half of a surrogate pair, which no file's name does") from error
    if stat.S_ISDIR(mode):
        raise RowError("the recording is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise RowError("the recording is no plain file")
    return path


def _missing(path: Path, said: Path) -> str:
    """Where there is no such recording, in the same words for all of a folder. `said`: its name, as it was given."""
    folder = path.parent.absolute()
    where = f"in {shown(str(folder))}" if folder.is_dir() else f"(nor a folder {shown(str(folder))})"
    from_table = said != path and said.is_file()
    elsewhere = ": names count from the folder of their table, not from where you are" if from_table else ""
    return f"there is no such recording {where}{elsewhere}"
