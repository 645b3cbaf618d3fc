"""`Preprocess`: a picture as the model's numbers, split in two: pixels at the model's size (kept), then its normalisation.

What lies between, augmentation, wants pixels. An image processor of transformers does both at once, so its second half is read
off pictures of one colour: it is affine in each channel. C channels, H × W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorabank.config.images import ImagesConfig
from lorabank.errors import ConfigError, ModelError, Setting, first_line
from lorabank.models.image_processors import OWN, processor_class, settings_file
from lorabank.models.quiet import quiet_transformers

_GREYS = (0, 128, 255)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """An image processor in two steps."""

    processor: Any
    """Of transformers; None was given: see `plain_processor`."""
    height: int
    width: int
    offset_C: tuple[float, ...]
    """What a black pixel becomes."""
    slope_C: tuple[float, ...]
    """What a white pixel becomes beyond that."""

    def pixels(self, picture: Image.Image) -> Tensor:
        """uint8 (C, H, W): resized and cropped as the processor does. Raises ConfigError for one that gives anything else."""
        found = _run(self.processor, picture, raw=True)
        if found.dtype != torch.uint8 or found.shape[1:] != (self.height, self.width):
            raise ConfigError(
                f"image processor {type(self.processor).__name__}: expected uint8 pixels of {self.height} × {self.width} before "
                f"normalisation, got {found.dtype} {tuple(found.shape[1:])}. Set images.image_size, or use another processor."
            )
        return found

    def normalise(self, x_NCHW: Tensor) -> Tensor:
        """Pixels from 0 to 1 as the model takes them, in fp32."""
        shape = (1, len(self.offset_C), 1, 1)
        offset, slope = x_NCHW.new_tensor(self.offset_C).view(shape), x_NCHW.new_tensor(self.slope_C).view(shape)
        return offset + slope * x_NCHW


def read_off(processor: Any, config: ImagesConfig) -> Preprocess:
    """How `processor` prepares pictures, at `config.image_size` where that is set.

    Raises ConfigError for a processor that isn't affine in each channel, or doesn't give pictures of one size.
    """
    if config.image_size is not None:
        processor = _sized(processor, config.image_size)
    flat = [_run(processor, _grey(value), raw=False) for value in _GREYS]
    black, middle, white = (value.float() for value in flat)
    _, height, width = black.shape
    other = _run(processor, _grey(0, (3 * width, 2 * height)), raw=True)
    tall = _run(processor, _grey(0, (2 * width, 3 * height)), raw=True)
    if other.shape != black.shape or tall.shape != black.shape:
        raise ConfigError(
            f"image processor {type(processor).__name__}: gives pictures of different sizes ({tuple(other.shape[1:])} and "
            f"{tuple(tall.shape[1:])}), which can't be in one batch. Set do_center_crop in its preprocessor_config.json."
        )
    expected = black + (white - black) * (_GREYS[1] / 255)
    uniform = all(torch.allclose(each, each[:, :1, :1].expand_as(each), atol=1e-4) for each in (black, white))
    if not uniform or not torch.allclose(middle, expected, atol=1e-3):
        raise ConfigError(
            f"image processor {type(processor).__name__}: its normalisation isn't one factor and offset a channel. Give another: "
            "processor=None with images.mean and images.std."
        )
    offset, slope = black[:, 0, 0], (white - black)[:, 0, 0]
    return Preprocess(
        processor=processor, height=height, width=width, offset_C=tuple(offset.tolist()), slope_C=tuple(slope.tolist())
    )


def plain_processor(config: ImagesConfig) -> Any:
    """An image processor for a model that brings none: a square of `image_size` (224), ImageNet's mean and deviation."""
    size = config.image_size or 224
    common: dict[str, Any] = {"image_mean": list(config.mean), "image_std": list(config.std)}
    with quiet_transformers():  # which says on import that it does without torchvision
        from transformers import ConvNextImageProcessor, ViTImageProcessor

        if config.fit == "squash":
            return ViTImageProcessor(size={"height": size, "width": size}, **common)
        return ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=1.0, **common)


def load_processor(folder: Path) -> Any:
    """The image processor in a model's folder, by preference the one that does without torchvision. Raises ModelError."""
    try:
        with quiet_transformers():  # which says on import that it does without torchvision
            return processor_class(folder).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged file surfaces as one of many classes
        file, reason = settings_file(folder), first_line(error)
        raise ModelError(
            f"model {str(folder)!r}: its image processor ({file.name if file else OWN}) can't be used ({reason}). Copy it again "
            "from the original model, or delete it and set images.mean, images.std and images.image_size."
        ) from error


def _grey(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8))


def _run(processor: Any, picture: Image.Image, *, raw: bool) -> Tensor:
    """One picture's (C, H, W)."""
    arguments: dict[str, Any] = {"do_rescale": False, "do_normalize": False} if raw else {}
    if raw and "include_top" in processor.to_dict():
        arguments["include_top"] = False  # EfficientNet's second normalisation
    found = processor(images=[picture], return_tensors="pt", **arguments)["pixel_values"]
    if found.ndim != 4 or found.shape[1] != 3:
        what = f"expected pixel_values of (1, 3, height, width), got {tuple(found.shape)}"
        raise ConfigError(f"image processor {type(processor).__name__}: {what}")
    return found[0]


def _sized(processor: Any, size: int) -> Any:
    """The same processor for squares of `size`: all its sizes by one factor."""
    _, height, width = _run(processor, _grey(0), raw=True).shape
    settings = processor.to_dict()
    for key in ("size", "crop_size"):
        value = settings.get(key)
        if isinstance(value, dict):
            longer = max(height, width)
            settings[key] = {name: math.ceil(number * size / longer) for name, number in value.items() if number is not None}
    made = type(processor).from_dict(settings)
    got = tuple(_run(made, _grey(0), raw=True).shape[1:])
    if max(got) != size:
        raise ConfigError(
            Setting("images.image_size"), f": {type(processor).__name__} gives {got} instead of {size}. Set it in its file."
        )
    return made
