"""Which rows a data set is read from, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from lorabank.config.train import DataConfig
from lorabank.data.read import Source
from lorabank.errors import DataError, Setting

R = TypeVar("R")


def sources_of(
    data: DataConfig, train: Source | None, val: Source | None, *, expected: str = "a file, a folder or a data set id"
) -> dict[str, Source]:
    """`train`, `val`, `test` to the source of each that has one; `train` and `val` override the paths of `data`.

    Rows to be scored alone are test rows: then there is no `train`. Raises DataError where there are neither. `expected`: what
    training rows may be.
    """
    given = {"train": data.train if train is None else train, "val": data.val if val is None else val, "test": data.test}
    found = {role: source for role, source in given.items() if source is not None}
    if "train" not in found and set(found) != {"test"}:
        raise DataError("no training data: set ", Setting("data.train"), f" to {expected}, or pass the rows themselves")
    return found


def main_part(parts: Mapping[str, object]) -> str:
    """The part that a data set is about: `train`, or `test` where nothing is trained."""
    return "train" if parts.get("train") else "test"


def all_scored(rows: Sequence[R]) -> dict[str, list[R]]:
    """The splits of rows that are to be scored alone."""
    return {"train": [], "val": [], "test": list(rows)}
