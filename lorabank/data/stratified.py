"""Stratified splits: each class gives its share of the held-out rows, so that rare ones aren't missed or used up by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabank.data.split import Split, split_rows
from lorabank.errors import DataError
from lorabank.wording import counted


@dataclass(frozen=True)
class Stratified:
    """A split, and who has no part in the held-out rows."""

    split: Split
    undivided: tuple[str, ...]
    """Classes that have too few different rows to hold any out; all of theirs are trained on."""


def stratified_rows(keys: Sequence[str], labels: Sequence[str], *, val: float | int, test: float | int, seed: int) -> Stratified:
    """Split rows class by class; as `split_rows` otherwise: equal keys stay together, and the order of rows doesn't matter.

    keys: one a row, of its content. labels: its class. `val`, `test`: shares (below 1) of each class, or numbers of rows over all
    (1 and above), which are shared out over the classes. Raises DataError where nothing is left to train on or to hold out.
    """
    total = len(keys)
    shares = {part: wanted if wanted < 1 else wanted / max(1, total) for part, wanted in (("val", val), ("test", test))}
    if sum(shares.values()) >= 1:
        asked = f"{round(sum(shares.values()) * total)} of {counted(total, 'row')}"
        raise DataError(
            f"data.val_split {val} and data.test_split {test} ask for {asked}, which leaves none to train on. Lower them, or set "
            "them to 0"
        )
    members: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    undivided: list[str] = []
    for label, positions in members.items():
        own = [keys[i] for i in positions]
        if len(set(own)) < 1 + sum(1 for share in shares.values() if share):
            parts["train"] += positions
            if any(shares.values()):
                undivided.append(label)
            continue
        found = split_rows(own, val=shares["val"], test=shares["test"], seed=seed, unit=f"rows of {label!r}")
        for part, chosen in (("train", found.train), ("val", found.val), ("test", found.test)):
            parts[part] += [positions[i] for i in chosen]
    for part, share in shares.items():
        if share and not parts[part]:
            raise DataError(
                f"data.{part}_split {val if part == 'val' else test}: no class has two different rows, so none can be held out "
                "and another trained on. Give more rows, or set it to 0"
            )
    return Stratified(Split(*(tuple(sorted(parts[part])) for part in ("train", "val", "test"))), tuple(undivided))
