"""A picture's bytes as pixels: `decoded`, `upright`, `as_rgb`, for every task that sees pictures.

Files come in palettes, with alpha, as CMYK, in 16 bits, turned by a camera's note (EXIF), cut off, or as something else under a
picture's name. All of that ends here, before anything is trained: what can't be used is a RowError of a few words.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lorabank.data.row import RowError

WHITE = (255, 255, 255)
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of 16 bits a pixel."""
_WHITES = (255, 1023, 4095, 16383, 65535)
"""Of 8, 10, 12, 14 and 16 bits, in which cameras and scanners see."""
_TOO_MANY = "more pixels than Pillow takes for safe (PIL.Image.MAX_IMAGE_PIXELS)"


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata and of many pixels, which `decoded` refuses itself.

    Filters of warnings are the process's, so this stands around work in threads, not in it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decoded(data: bytes) -> Image.Image:
    """The picture in a file's bytes, as it lies there; of an animation the first frame.

    Raises RowError for an empty, damaged or truncated file, one that is no picture, and one of more pixels than Pillow allows.
    """
    if not data:
        raise RowError("an empty file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RowError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, by which damaged pictures pass as whole ones")
    try:
        picture = Image.open(io.BytesIO(data))
        if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise RowError(_TOO_MANY)
        picture.load()
        return picture
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError(_TOO_MANY) from None
    except UnidentifiedImageError:
        raise RowError("no picture that can be read (another format, or damaged)") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, …
        kind = "cut off" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
        raise RowError(f"a {kind} picture") from error


def upright(picture: Image.Image) -> Image.Image:
    """Turned by its camera's note. Raises RowError for a note that is damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # its readers raise what the decoders do
        raise RowError("a damaged picture") from error


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
    """Greys of 16 bits and more. A file doesn't say its white: it is that of the fewest usual bits that hold its brightest."""
    values = np.asarray(picture, dtype=np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    fractions = picture.mode == "F" and highest <= 1
    white = 1.0 if fractions else next((white for white in _WHITES if highest <= white), highest)
    grey = np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
