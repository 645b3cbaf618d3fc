"""`open_picture`: a picture from any source as upright RGB, or a RowError that says in a few words what is wrong with it.

Files come in palettes, with alpha, as CMYK, in 16 bits, turned by a camera's note (EXIF), cut off, or as something else under a
picture's name. All of that ends here, before anything is trained.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lorabank.data.row import RowError
from lorabank.tasks.picture_bytes import content, digest_of, digest_of_pixels

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
"""Of files in a folder that are taken for pictures."""
WHITE = (255, 255, 255)
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of 16 bits a pixel."""


@dataclass(frozen=True, eq=False)
class FromTable:
    """A cell of a `datasets.Dataset`, read when it is needed: its column's pictures aren't decoded there."""

    table: Any
    index: int
    column: str

    def value(self) -> object:
        """{bytes, path}, or what else the cell holds."""
        return self.table[self.index][self.column]


Picture = Path | bytes | Image.Image | FromTable
"""Where a picture is: a file, its bytes, an object, a cell."""


def as_picture(value: object, folder: Path | None) -> Picture:
    """A cell of a table as a picture. `folder`: what paths are relative to. Raises RowError for what is none."""
    if isinstance(value, str | Path):
        if not str(value).strip():
            raise RowError("no picture: its cell is empty")
        path = Path(value).expanduser()
        return path if folder is None or path.is_absolute() else folder / path
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


def open_picture(picture: Picture, *, min_size: int = 1) -> tuple[Image.Image, str]:
    """(RGB, upright; a digest of its content). Of an animation the first frame; transparent parts are white.

    Raises RowError for a missing, empty, damaged, truncated or undecodable file, and for a side shorter than `min_size` pixels.
    """
    if isinstance(picture, FromTable):
        return open_picture(as_picture(picture.value(), None), min_size=min_size)
    if isinstance(picture, Path | bytes):
        data = picture if isinstance(picture, bytes) else content(picture)
        found, digest = _decoded(data), digest_of(data)
    else:
        found = picture
        digest = digest_of_pixels(picture)
    if min(found.size) < min_size:
        raise RowError(f"smaller than {min_size} pixels a side")
    return as_rgb(found), digest


_TOO_MANY = "more pixels than Pillow takes for safe (PIL.Image.MAX_IMAGE_PIXELS)"


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata and of many pixels, which `open_picture` refuses itself.

    Filters of warnings are the process's, so this stands around work in threads, not in it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _decoded(data: bytes) -> Image.Image:
    if not data:
        raise RowError("an empty file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RowError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, by which damaged pictures pass as whole ones")
    try:
        picture = Image.open(io.BytesIO(data))
        if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise RowError(_TOO_MANY)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError(_TOO_MANY) from None
    except UnidentifiedImageError:
        raise RowError("no picture that can be read (another format, or damaged)") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, …
        kind = "cut off" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
        raise RowError(f"a {kind} picture") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes as RGB: transparent parts over white, deep greys scaled to 8 bits."""
    if picture.mode in _DEEP or picture.mode in ("I", "F"):
        return _from_deep(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        ground = Image.new("RGBA", over.size, (*WHITE, 255))
        return Image.alpha_composite(ground, over).convert("RGB")
    return picture.convert("RGB")


def _from_deep(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits and more; a file doesn't say its white, so it is that of its mode, or of the fewest bits that hold it."""
    values = np.asarray(picture, dtype=np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    if picture.mode == "F" and highest <= 1:
        white = 1.0
    elif picture.mode in ("I", "F") and highest <= 255:
        white = 255.0
    else:
        white = max(65535.0, highest)
    grey = np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
