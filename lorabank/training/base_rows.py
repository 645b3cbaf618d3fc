"""Under which names the base is scored: on each adapter's own held-out rows, each distinct set once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

BASE_NAME = "base"
T = TypeVar("T")


def is_base(name: str) -> bool:
    """Whether a name means the base: `base`, or `base (NAME's rows)`, which no adapter can be called."""
    return name == BASE_NAME or name.startswith(f"{BASE_NAME} (")


def base_labels(held: Mapping[str, Sequence[T]]) -> dict[str, str]:
    """Adapter to the base's name on that adapter's rows: `base` where all have the same, else `base (NAME's rows)`.

    `held`: adapter to its held-out rows; adapters without any are left out.
    """
    groups: list[tuple[Sequence[T], list[str]]] = []
    for name, rows in held.items():
        found = next((names for other, names in groups if other is rows or other == rows), None)
        if found is not None:
            found.append(name)
        elif rows:
            groups.append((rows, [name]))
    if len(groups) == 1:
        return dict.fromkeys(groups[0][1], BASE_NAME)
    return {name: _label(names) for _, names in groups for name in names}


def base_rows(held: Mapping[str, Sequence[T]]) -> dict[str, Sequence[T]]:
    """Name of the base to rows, one entry a distinct set; equal sets become one object."""
    sets: dict[str, Sequence[T]] = {}
    for name, label in base_labels(held).items():
        sets.setdefault(label, held[name])
    return sets


def base_table(
    base_metrics: Mapping[str, float], base_metrics_of: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """The base's rows of a table: one where all adapters have the same held-out rows, else one a set."""
    if base_metrics:
        return {BASE_NAME: dict(base_metrics)}
    groups: list[tuple[Mapping[str, float], list[str]]] = []
    for name, metrics in base_metrics_of.items():
        same = next((names for other, names in groups if other == metrics), None)
        if same is None:
            groups.append((metrics, [name]))
        else:
            same.append(name)
    return {_label(names): dict(metrics) for metrics, names in groups}


def _label(names: Sequence[str]) -> str:
    whose = " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"  # the first is in no other set
    return f"{BASE_NAME} ({whose}'s rows)"
