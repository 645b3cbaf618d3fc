"""Pictures varied with their boxes, each by its own draw alone, so adapters trained jointly see what they would see alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 0.6
"""Share of a picture's sides that `crop` keeps at least."""
COLOUR = 0.25
"""Farthest that `colour` moves brightness and contrast, as a share."""
VISIBLE = 0.4
"""Share of a box's area that has to be left by a crop; a box of which less is left goes out."""
_DRAWS = 8


def augment(picture: Tensor, boxes_M4: Tensor, draw: int, kinds: Collection[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(picture fp32 0 to 255, boxes, which of them are left (M,)). Boxes: left, top, right, bottom as shares of the picture.

    picture: (C, height, width), uint8; the result is of the same size.
    """
    u = torch.rand(_DRAWS, generator=torch.Generator().manual_seed(draw)).tolist()
    x, left = picture.float(), torch.ones(len(boxes_M4), dtype=torch.bool)
    if "crop" in kinds:
        x, boxes_M4, left = _cropped(x, boxes_M4, u[0], u[1], u[2], u[3])
    if "flip" in kinds and u[4] < 0.5:
        x = x.flip(-1)
        boxes_M4 = torch.stack([1 - boxes_M4[:, 2], boxes_M4[:, 1], 1 - boxes_M4[:, 0], boxes_M4[:, 3]], 1)
    if "colour" in kinds:
        mean = x.mean((1, 2), keepdim=True)
        x = (mean + (x - mean) * (1 + COLOUR * (2 * u[5] - 1))) * (1 + COLOUR * (2 * u[6] - 1))
    return x.clamp(0, 255), boxes_M4, left


def _cropped(x: Tensor, boxes_M4: Tensor, wide: float, high: float, at_x: float, at_y: float) -> tuple[Tensor, Tensor, Tensor]:
    """A part of it, scaled to its size."""
    height, width = x.shape[-2:]
    part_w = max(1, round(width * (SMALLEST + (1 - SMALLEST) * wide)))
    part_h = max(1, round(height * (SMALLEST + (1 - SMALLEST) * high)))
    left, top = round((width - part_w) * at_x), round((height - part_h) * at_y)
    part = x[:, top : top + part_h, left : left + part_w]
    part = F.interpolate(part[None], size=(height, width), mode="bilinear", antialias=True)[0]
    shift = torch.tensor([left / width, top / height]).repeat(2)
    share = torch.tensor([part_w / width, part_h / height]).repeat(2)
    moved = (boxes_M4 - shift) / share
    clipped = moved.clamp(0, 1)
    kept = _area(clipped) >= VISIBLE * _area(moved)
    return part, clipped, kept & (_area(clipped) > 0)


def _area(boxes_M4: Tensor) -> Tensor:
    return (boxes_M4[:, 2] - boxes_M4[:, 0]).clamp(min=0) * (boxes_M4[:, 3] - boxes_M4[:, 1]).clamp(min=0)
