"""`Preprocess`: pictures as a detector takes them, with the numbers of its image processor, and boxes to match.

Every picture is scaled and then padded, at the right and below, to one canvas whose size depends on the settings alone. Padded to
the largest of its batch, a picture's outputs would depend on its neighbours: convolutions see the padding.

N pictures, C = 3 channels, H × W the canvas, M boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorabank.data.row import RowError
from lorabank.errors import ConfigError, DataError, ModelError
from lorabank.tasks.decoding import quiet_pillow
from lorabank.tasks.detection.pictures import reopened
from lorabank.tasks.detection.rows import DetectionRow


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes a tensor."""

    height: int
    width: int
    """Of the canvas, pixels."""
    shortest: int | None
    """Shorter side that pictures are scaled to, unless the longer one would leave the canvas; None: they are made to fit it."""
    stretch: bool
    """Whether the picture is made the canvas, whatever its shape."""
    resample: int
    """Pillow's number of the way to scale."""
    scale: float
    """By which values of 0 to 255 are multiplied."""
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    """Of each channel; None: they aren't normalised."""

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of a scaled picture."""
        if self.stretch:
            return self.height, self.width
        if self.shortest is not None:
            from transformers.image_transforms import get_size_with_aspect_ratio

            found = get_size_with_aspect_ratio((height, width), self.shortest, self.height)
            return min(int(found[0]), self.height), min(int(found[1]), self.width)
        factor = min(self.height / height, self.width / width)
        return max(1, min(self.height, round(height * factor))), max(1, min(self.width, round(width * factor)))

    def pixels(self, picture: Image.Image) -> Tensor:
        """uint8 (C, height, width), scaled."""
        height, width = self.scaled_size(*picture.size)
        scaled = picture.resize((width, height), resample=Image.Resampling(self.resample))
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()

    def stacked(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) fp32 and int64 (N, H, W), 1 where a picture is. `pictures`: values 0 to 255, scaled."""
        x_NCHW = torch.zeros(len(pictures), 3, self.height, self.width)
        mask_NHW = torch.zeros(len(pictures), self.height, self.width, dtype=torch.int64)
        for i, picture in enumerate(pictures):
            height, width = picture.shape[-2:]
            x_NCHW[i, :, :height, :width] = self.normalised(picture)
            mask_NHW[i, :height, :width] = 1
        return x_NCHW, mask_NHW

    def normalised(self, picture: Tensor) -> Tensor:
        """Values 0 to 255 as the model takes them."""
        x = picture.float() * self.scale
        if self.mean is None or self.std is None:
            return x
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def read_off(processor: Any, image_size: int | None) -> Preprocess:
    """The numbers of one of transformers' image processors for detection. Raises ConfigError or ModelError."""
    size = dict(getattr(processor, "size", None) or {})
    size = {key: value for key, value in size.items() if value is not None}
    shortest, stretch = None, False
    if image_size is not None:
        height = width = image_size
    elif "shortest_edge" in size and "longest_edge" in size:
        height = width = int(size["longest_edge"])
        shortest = int(size["shortest_edge"])
    elif "height" in size and "width" in size:
        height, width, stretch = int(size["height"]), int(size["width"]), True
    elif "max_height" in size and "max_width" in size:
        height, width = int(size["max_height"]), int(size["max_width"])
    else:
        raise ConfigError(f"the image processor says no size that is understood ({size or 'none'}). Set detection.image_size.")
    normal = bool(getattr(processor, "do_normalize", True))
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if normal and (mean is None or std is None or len(mean) != 3 or len(std) != 3):
        raise ModelError("the image processor has no image_mean and image_std of three channels. Use the model's own.")
    return Preprocess(
        height=height,
        width=width,
        shortest=shortest,
        stretch=stretch,
        resample=int(getattr(processor, "resample", None) or Image.Resampling.BILINEAR),
        scale=float(getattr(processor, "rescale_factor", 1 / 255)) if getattr(processor, "do_rescale", True) else 1.0,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])) if normal and mean is not None else None,
        std=(float(std[0]), float(std[1]), float(std[2])) if normal and std is not None else None,
    )


class PixelStore:
    """Scaled pictures by their content, as many as fit into `limit` bytes; the others are read again when they are needed."""

    def __init__(self, preprocess: Preprocess, limit: float) -> None:
        self.preprocess, self._left = preprocess, limit
        self._kept: dict[tuple[str, bool], Tensor] = {}

    def keep(self, digest: str, upright: bool, picture: Image.Image) -> None:
        """Scale a picture and keep it, if it fits."""
        if (digest, upright) in self._kept or self._left <= 0:
            return
        pixels = self.preprocess.pixels(picture)
        if pixels.numel() <= self._left:
            self._kept[digest, upright] = pixels
            self._left -= pixels.numel()

    def pixels(self, row: DetectionRow) -> Tensor:
        """uint8 (C, height, width). Raises DataError for a file that was changed, or is gone, since it was checked."""
        kept = self._kept.get((row.digest, row.upright))
        return kept if kept is not None else self.preprocess.pixels(self.picture(row))

    def picture(self, row: DetectionRow) -> Image.Image:
        """The picture itself, RGB. Raises DataError as `pixels` does."""
        try:
            with quiet_pillow():
                picture, digest = reopened(row.picture, row.upright)
        except RowError as error:
            raise DataError(f"{row.origin}: {error.reason}, though it was fine when the run began. Put it back.") from error
        if digest != row.digest:
            raise DataError(f"{row.origin}: its content is another than when the run began. Put it back.")
        return picture
