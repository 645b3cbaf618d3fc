"""`Box` and `DetectionRow`: a picture with what is to be found in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from lorabank.tasks.detection.pictures import Picture


class Box(NamedTuple):
    """What is at a place of a picture."""

    label: str
    x: float
    """Left edge, pixels of the picture as it is stored."""
    y: float
    """Upper edge."""
    width: float
    height: float
    crowd: bool = False
    """COCO's `iscrowd`: a heap of such things, which is neither learnt nor counted as missed."""


@dataclass(frozen=True, kw_only=True)
class DetectionRow:
    """A picture that was read once and can be used."""

    picture: Picture = field(compare=False, repr=False)
    upright: bool
    """Whether its boxes are of the picture as its camera's note (EXIF) turns it."""
    digest: str
    """Of its content."""
    width: int
    height: int
    """Pixels."""
    boxes: tuple[Box, ...]
    origin: str
    """The file, or `row N of …`."""
    image_id: int | str
    """As COCO's files have it; the picture's number elsewhere."""
    size: int = 1
    group: str | None = field(default=None, compare=False)
    """Value of the column `data.group_by`, if one is set."""

    @property
    def prompt_text(self) -> str:
        """For people: where it is."""
        return self.origin

    @property
    def reference(self) -> str:
        """For people: what is in it."""
        counts = Counter(box.label for box in self.boxes)
        return ", ".join(f"{count} × {label}" for label, count in sorted(counts.items())) or "nothing"

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.digest, self.upright, tuple(self.boxes)
