"""Augmentation that depends on each picture's own draw alone, so adapters trained jointly see what they would see alone.

Where the picture lies (crop, flip, rotation) is one affine map a row, so it is sampled once; kornia does the sampling and the
colours. N pictures of C channels, H × W pixels, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.errors import MissingExtraError

SCALE = (0.7, 1.0)
"""Share of the area that `crop` keeps."""
RATIO = (4 / 5, 5 / 4)
"""Of its width to its height, over the picture's."""
DEGREES = 15.0
"""Farthest that `rotate` turns."""
COLOUR = 0.25
"""Farthest that `colour` moves brightness, contrast and saturation, as a share."""
ERASED = (0.02, 0.2)
"""Share of the area that `erase` fills with the mean colour, in half of the pictures."""

_DRAWS = 16
"""Numbers that a picture draws, whatever is done with them: one kind of change doesn't shift another's draws."""
_AREA, _RATIO, _X, _Y, _FLIP, _TURN, _LIGHT, _CONTRAST, _SATURATION, _ERASE, _HOLE, _HOLE_X, _HOLE_Y, _HOLE_RATIO = range(14)


def kornia() -> Any:
    """The library, an extra. Raises MissingExtraError."""
    try:
        import kornia.enhance
        import kornia.geometry
    except ImportError as error:
        raise MissingExtraError(
            "images.augment: needs kornia: pip install 'lorabank[images]', or switch it off with images.augment: []"
        ) from error
    return kornia


def augment(x_NCHW: Tensor, draws: Sequence[int], kinds: Collection[str]) -> Tensor:
    """Pictures of values 0 to 1, each varied by its own draw alone, in the ways of `kinds` (`AUGMENTATIONS`)."""
    if not kinds:
        return x_NCHW
    library, u_ND = kornia(), uniforms(draws).to(x_NCHW.device)
    if {"crop", "flip", "rotate"} & set(kinds):
        _, _, height, width = x_NCHW.shape
        maps = affine_maps(u_ND, kinds, height, width)
        x_NCHW = library.geometry.warp_affine(x_NCHW, maps, (height, width), mode="bilinear", padding_mode="border")
    if "colour" in kinds:
        light, contrast, saturation = (1 + COLOUR * (2 * u_ND[:, k] - 1) for k in (_LIGHT, _CONTRAST, _SATURATION))
        x_NCHW = library.enhance.adjust_brightness_accumulative(x_NCHW, light)
        x_NCHW = library.enhance.adjust_contrast_with_mean_subtraction(x_NCHW, contrast)
        x_NCHW = library.enhance.adjust_saturation_with_gray_subtraction(x_NCHW, saturation)
    if "erase" in kinds:
        x_NCHW = _erased(x_NCHW, u_ND)
    return x_NCHW


def uniforms(draws: Sequence[int]) -> Tensor:
    """(N, draws) numbers from 0 to 1; a row depends on its own draw alone."""
    return torch.stack([torch.rand(_DRAWS, generator=torch.Generator().manual_seed(draw)) for draw in draws])


def affine_maps(u_ND: Tensor, kinds: Collection[str], height: int, width: int) -> Tensor:
    """(N, 2, 3): from places in a picture, in pixels, to places in the varied one."""
    count = len(u_ND)
    zoom_x = zoom_y = torch.ones(count, device=u_ND.device)
    centre_x, centre_y = torch.full_like(zoom_x, (width - 1) / 2), torch.full_like(zoom_x, (height - 1) / 2)
    middle_x, middle_y = centre_x, centre_y
    if "crop" in kinds:
        area = SCALE[0] + (SCALE[1] - SCALE[0]) * u_ND[:, _AREA]
        ratio = (math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * u_ND[:, _RATIO]).exp()
        share_x, share_y = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        middle_x = centre_x + (u_ND[:, _X] - 0.5) * (1 - share_x) * width
        middle_y = centre_y + (u_ND[:, _Y] - 0.5) * (1 - share_y) * height
        zoom_x, zoom_y = 1 / share_x, 1 / share_y
    if "flip" in kinds:
        zoom_x = torch.where(u_ND[:, _FLIP] < 0.5, -zoom_x, zoom_x)
    angle = (2 * u_ND[:, _TURN] - 1) * math.radians(DEGREES) if "rotate" in kinds else torch.zeros_like(zoom_x)
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([torch.stack([cos * zoom_x, -sin * zoom_y], 1), torch.stack([sin * zoom_x, cos * zoom_y], 1)], 1)
    shift = torch.stack([centre_x, centre_y], 1) - (linear @ torch.stack([middle_x, middle_y], 1)[:, :, None])[:, :, 0]
    return torch.cat([linear, shift[:, :, None]], 2)


def _erased(x_NCHW: Tensor, u_ND: Tensor) -> Tensor:
    _, _, height, width = x_NCHW.shape
    area = (ERASED[0] + (ERASED[1] - ERASED[0]) * u_ND[:, _HOLE]) * (u_ND[:, _ERASE] < 0.5)
    ratio = (math.log(0.5) + math.log(4.0) * u_ND[:, _HOLE_RATIO]).exp()
    half_x, half_y = (area * ratio).sqrt() * width / 2, (area / ratio).sqrt() * height / 2
    x = torch.arange(width, device=x_NCHW.device) + 0.5
    y = torch.arange(height, device=x_NCHW.device) + 0.5
    inside_x = (x - u_ND[:, _HOLE_X, None] * width).abs() < half_x[:, None]
    inside_y = (y - u_ND[:, _HOLE_Y, None] * height).abs() < half_y[:, None]
    hole = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
    return torch.where(hole, x_NCHW.mean((2, 3), keepdim=True), x_NCHW)
