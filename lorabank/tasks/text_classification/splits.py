"""Which labelled rows are held out, and what is worth knowing of the labels that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorabank.data.sources import all_scored
from lorabank.data.split import split_rows
from lorabank.tasks.text_classification.labels import MANY, REGRESSION, LabelSet, names_in
from lorabank.tasks.text_classification.rows import ClassRow

DEFAULT_SHARE = 0.05
"""Held out for validation where nobody says: then a set too small for it is trained on whole."""


def split_texts(
    coded: Mapping[str, list[ClassRow]], *, val: float | int, test: float | int, seed: int, by_group: str | None = None
) -> tuple[dict[str, list[ClassRow]], dict[str, list[str]]]:
    """Hold rows out of `coded["train"]` for each split without a source of its own; (splits, notes with their rows).

    Equal texts, or equal values of the column `by_group`, stay together. A label's only row is trained on: held out it could be
    neither learned nor, unlearned, be right. Raises DataError for a split that can't be made.
    """
    if "train" not in coded:
        return all_scored(coded["test"]), {}
    source = coded["train"]
    val, test = 0 if "val" in coded else val, 0 if "test" in coded else test
    only = _only_rows(source)
    movable = [i for i in range(len(source)) if i not in only]
    keys = [source[i].source.key if by_group is None else str(source[i].source.group) for i in movable]
    notes: dict[str, list[str]] = {}
    if val == DEFAULT_SHARE and len(set(keys)) < 2:
        notes["too few different rows to hold any out for validation"] = [row.origin for row in source]
        val = 0
    unit = "texts" if by_group is None else f"values of {by_group!r}"
    held = split_rows(keys, val=val, test=test, seed=seed, unit=unit) if val or test else None
    places = {"val": held.val, "test": held.test} if held is not None else {"val": (), "test": ()}
    out = {movable[i] for part in places.values() for i in part}
    splits = {"train": [row for i, row in enumerate(source) if i not in out]}
    for role in ("val", "test"):
        splits[role] = coded[role] if role in coded else [source[movable[i]] for i in places[role]]
    return splits, notes


def _only_rows(rows: Sequence[ClassRow]) -> frozenset[int]:
    """Positions of rows that are their label's only one."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for name in names_in(row.label):
            places.setdefault(name, []).append(i)
    return frozenset(found[0] for found in places.values() if len(found) == 1)


def label_notes(rows: Sequence[ClassRow], labels: LabelSet) -> dict[str, list[str]]:
    """What the user should know of the labels of the training rows, each with the rows that it is about."""
    notes: dict[str, list[str]] = {}
    if labels.kind == REGRESSION:
        return notes
    by_label: dict[str, list[str]] = {}
    for row in rows:
        for name in names_in(row.label):
            by_label.setdefault(name, []).append(row.origin)
    for name, origins in by_label.items():
        if len(origins) == 1:
            notes[f"label {name!r} has one training row, too few to learn it from"] = origins
    if len(labels.names) > MANY and all(name.removeprefix("-").isdecimal() for name in labels.names):
        every = [row.origin for row in rows]
        notes["more than a hundred whole numbers as labels; for an amount set classification.kind to regression"] = every
    return notes
