"""`Found`, `Entry`, `RawBox`: what a source says, before any picture is opened and any box checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabank.data.row import RowError
from lorabank.tasks.detection.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class RawBox:
    """A box as it was written."""

    box: Any
    category: Any
    """A name, or a number whose name may be in `Found.names`."""
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture of a source and its boxes, or why there is none."""

    origin: str
    image_id: int | str
    picture: Picture | None = None
    size: tuple[int, int] | None = None
    """(width, height) that its annotations say."""
    boxes: Sequence[RawBox] = ()
    error: RowError | None = None
    group: str | None = None
    """Value of the column `data.group_by`, if one is set."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A source's pictures."""

    entries: Sequence[Entry]
    names: Mapping[int, str] = field(default_factory=dict)
    """Number of a category to its name, where the source declares them."""
    stray: Mapping[str, int] = field(default_factory=dict)
    """Pictures that the file doesn't list, as messages name them, to the number of their annotations."""


def size_said(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) where they are said."""
    width, height = values.get("width"), values.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None
