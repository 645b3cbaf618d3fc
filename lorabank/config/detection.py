"""`DetectionConfig`: what object detection is told beyond where its pictures and boxes are. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabank.config.checks import check_choice, check_fraction, check_positive, check_positive_int, freeze_sequences
from lorabank.errors import ConfigError, Setting, closest

BAD_BOXES = ("clip", "drop", "stop")
BOX_AUGMENTATIONS = ("crop", "flip", "colour")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """How pictures and boxes are read, prepared and varied."""

    images: str | None = None
    """Folder of the pictures that a COCO file names. None: beside it, or in `images` there."""
    labels: Sequence[str] | None = None
    """The categories to find, in the order of the head's outputs; boxes of others are bad. None: all that are declared, or that
    the training boxes have, sorted."""
    bad_boxes: str = "clip"
    """What follows where a box reaches outside its picture, has no size, isn't finite, is there twice, or is of a category that
    isn't known: `clip` cuts off what is outside and leaves the other ones out, `drop` leaves out all of them, `stop` names them.
    What is left out is counted."""
    min_box: float = 1.0
    """Pixels: a box with a shorter side, once it is clipped, has no size."""
    image_size: int | None = None
    """Pixels: pictures are scaled to fit a square of this side, and padded to it. None: as the image processor has it."""
    augment: Sequence[str] = ("crop", "colour")
    """How training pictures are varied, boxes with them: of `crop flip colour`; none: not at all. `flip` isn't for what left and
    right mean something to, such as text."""
    threshold: float = 0.5
    """Score from which a found box is drawn in sample pictures."""
    cache_gib: float = 1.0
    """Memory for prepared pictures; what doesn't fit is read from its file again when it is needed."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_choice("detection.bad_boxes", self.bad_boxes, BAD_BOXES)
        check_positive("detection.min_box", self.min_box)
        check_positive("detection.cache_gib", self.cache_gib)
        check_fraction("detection.threshold", self.threshold)
        if self.image_size is not None:
            check_positive_int("detection.image_size", self.image_size)
        for name in self.augment:
            if name not in BOX_AUGMENTATIONS:
                raise ConfigError(
                    Setting("detection.augment"),
                    f": expected of {', '.join(BOX_AUGMENTATIONS)}, got {name!r}{closest(name, BOX_AUGMENTATIONS)}",
                )
        if self.labels is not None and (not self.labels or len(set(self.labels)) != len(self.labels)):
            raise ConfigError(Setting("detection.labels"), f": expected different names, got {list(self.labels)!r}")
