"""What `lorabank preview` shows of pictures with boxes: as they are, and as the first pass over the data varies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from lorabank.data.preview import Printer
from lorabank.tasks.detection.draw import drawn, sheet
from lorabank.tasks.detection.rows import Box, DetectionRow
from lorabank.tasks.sheet import as_picture, png
from lorabank.training.task import Draws

if TYPE_CHECKING:
    from lorabank.tasks.detection.task import ObjectDetection

FILE = "boxes.png"


def preview(task: ObjectDetection, name: str, rows: Sequence[DetectionRow], out: Printer, draws: Draws) -> Mapping[str, bytes]:
    """A line a row, and one sheet."""
    canvas, labels, kinds = task.store.preprocess, task.labels_of(name), task.config.detection.augment
    plain = [drawn(task.store.picture(row), [(None, box) for box in row.boxes if box.label in labels]) for row in rows]
    seeds = [own[0] for own in draws()] if kinds else [0] * len(rows)
    trained = [_trained(task, row, labels, seed) for row, seed in zip(rows, seeds, strict=True)]
    for row in rows:
        height, width = canvas.scaled_size(row.width, row.height)
        size = f"{row.width} × {row.height} becomes {width} × {height} on {canvas.width} × {canvas.height} pixels"
        out.title(f"{row.origin}: {row.reference}; {size}")
    out.line(f"varied in training: {', '.join(kinds) or 'not at all (detection.augment)'}")
    return {FILE: png(sheet([("as it is", plain), ("as the first pass has it" if kinds else "as training has it", trained)]))}


def _trained(task: ObjectDetection, row: DetectionRow, labels: Sequence[str], seed: int) -> Image.Image:
    """What the model gets, without its padding, and the boxes that go with it."""
    pixels, boxes_M4, numbers = task.row_tensors(row, labels, seed)
    height, width = pixels.shape[-2:]
    boxes = [
        _box(each, labels[int(n)], width, height) for each, n in zip(boxes_M4 / task.share(height, width), numbers, strict=True)
    ]
    return drawn(as_picture(pixels.float() / 255), [(None, box) for box in boxes])


def _box(box_4: Tensor, label: str, width: int, height: int) -> Box:
    """From centre and size as shares of the picture."""
    x, y, wide, high = box_4.tolist()
    return Box(label, (x - wide / 2) * width, (y - high / 2) * height, wide * width, high * height)
