"""Boxes drawn on pictures, for people: what there is beside what was found."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lorabank.tasks.detection.rows import Box

SHORTEST = 320
"""Pixels: smaller pictures are enlarged, since a score has to be read on them."""
_TITLE = 20
_GAP = 6


def drawn(picture: Image.Image, boxes: Sequence[tuple[float | None, Box]]) -> Image.Image:
    """A copy with boxes and their labels, each label's in a colour of its own. A score of None isn't written."""
    factor = max(1, -(-SHORTEST // max(1, min(picture.size))))
    canvas = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    line = max(2, min(canvas.size) // 160)
    font = ImageFont.load_default(size=max(12, min(canvas.size) // 24))
    for score, box in sorted(boxes, key=lambda each: each[0] or 0.0):
        colour = _colour(box.label)
        corner = (box.x * factor, box.y * factor)
        pen.rectangle((*corner, (box.x + box.width) * factor, (box.y + box.height) * factor), outline=colour, width=line)
        text = box.label if score is None else f"{box.label} {score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(0.0, corner[0]), max(0.0, canvas.width - (right - left) - 4))
        y = max(0.0, corner[1] - (bottom - top) - 4)
        pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
        pen.text((x + 2 - left, y + 2 - top), text, font=font, fill="white")
    return canvas


def sheet(columns: Sequence[tuple[str, Sequence[Image.Image]]], *, side: int = SHORTEST) -> Image.Image:
    """One picture of several columns (title, pictures), each picture fitted into a square of `side` pixels."""
    rows = max((len(pictures) for _, pictures in columns), default=0)
    cell = side + _GAP
    page = Image.new("RGB", (len(columns) * cell + _GAP, _TITLE + rows * cell + _GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for c, (title, pictures) in enumerate(columns):
        pen.text((_GAP + c * cell, 2), title[: side // 8], font=font, fill="black")
        for r, picture in enumerate(pictures):
            fitted = picture.copy()
            fitted.thumbnail((side, side))
            page.paste(fitted, (_GAP + c * cell, _TITLE + r * cell))
    return page


def _colour(label: str) -> tuple[int, int, int]:
    """The same for a label everywhere, dark enough for white letters."""
    hue = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=2).digest(), "big") / 65536
    red, green, blue = colorsys.hls_to_rgb(hue, 0.36, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
