"""`open_picture`: a picture that boxes lie in, as RGB, or a RowError that says in a few words what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lorabank.data.listing import from_home
from lorabank.data.row import RowError
from lorabank.tasks.decoding import as_rgb, decoded, upright
from lorabank.tasks.picture_bytes import content, digest_of, digest_of_pixels

Picture = Path | bytes | Image.Image
"""Where a picture is: a file, its bytes, an object."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes."""


def as_picture(value: Any, folder: Path | None) -> Picture:
    """A cell of a table as a picture. `folder`: what paths are relative to. Raises RowError for what is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image):
        return value
    if isinstance(value, str | Path) and str(value).strip():
        path = from_home(file_named(value))
        return path if folder is None or path.is_absolute() else folder / path
    if value is None or value == "":
        raise RowError("no picture: its cell is empty")
    raise RowError(f"a {type(value).__name__} where a picture was expected (a path, bytes, or a PIL image)")


def file_named(name: str | Path) -> Path:
    """The path of that name. Raises RowError for a name that no file can have."""
    if "\0" in str(name):
        raise RowError("a file name with a NUL character, which no file can have")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise RowError("a file name with half a character (a lone surrogate), which no file can have") from None
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise RowError("a file name longer than any file's (is it the picture itself, as text?)")
    return Path(name)


def open_picture(picture: Picture, size: tuple[int, int] | None = None) -> tuple[Image.Image, bool, str]:
    """(RGB, whether a camera's note turned it, a digest of its content). Of an animation the first frame.

    `size`: (width, height) that its annotations say: it is turned by its camera's note (EXIF) unless only the unturned one is of
    that size. Raises RowError for a missing, empty, damaged or truncated file, and for another size.
    """
    if isinstance(picture, Image.Image):
        found, digest = picture, digest_of_pixels(picture)
    else:
        data = picture if isinstance(picture, bytes) else content(picture)
        found, digest = decoded(data), digest_of(data)
    turned = upright(found)
    turn = size is None or turned.size == size or found.size != size
    chosen = turned if turn else found
    if size is not None and chosen.size != size:
        raise RowError(f"its size is {_by(chosen.size)}, and its annotations say {_by(size)}")
    return as_rgb(chosen), turn, digest


def reopened(picture: Picture, turn: bool) -> tuple[Image.Image, str]:
    """The same picture again: (RGB, digest)."""
    if isinstance(picture, Image.Image):
        found, digest = picture, digest_of_pixels(picture)
    else:
        data = picture if isinstance(picture, bytes) else content(picture)
        found, digest = decoded(data), digest_of(data)
    return as_rgb(upright(found) if turn else found), digest


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
