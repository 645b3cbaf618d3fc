"""`open_picture`: a picture from any source as upright RGB, or a RowError that says in a few words what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorabank.data.row import RowError
from lorabank.tasks.decoding import as_rgb, decoded, upright
from lorabank.tasks.picture_bytes import content, digest_of, digest_of_pixels, place_of


@dataclass(frozen=True, eq=False)
class FromTable:
    """A cell of a `datasets.Dataset`, read when it is needed: its column's pictures aren't decoded there."""

    table: Any
    index: int
    column: str

    def value(self) -> object:
        """{bytes, path}, or what else the cell holds."""
        return self.table[self.index][self.column]


_SHOWN = 200
"""Characters of a file's name that a message repeats."""
Picture = Path | bytes | Image.Image | FromTable
"""Where a picture is: a file, its bytes, an object, a cell."""


def as_picture(value: object, folder: Path | None) -> Picture:
    """A cell of a table as a picture. `folder`: what paths are relative to. Raises RowError for what is none."""
    if isinstance(value, str | Path):
        if not str(value).strip():
            raise RowError("no picture: its cell is empty")
        return place_of(value, folder)
    if isinstance(value, Image.Image | bytes):
        return value
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return as_picture(value["bytes"], folder)
        if value.get("path"):
            return as_picture(value["path"], folder)
    if value is None:
        raise RowError("no picture: its cell is empty")
    raise RowError(f"a {type(value).__name__} where a picture was expected (a path, bytes, or a PIL image)")


def _from_array(value: np.ndarray) -> Image.Image:
    if value.dtype != np.uint8 or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3, 4)):
        raise RowError(f"an array of {value.dtype} {value.ndim}-D where uint8 (height, width[, 3]) was expected")
    return Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value)


def named(origin: str, picture: Picture | None) -> str:
    """What messages call a picture: its origin, and the file where a row of a table is that and names one."""
    if not isinstance(picture, Path) or str(picture) == origin:
        return origin
    name = str(picture)
    return f"{origin}: {name if len(name) <= _SHOWN else f'{name[: _SHOWN // 2]}…{name[-_SHOWN // 2 :]}'!r}"


def open_picture(picture: Picture, *, min_size: int = 1) -> tuple[Image.Image, str]:
    """(RGB, upright; a digest of its content). Of an animation the first frame; transparent parts are white.

    Raises RowError for a missing, empty, damaged, truncated or undecodable file, and for a side shorter than `min_size` pixels.
    """
    if isinstance(picture, FromTable):
        return open_picture(as_picture(picture.value(), None), min_size=min_size)
    if isinstance(picture, Path | bytes):
        data = picture if isinstance(picture, bytes) else content(picture)
        found, digest = upright(decoded(data)), digest_of(data)
    else:
        found = picture
        digest = digest_of_pixels(picture)
    if min(found.size) < min_size:
        raise RowError(f"smaller than {min_size} pixels a side")
    return as_rgb(found), digest
