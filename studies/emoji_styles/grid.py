"""Which names are held out, and the sheet of pictures with names beside them."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 2
SPACE = 6
LABEL = 190
"""Pixels for a name."""
HEAD = 22


def held_out_names(concepts: Sequence[str], share: float) -> list[str]:
    """A fixed share of the names, in a fixed random order."""
    names = sorted(set(concepts))
    random.Random(0).shuffle(names)
    return names[: max(1, round(share * len(names)))]


def grid(columns: Mapping[str, Tensor], names: Sequence[str]) -> Image.Image:
    """`columns`: heading → pictures in [0, 1] (names, 3, H, W)."""
    side = next(iter(columns.values())).shape[-1] * SCALE
    wide = max(side, 92) + SPACE
    sheet = Image.new("RGB", (LABEL + wide * len(columns), HEAD + (side + SPACE) * len(names)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, (heading, pictures) in enumerate(columns.items()):
        left = LABEL + c * wide
        pen.text((left, 5), heading, "black", font)
        for r, picture in enumerate(pictures):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, HEAD + r * (side + SPACE)))
    for r, name in enumerate(names):
        lines = textwrap.wrap(name, 28, max_lines=3, placeholder=" …")
        place = (4, HEAD + r * (side + SPACE) + side // 2 - 7 * len(lines))
        pen.multiline_text(place, "\n".join(lines), "black", font, spacing=2)
    return sheet
