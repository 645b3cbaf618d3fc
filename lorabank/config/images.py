"""`ImagesConfig`: what image classification is told beyond where its pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabank.config.checks import check_choice, check_positive, check_positive_int, freeze_sequences
from lorabank.errors import ConfigError, Setting, closest

AUGMENTATIONS = ("crop", "flip", "rotate", "colour", "erase")
FITS = ("crop", "squash")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How pictures are read, prepared and varied."""

    image_column: str | None = None
    """Column of a table with the picture (path, bytes or image). None: `image`, `file_name` or another usual name."""
    label_column: str | None = None
    """Column with the label. None: `label`, `class` or another usual name."""
    labels: Sequence[str] | None = None
    """The labels, in the order of the head's outputs. None: those of the training pictures, sorted."""
    min_size: int = 8
    """Pixels: a picture with a shorter side is a bad row."""
    image_size: int | None = None
    """Pixels a side that the model gets. None: what its image processor says, else 224."""
    fit: str = "crop"
    """How a picture that isn't square becomes so, where no image processor says it: `crop` its middle, or `squash` it."""
    mean: Sequence[float] = IMAGENET_MEAN
    """Of each channel, 0 to 1, subtracted from it where no image processor says so. Default: ImageNet's."""
    std: Sequence[float] = IMAGENET_STD
    """Of each channel, by which it is divided then."""
    augment: Sequence[str] = ("crop", "colour")
    """How training pictures are varied: of `crop flip rotate colour erase`; none: not at all. `flip` isn't for what left and
    right mean something to, such as digits."""
    head: str | None = None
    """Module of a model of your own that gives a number a label, such as `fc`. None: it is looked for."""
    cache_gib: float = 2.0
    """Memory for prepared pictures; what doesn't fit is read from its file again when it is needed."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_choice("images.fit", self.fit, FITS)
        check_positive_int("images.min_size", self.min_size)
        check_positive("images.cache_gib", self.cache_gib)
        if self.image_size is not None:
            check_positive_int("images.image_size", self.image_size)
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise ConfigError(
                    Setting("images.augment"),
                    f": expected of {', '.join(AUGMENTATIONS)}, got {name!r}{closest(name, AUGMENTATIONS)}",
                )
        for setting, values in (("images.mean", self.mean), ("images.std", self.std)):
            if len(values) != 3 or (setting == "images.std" and min(values) <= 0):
                raise ConfigError(Setting(setting), f": expected three numbers, one a channel, got {list(values)!r}")
        if self.labels is not None and (len(self.labels) < 1 or len(set(self.labels)) != len(self.labels)):
            raise ConfigError(Setting("images.labels"), f": expected different names, got {list(self.labels)!r}")
