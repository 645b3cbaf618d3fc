"""`objects_in`: a table's cell `objects` as boxes; `as_crowd`: what `iscrowd` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lorabank.data.row import RowError
from lorabank.tasks.detection.entries import RawBox

OBJECTS = "objects"
BOXES = ("bbox", "bboxes", "boxes")
CATEGORIES = ("category", "categories", "category_id", "label", "labels")
CROWD = "iscrowd"
_FLAGS = {"0": False, "false": False, "1": True, "true": True}
_SHOWN = 60


def objects_in(value: Any) -> list[RawBox]:
    """{bbox: […], category: […]}, as `datasets` has it, a list of {bbox, category}, or either as JSON text. Raises RowError."""
    if isinstance(value, str):
        value = _parsed(value)
    if value is None:
        return []
    if isinstance(value, Mapping):
        return _of_lists(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [box for item in value for box in _of_lists({key: [part] for key, part in _item(item).items()})]
    raise RowError(f"column {OBJECTS!r}: expected {{bbox, category}}, got {type(value).__name__}")


def as_crowd(value: Any) -> bool:
    """Whether `iscrowd` says yes, as a number or a word of a table; None is no. Raises RowError for what says neither."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return False
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    if flag is None:
        raise RowError(f"{CROWD}: expected 0 or 1, got {shown(value)}")
    return flag


def shown(value: Any) -> str:
    """A value as messages have it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _parsed(text: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"column {OBJECTS!r}: expected {{bbox, category}}, got text that isn't JSON") from None


def _of_lists(value: Mapping[str, Any]) -> list[RawBox]:
    boxes, categories = (next((name for name in names if name in value), None) for names in (BOXES, CATEGORIES))
    if boxes is None or categories is None:
        raise RowError(f"column {OBJECTS!r}: expected {{bbox, category}}, got {', '.join(map(str, value)) or 'nothing in it'}")
    places, labels = _list(value[boxes], boxes), _list(value[categories], categories)
    if len(places) != len(labels):
        raise RowError(f"column {OBJECTS!r}: {len(places)} boxes and {len(labels)} categories")
    crowds = [None] * len(places) if value.get(CROWD) is None else _list(value[CROWD], CROWD)
    if len(places) != len(crowds):
        raise RowError(f"column {OBJECTS!r}: {len(places)} boxes and {len(crowds)} of {CROWD}")
    return [RawBox(box=b, category=c, crowd=as_crowd(f)) for b, c, f in zip(places, labels, crowds, strict=True)]


def _list(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, np.ndarray | Tensor) and value.ndim:
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"column {OBJECTS!r}: {name}: expected a list, an entry a box, got {shown(value)}")
    return value


def _item(item: Any) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(f"column {OBJECTS!r}: expected a list of {{bbox, category}}, got one of {type(item).__name__}")
    return item
