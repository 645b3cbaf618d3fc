"""Which rows a data set is read from, by what they are for."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorabank.config.paths import expanded
from lorabank.config.train import DataConfig
from lorabank.data.read import Source
from lorabank.data.repository import FolderSplits, splits_of
from lorabank.errors import DataError, Setting

R = TypeVar("R")


@dataclass(frozen=True)
class ToScore:
    """Rows given as an object, in the place of training rows, that are scored alone."""

    rows: Source


def sources_of(
    data: DataConfig,
    train: Source | None,
    val: Source | None,
    *,
    expected: str = "a file, a folder or a data set id",
    loose: Collection[str] = (),
) -> dict[str, Source]:
    """`train`, `val`, `test` to the source of each that has one; `train` and `val` override the paths of `data`.

    A folder to train on that holds a validation split is the source of `val`, too, where no other is given: who reads it takes
    the part of each (`part_of`). Rows to be scored alone (`ToScore`, `data.test`) are test rows: then there is no `train`.
    Raises DataError where there are neither. `expected`: what training rows may be; `loose`: as `splits_of` has it.
    """
    if isinstance(train, ToScore):
        return {"test": train.rows}
    given = {"train": data.train if train is None else train, "val": data.val if val is None else val, "test": data.test}
    found = {role: source for role, source in given.items() if source is not None}
    for role, source in found.items():
        if isinstance(source, str) and not source:  # as a path it would be the working folder
            raise DataError(Setting(f"data.{role}"), f": is empty. Expected {expected}.")
    if "train" not in found and set(found) != {"test"}:
        raise DataError("no training data: set ", Setting("data.train"), f" to {expected}, or pass the rows themselves")
    splits = _splits(found, loose)
    if "val" not in found and splits is not None and splits.name("val") not in (None, splits.name("train")):
        found["val"] = found["train"]
    return found


def left_aside(sources: Mapping[str, Source], *, loose: Collection[str] = ()) -> list[str]:
    """A sentence on the splits of the folder to train on that `sources` don't have, and how its test split is scored."""
    splits = _splits(sources, loose)
    if splits is None:
        return []
    train = str(sources["train"])
    paths = {role: str(source) for role, source in sources.items() if isinstance(source, str | Path)}
    used = {splits.name(role) for role, path in paths.items() if path == train}
    named = {splits.lying_at(expanded(path, place=f"data.{role}", kind=DataError)) for role, path in paths.items()}
    others = [name for name in splits.parts if name not in used | named]
    if not others:
        return []
    test = splits.name("test")
    scored = f"; to score {test}: lorabank eval OUTPUT --data {shlex.quote(train)}" if test in others else ""
    return [f"splits left aside, neither trained on nor used for validation: {', '.join(others)}{scored}"]


def told_of_splits(error: DataError, source: Source) -> DataError:
    """An error over the rows to be scored, with which split of a folder they are, and what there is beside it."""
    splits = _splits({"train": source}, ())
    test = None if splits is None else splits.name("test")
    if splits is None or test is None:
        return error
    files = [str(part.tables[0]) for name, part in splits.parts.items() if name != test and len(part.tables) == 1]
    other = f"Name another's file (such as {files[-1]}), or" if files else "To score others,"
    return DataError(
        *error.parts,
        f"\nThese are the split {test!r} of {source}, and test splits often come without answers. {other} leave the data out: "
        "the rows that the run held out are scored then.",
    )


def _splits(sources: Mapping[str, Source], loose: Collection[str]) -> FolderSplits | None:
    """Of the folder to train on; None where it is another source."""
    train = sources.get("train")
    if not isinstance(train, str | Path):
        return None
    path = expanded(str(train), place="data.train", kind=DataError)
    return splits_of(path, loose=loose) if path.is_dir() else None


def main_part(parts: Mapping[str, object]) -> str:
    """The part that a data set is about: `train`, or `test` where nothing is trained."""
    return "train" if parts.get("train") else "test"


def all_scored(rows: Sequence[R]) -> dict[str, list[R]]:
    """The splits of rows that are to be scored alone."""
    return {"train": [], "val": [], "test": list(rows)}
