"""What `lorabank preview` shows of pictures with labels: each as it is, and as the first passes over the data vary it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorabank.data.preview import Printer
from lorabank.tasks.images.augment import augment
from lorabank.tasks.images.pictures import open_picture
from lorabank.tasks.images.rows import ImageRow
from lorabank.tasks.sheet import as_picture, png, sheet
from lorabank.training.task import Draws

if TYPE_CHECKING:
    from lorabank.tasks.images.task import ImageClassification

FILE = "pictures.png"


def preview(task: ImageClassification, name: str, rows: Sequence[ImageRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
    """A line a row, and one sheet."""
    kinds, labels, made = task.config.images.augment, task.labels_of(name), task.store.preprocess
    x_NCHW = task.store.stacked(rows).float() / 255
    columns = {"plain": [as_picture(pixels) for pixels in x_NCHW]}
    if kinds:
        for number, seeds in enumerate(zip(*draws(), strict=True), 1):
            columns[f"pass {number}"] = [as_picture(pixels) for pixels in augment(x_NCHW, seeds, kinds)]
    for row in rows:
        width, height = open_picture(row.picture)[0].size
        said = f"label {row.reference!r}, number {labels.index(row.reference)} of {len(labels)}"
        out.title(f"{row.origin}: {said}; {width} × {height} becomes {made.width} × {made.height} pixels")
    out.line(f"varied in training: {', '.join(kinds) or 'not at all (images.augment)'}")
    return {FILE: png(sheet(columns, [row.reference for row in rows]))}
