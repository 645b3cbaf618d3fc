"""`check_boxes`: a picture's boxes as they can be learnt from, and what was wrong with the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lorabank.errors import closest
from lorabank.tasks.detection.entries import RawBox
from lorabank.tasks.detection.rows import Box

SLACK = 1.0
"""Pixels that a box may reach outside unsaid: annotations are rounded."""
OUTSIDE = "reaching outside the picture"
SHARES = (
    "with all numbers from 0 to 1, as shares of the picture, where pixels are expected: multiply x and width by the picture's "
    "width, y and height by its height"
)
"""Nothing is to be seen within a picture's first pixel."""
_SHOWN = 60


def writable(name: str) -> bool:
    """Whether a text can be written to a file: half a surrogate pair can't."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def named(category: Any, names: Mapping[int, str], known: Collection[str] | None = None) -> str | None:
    """A category's name: a declared or known one, that of a declared number, which may be text, or where nothing is declared
    the category itself. None for what is none."""
    if isinstance(category, str):
        text = category.strip()
        if not names or text in names.values() or text in (known or ()):
            return text if text and writable(text) else None
        return next((name for number, name in names.items() if str(number) == text), None)
    if isinstance(category, float) and category.is_integer():  # as tables write a column of numbers with a gap
        category = int(category)
    if isinstance(category, bool) or not isinstance(category, int):
        return None
    return names.get(category) if names else str(category)


def check_boxes(
    raw: Sequence[RawBox],
    size: tuple[int, int],
    *,
    names: Mapping[int, str],
    known: Collection[str] | None,
    min_box: float,
    clip: bool,
) -> tuple[list[Box], list[str]]:
    """(usable boxes, a reason for each that isn't, or that was cut). `size`: (width, height) of the picture.

    `known`: categories that may be; None: any. `clip` False: a box that reaches outside isn't usable.
    """
    made: list[Box] = []
    faults: list[str] = []
    for each in raw:
        box, fault = _checked(each, size, names, known, min_box, clip)
        if box is not None and box in made:
            box, fault = None, "there twice"
        if box is not None:
            made.append(box)
        if fault is not None:
            faults.append(fault)
    return made, faults


def _checked(
    raw: RawBox, size: tuple[int, int], names: Mapping[int, str], known: Collection[str] | None, min_box: float, clip: bool
) -> tuple[Box | None, str | None]:
    label = named(raw.category, names, known)
    if label is None:
        given = str(raw.category)[:_SHOWN]
        return None, f"of a category that isn't declared ({repr(raw.category)[:_SHOWN]}{closest(given, names.values())})"
    if known is not None and label not in known:
        return None, f"of category {label!r}, none of the {len(known)} known{closest(label, known)}"
    values = _numbers(raw.box)
    if values is None:
        return None, "that aren't four numbers [x, y, width, height]"
    if not all(map(math.isfinite, values)):
        return None, "with NaN or infinite numbers"
    x, y, width, height = values
    if min(values) >= 0 and 0 < max(values) <= 1 < min(size):
        return None, SHARES
    if width <= 0 or height <= 0:
        return None, "of no size"
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])
    if right <= left or bottom <= top:
        return None, "outside the picture"
    beyond = max(-x, -y, x + width - size[0], y + height - size[1])
    if beyond > SLACK and not clip:
        return None, OUTSIDE
    if min(right - left, bottom - top) < min_box:
        return None, f"smaller than {min_box:g} pixels a side"
    made = Box(label, left, top, right - left, bottom - top, raw.crowd) if beyond > 0 else Box(label, *values, raw.crowd)
    return made, f"{OUTSIDE}, cut off" if beyond > SLACK else None


def _numbers(box: Any) -> tuple[float, float, float, float] | None:
    if isinstance(box, np.ndarray | Tensor):
        box = box.tolist()
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        return None
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in box):
        return None
    x, y, width, height = map(_float, box)
    return x, y, width, height


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of more digits than a float holds
        return math.inf
