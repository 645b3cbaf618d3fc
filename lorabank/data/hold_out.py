"""`hold_out`: validation and test rows, taken from the training rows for each split that has no source of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorabank.config.train import DataConfig
from lorabank.data.sources import all_scored
from lorabank.data.split import Split, group_unit, split_rows

R = TypeVar("R")


@dataclass(frozen=True)
class Shares:
    """What is to be taken from the training rows: shares (below 1) or numbers of rows, 0 for none."""

    val: float | int
    test: float | int
    spared: bool
    """Whether validation would have had its default share, but the rows are too few: all are trained on."""


@dataclass(frozen=True)
class HeldOut(Generic[R]):
    """Rows by `train`, `val` and `test`."""

    splits: dict[str, list[R]]
    spared: bool
    """As `Shares` has it."""


def hold_out(
    parts: Mapping[str, Sequence[R]], keys: Sequence[str], data: DataConfig, *, seed: int, unit: str, few: bool | None = None
) -> HeldOut[R]:
    """Hold rows out of `parts["train"]` for each split that isn't in `parts`; rows to be scored alone are test rows.

    keys: one a training row; equal ones stay together. `unit` names in messages what a key is where `data.group_by` isn't set.
    `few`: whether there are too few rows for the default share; else that is so of rows with one key. Raises DataError for a
    split that can't be made.
    """
    if "train" not in parts:
        return HeldOut(all_scored(parts["test"]), spared=False)
    shares = shares_of(parts, data, few=len(set(keys)) < 2 if few is None else few)
    split = split_rows(keys, val=shares.val, test=shares.test, seed=seed, unit=group_unit(data.group_by, unit))
    return HeldOut(dealt(parts, split), spared=shares.spared)


def shares_of(parts: Mapping[str, object], data: DataConfig, *, few: bool) -> Shares:
    """What the splits without a part of their own take. `few`: whether there are too few training rows for the default share."""
    val = 0 if "val" in parts else data.val_split
    # the default share was nobody's demand: a set too small for it is trained on whole
    spared = val == DataConfig.val_split and few
    return Shares(val=0 if spared else val, test=0 if "test" in parts else data.test_split, spared=spared)


def dealt(parts: Mapping[str, Sequence[R]], split: Split) -> dict[str, list[R]]:
    """The training rows as `split` has their positions; `val` and `test` are parts of their own where there are such."""
    source = parts["train"]
    splits = {"train": [source[i] for i in split.train]}
    for role, held in (("val", split.val), ("test", split.test)):
        splits[role] = list(parts[role]) if role in parts else [source[i] for i in held]
    return splits


def too_few(different: str) -> str:
    """The note for who asks for no validation rows and gets none. `different`: what there are too few different ones of."""
    return f"too few different {different} to hold any out for validation"
