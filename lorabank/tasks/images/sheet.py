"""A contact sheet: sample pictures with their true and predicted labels, mistakes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 144
"""Pixels of a picture's side."""
FRAME = 5
CAPTION = 36
GAP = 10
COLUMNS = 6
GONE = "its file is gone"
RIGHT, WRONG, INK = (0, 158, 115), (213, 94, 0), (40, 40, 40)
"""Told apart by colour-blind readers as well."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture on the sheet."""

    picture: Image.Image | None
    """None: it can't be read any more."""
    true: str | None
    """None: nobody said."""
    predicted: str
    share: float
    """Its probability, 0 to 1."""

    @property
    def right(self) -> bool:
        """Whether the prediction is true; yes where nobody said what is."""
        return self.true is None or self.true == self.predicted


def contact_sheet(samples: Sequence[Sample], out_png: str | Path, *, columns: int = COLUMNS) -> Path:
    """Draw the samples into `out_png`, the wrong ones first and those most sure of it first among them; returns it."""
    ordered = sorted(samples, key=lambda sample: (sample.right, -sample.share))
    columns = max(1, min(columns, len(ordered)))
    rows = max(1, -(-len(ordered) // columns))
    width, height = TILE + 2 * FRAME + GAP, TILE + 2 * FRAME + CAPTION + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), _font(13)
    for number, sample in enumerate(ordered):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        colour = INK if sample.true is None else RIGHT if sample.right else WRONG
        draw.rectangle((x, y, x + TILE + 2 * FRAME - 1, y + TILE + 2 * FRAME - 1), fill=colour)
        draw.rectangle((x + FRAME, y + FRAME, x + FRAME + TILE - 1, y + FRAME + TILE - 1), fill="white")
        if sample.picture is None:
            draw.text((x + 2 * FRAME, y + TILE // 2), _fitting(GONE, font), fill=INK, font=font)
        else:
            small = _filling(sample.picture)
            sheet.paste(small, (x + FRAME + (TILE - small.width) // 2, y + FRAME + (TILE - small.height) // 2))
        said = f"{sample.predicted} ({100 * sample.share:.0f} %)"
        lines = [said] if sample.true is None or sample.right else [f"is {sample.true}", f"said {said}"]
        for line_number, line in enumerate(lines):
            draw.text((x, y + TILE + 2 * FRAME + 2 + 16 * line_number), _fitting(line, font), fill=colour, font=font)
    sheet.save(out_png)
    return Path(out_png)


def _filling(picture: Image.Image) -> Image.Image:
    """A copy whose longer side is a tile's."""
    small = picture.copy()
    small.thumbnail((TILE, TILE))
    if max(small.size) < TILE:
        factor = TILE / max(small.size)
        small = small.resize((max(1, round(small.width * factor)), max(1, round(small.height * factor))))
    return small


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, which knows more scripts than Pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _fitting(line: str, font: ImageFont.FreeTypeFont) -> str:
    """As much of a line as fits below a picture."""
    line = line.replace("\n", " ")
    if font.getlength(line) <= TILE + 2 * FRAME:
        return line
    while line and font.getlength(f"{line}…") > TILE + 2 * FRAME:
        line = line[:-1]
    return f"{line}…"
