"""One picture of many: a row a caption, a column a heading, with both written beside."""

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
"""Pixels of a picture's longer side on the sheet."""
SMALL = 64
"""Pixels: where no picture's longer side has more, all are shown at twice their size."""


def as_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1]."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def sheet(columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """`columns`: heading → a picture for each caption. Those with more than `LARGEST` pixels a side are shown smaller."""
    every = [_shown(picture) for pictures in columns.values() for picture in pictures]
    double = max(max(picture.size) for picture in every) <= SMALL
    every = [p.resize((2 * p.width, 2 * p.height), Image.Resampling.NEAREST) for p in every] if double else every
    height = max(picture.height for picture in every)
    font = ImageFont.load_default(FONT)
    wide = max(*(p.width for p in every), *(round(font.getlength(heading)) for heading in columns), 0) + SPACE
    page = Image.new("RGB", (LABEL + wide * len(columns), HEAD + (height + SPACE) * len(captions)), "white")
    pen, shown = ImageDraw.Draw(page), iter(every)
    for c, (heading, pictures) in enumerate(columns.items()):
        left = LABEL + c * wide
        pen.text((left, 5), heading, "black", font)
        for r in range(len(pictures)):
            page.paste(next(shown), (left, HEAD + r * (height + SPACE)))
    lines = max(1, height // (FONT + 3))
    for r, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption or "(no caption)", LABEL // 7)[:lines])
        pen.multiline_text((4, HEAD + r * (height + SPACE) + 2), text, "black", font)
    return page


def _shown(picture: Image.Image) -> Image.Image:
    """At most `LARGEST` pixels a side."""
    scale = min(1.0, LARGEST / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)


def png(picture: Image.Image) -> bytes:
    """The file's bytes."""
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()
