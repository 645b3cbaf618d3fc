"""Which labelled rows are held out, and what is worth knowing of the labels that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorabank.config.train import DataConfig
from lorabank.data.hold_out import dealt, shares_of, too_few
from lorabank.data.sources import all_scored
from lorabank.data.split import Split, group_unit, split_rows
from lorabank.errors import DataError
from lorabank.tasks.text_classification.labels import MANY, REGRESSION, LabelSet, names_in
from lorabank.tasks.text_classification.rows import ClassRow
from lorabank.wording import counted


def split_texts(
    coded: Mapping[str, list[ClassRow]], data: DataConfig, *, seed: int
) -> tuple[dict[str, list[ClassRow]], dict[str, list[str]]]:
    """Hold rows out of `coded["train"]` for each split without a source of its own; (splits, notes with their rows).

    Equal texts, or equal values of the column `data.group_by`, stay together. A label's only row is trained on, and what belongs
    to it: held out it could be neither learned nor, unlearned, be right. Raises DataError for a split that can't be made.
    """
    if "train" not in coded:
        return all_scored(coded["test"]), {}
    source = coded["train"]
    every = [row.source.key if data.group_by is None else str(row.source.group) for row in source]
    staying = {every[i] for i in _only_rows(source)}
    movable = [i for i, key in enumerate(every) if key not in staying]
    keys = [every[i] for i in movable]
    shares = shares_of(coded, data, few=len(set(keys)) < 2)
    split = Split(train=tuple(range(len(source))), val=(), test=())
    if shares.val or shares.test:
        unit = group_unit(data.group_by, "texts")
        try:
            found = split_rows(keys, val=shares.val, test=shares.test, seed=seed, unit=unit)
        except DataError as error:
            more = len(source) - len(movable)
            why = f" Not among them: {counted(more, 'row')} that stay in training, the only ones of a label and their groups."
            raise DataError(f"{error}.{why}" if more else str(error)) from error
        val, test = (tuple(movable[i] for i in part) for part in (found.val, found.test))
        split = Split(train=tuple(sorted({*split.train}.difference(val, test))), val=val, test=test)
    return dealt(coded, split), {too_few("rows"): [row.origin for row in source]} if shares.spared else {}


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
