"""What pictures are known by: suffixes, the place and the bytes of a file, and digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.data.listing import from_home
from lorabank.data.row import RowError

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
"""Of files in a folder that are taken for pictures."""
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")
"""Of files that are pictures, too, in forms that aren't read."""


def unread(kind: str) -> str:
    """Why a file of such a suffix is left out."""
    return f"{kind} isn't read: convert it to PNG or JPEG"


def place_of(name: str | Path, folder: Path | None) -> Path:
    """The file that a cell of a table names: below `folder` unless it says a whole path; `~` is a home folder (`from_home`)."""
    path = from_home(name)
    return path if folder is None or path.is_absolute() else folder / path


def content(path: Path) -> bytes:
    """A picture's file. Raises RowError for one that can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RowError("no such file") from None
    except IsADirectoryError:
        raise RowError("a folder where a picture was expected") from None
    except ValueError:  # NUL, or half a character, such as a lone surrogate
        raise RowError("a name that no file can have") from None
    except OSError as error:
        raise RowError(f"can't be read: {error.strerror}") from error


def digest_of(data: bytes) -> str:
    """Of a file's content, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_pixels(picture: Image.Image) -> str:
    """Of a picture that has no file: its mode, size and pixels, and what numbers of a palette mean."""
    palette = bytes(picture.getpalette("RGBA") or ()) if picture.mode in ("P", "PA") else b""
    return digest_of(f"{picture.mode} {picture.size} ".encode() + picture.tobytes() + palette)
