"""`LabelSet`: what an adapter's head has an output for, and how a column's values become targets and outputs names again.

Three kinds: one label of several a row, any number of them, a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabank.data.formats import checked_text, refuse_nan
from lorabank.data.row import NanError, Row, RowError
from lorabank.errors import DataError, Setting, closest

SINGLE, MULTI, REGRESSION = "single", "multi", "regression"
KINDS = (SINGLE, MULTI, REGRESSION)
Label = str | tuple[str, ...] | float
"""A row's label: a name, several of them, or (regression) a number."""
NAN_WORD = "nan"
"""How a table writes a missing number: beside fractions it is none of the names."""
SHOWN = 12
"""Labels named in a message."""
LARGEST = 3.4028234e38
"""Number that fp32 holds."""
MANY = 100
"""Different whole numbers from which on they are rather an amount than labels: a note says so."""


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """The labels of one adapter."""

    kind: str
    """`single`, `multi` or `regression`."""
    names: tuple[str, ...]
    """One an output of the head, in its order; of a regression the name of the column alone."""

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return len(self.names)

    def target(self, label: Label) -> int | float | tuple[float, ...]:
        """What the loss compares the head's outputs with: an index, 0 and 1 for each label, or the number.

        Raises RowError for a label that the head lacks.
        """
        if self.kind == REGRESSION:
            return _number(label, self.names[0])
        if self.kind == SINGLE:
            if not isinstance(label, str):
                raise RowError(f"expected one label, got {label!r}")
            return self._index(label)
        if not isinstance(label, str | tuple):
            raise RowError(f"expected a list of labels, got the number {label}")
        present = {self._index(name) for name in names_in(label)}
        return tuple(float(i in present) for i in range(self.outputs))

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise RowError(f"the head has no label {name!r}{closest(name, self.names)}; it has {shown(self.names)}")
        return self.names.index(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, "labels": list(self.names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str) -> LabelSet:
        """What `to_dict` gave. Raises DataError, naming `origin`, where it is none."""
        kind, names = values.get("kind"), values.get("labels")
        if kind not in KINDS or not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{origin}: expected kind (one of {', '.join(KINDS)}) and labels (a list of names)")
        return cls(kind=str(kind), names=tuple(names))


def shown(names: Sequence[str]) -> str:
    """Names for a message, the first of many."""
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def label_of(row: Row, column: str, kind: str | None = None) -> Label | None:
    """A row's label: names as text, a list as a tuple, numbers as floats where `kind` is regression; None where there is none.

    `kind` None: not known yet; numbers with a fraction stay floats, whole ones become names. A number in a column of names
    (`Row.classes`, from `datasets`) becomes its name, and −1 there means none, as in GLUE's test sets. Raises RowError for what
    can't be a label, NanError for NaN.
    """
    value = row.values.get(column)
    refuse_nan(value, column)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return None
    names = row.classes.get(column)
    if kind == REGRESSION:
        return _number(value, column)
    if isinstance(value, str):
        if (listed := _listed(value)) is not None:
            return tuple(_name(item, column, names) for item in listed)
        if kind is None and (number := _fraction(value)) is not None:
            return number
        name = checked_text(value.strip(), f"column {column!r}")
        return (name,) if kind == MULTI else name
    if isinstance(value, Mapping):
        raise RowError(f"column {column!r}: expected a label, got {type(value).__name__}")
    if isinstance(value, Iterable):
        return tuple(_name(item, column, names) for item in value)
    if names and value == -1:
        return None
    if kind is None and isinstance(value, float) and not value.is_integer():
        return value
    name = _name(value, column, names)
    return (name,) if kind == MULTI else name


def _listed(text: str) -> list[Any] | None:
    """The items of a JSON list, which is how CSV files hold one."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) else None


def _fraction(text: str) -> float | None:
    """The number of a text such as `3.80`, and of `4.0` too: a table of numbers writes them so."""
    if not any(mark in text for mark in ".eE"):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _name(value: object, column: str, names: Sequence[str] | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not value.is_integer():
        raise RowError(f"column {column!r}: expected a label, got the number {value}")
    if isinstance(value, int | float):
        number = int(value)
        if names is None:
            return str(number)
        if not 0 <= number < len(names):
            raise RowError(f"column {column!r}: label {number} has no name; the data set names 0 to {len(names) - 1}")
        return names[number]
    if isinstance(value, str) and value.strip():
        return checked_text(value.strip(), f"column {column!r}")
    raise RowError(f"column {column!r}: expected a label, got {type(value).__name__}")


def _number(value: object, column: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, str) and math.isnan(number) and value.strip().lower() == NAN_WORD:
        raise NanError(column)
    if not math.isfinite(number):
        raise RowError(f"column {column!r}: expected a finite number")
    if abs(number) > LARGEST:
        raise RowError(f"column {column!r}: {number:g} is more than a model can count (fp32, up to {LARGEST:.2g})")
    return number


def find_kind(labels: Iterable[Label]) -> str:
    """The kind that labels read without one (`label_of`) are of: lists, numbers with a fraction, or names."""
    found = list(labels)
    if any(isinstance(label, tuple) for label in found):
        return MULTI
    fractions = any(isinstance(label, float) and not label.is_integer() for label in found)
    if fractions and all(is_number(label) for label in found):
        return REGRESSION
    return SINGLE


def is_number(label: Label | None) -> bool:
    """Whether a label, read without a kind, is a number or a table's NaN."""
    if isinstance(label, float):
        return True
    if not isinstance(label, str):
        return False
    try:
        return label.lower() == NAN_WORD or math.isfinite(float(label))
    except ValueError:
        return False


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: whole numbers by size, anything else by the alphabet. So the order doesn't depend on the rows'."""
    found = set(names)
    if all(name.removeprefix("-").isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def make_set(labels: Sequence[Label], *, kind: str, column: str, known: Sequence[str] | None, where: str) -> LabelSet:
    """The label set of training rows. `known`: names in the head's order, given by the user or the data set; None: the rows' own.

    Raises DataError where there is nothing to learn: rows of one label only.
    """
    if kind == REGRESSION:
        if len({float(label) for label in labels if not isinstance(label, tuple)}) == 1:
            raise DataError(f"{where}: every row has the number {labels[0]} in column {column!r}, so there is nothing to learn.")
        return LabelSet(kind=kind, names=(column,))
    names = {name for label in labels for name in names_in(label)}
    if len(names) < (2 if kind == SINGLE else 1):
        only = f"is {next(iter(names))!r}" if names else "has no label"
        raise DataError(
            f"{where}: every row {only} in column {column!r}, so there is nothing to tell apart. Give rows of at least two "
            "labels, or name the right column with ",
            Setting("classification.label"),
            ".",
        )
    return LabelSet(kind=kind, names=tuple(known) if known is not None else in_order(names))


def names_in(label: Label | None) -> tuple[str, ...]:
    """The names of a row's label; none of a number."""
    if isinstance(label, tuple):
        return label
    return (label,) if isinstance(label, str) else ()
