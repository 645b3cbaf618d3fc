"""One picture of many: a row a caption, a column a model, with both written beside."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SPACE = 8
LABEL = 180
"""Pixels for a caption."""
HEAD = 24
FONT = 12
LARGEST = 256
"""Pixels of a picture's longer side on the sheet; each is also written by itself."""


def as_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1]."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def sheet(columns: Mapping[str, Sequence[Tensor]], captions: Sequence[str]) -> Image.Image:
    """`columns`: heading → a picture (3, H, W) for each caption, all of one size."""
    first = next(iter(columns.values()))[0]
    height, width = first.shape[-2:]
    scale = min(1.0, LARGEST / max(height, width))
    if max(height, width) <= 64:
        scale = 2.0
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    font = ImageFont.load_default(FONT)
    wide = max(width, *(round(font.getlength(heading)) for heading in columns)) + SPACE
    page = Image.new("RGB", (LABEL + wide * len(columns), HEAD + (height + SPACE) * len(captions)), "white")
    pen = ImageDraw.Draw(page)
    for c, (heading, pictures) in enumerate(columns.items()):
        left = LABEL + c * wide
        pen.text((left, 5), heading, "black", font)
        for r, pixels in enumerate(pictures):
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            page.paste(as_picture(pixels).resize((width, height), how), (left, HEAD + r * (height + SPACE)))
    lines = max(1, height // (FONT + 3))
    for r, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption or "(no caption)", LABEL // 7)[:lines])
        pen.multiline_text((4, HEAD + r * (height + SPACE) + 2), text, "black", font)
    return page


def png(picture: Image.Image) -> bytes:
    """The file's bytes."""
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()
