"""Holding rows out of the training rows: what has a source of its own, what is spared, and what stays together."""

from __future__ import annotations

import pytest

from lorabank.config.train import DataConfig
from lorabank.data.hold_out import dealt, hold_out, shares_of, too_few
from lorabank.data.split import Split
from lorabank.errors import DataError

ROWS = [f"row {i}" for i in range(40)]


def test_a_split_with_rows_of_its_own_takes_none() -> None:
    held = hold_out({"train": ROWS, "val": ["own"]}, ROWS, DataConfig(test_split=4), seed=0, unit="rows")
    assert held.splits["val"] == ["own"] and len(held.splits["test"]) == 4
    assert sorted(held.splits["train"] + held.splits["test"]) == sorted(ROWS)


def test_rows_to_be_scored_alone_are_test_rows() -> None:
    held = hold_out({"test": ROWS}, [], DataConfig(), seed=0, unit="rows")
    assert held.splits == {"train": [], "val": [], "test": ROWS} and not held.spared


def test_equal_keys_stay_together() -> None:
    keys = [str(i // 4) for i in range(40)]
    splits = hold_out({"train": ROWS}, keys, DataConfig(val_split=8), seed=0, unit="rows").splits
    places = {role: {keys[ROWS.index(row)] for row in rows} for role, rows in splits.items()}
    assert len(splits["val"]) == 8 and not places["val"] & places["train"]


@pytest.mark.parametrize("few", [None, True])
def test_the_default_share_spares_what_is_too_small_for_it(few: bool | None) -> None:
    keys = ["same"] * 40 if few is None else ROWS
    held = hold_out({"train": ROWS}, keys, DataConfig(), seed=0, unit="rows", few=few)
    assert held.spared and held.splits == {"train": ROWS, "val": [], "test": []}


def test_rows_with_validation_rows_of_their_own_are_not_said_to_be_spared() -> None:
    held = hold_out({"train": ROWS, "val": ["own"]}, ["same"] * 40, DataConfig(), seed=0, unit="rows")
    assert not held.spared and held.splits["val"] == ["own"]


@pytest.mark.parametrize(("group_by", "named"), [(None, "different recordings: 1,"), ("who", "different values of 'who': 1,")])
def test_a_demand_that_cannot_be_met_is_refused_by_the_name_of_what_is_too_few(group_by: str | None, named: str) -> None:
    data = DataConfig(val_split=0.2, group_by=group_by)
    with pytest.raises(DataError, match=named):
        hold_out({"train": ROWS}, ["same"] * 40, data, seed=0, unit="recordings")


def test_shares_are_those_of_splits_without_rows_of_their_own() -> None:
    data = DataConfig(val_split=0.2, test_split=3)
    assert [(s.val, s.test) for s in (shares_of({"train": 0}, data, few=True), shares_of({"test": 0}, data, few=True))] == [
        (0.2, 3),
        (0.2, 0),
    ]


def test_positions_become_rows() -> None:
    split = Split(train=(2, 0), val=(1,), test=(3,))
    assert dealt({"train": "abcd", "test": "xy"}, split) == {"train": ["c", "a"], "val": ["b"], "test": ["x", "y"]}


def test_the_note_names_what_is_too_few() -> None:
    assert too_few("recordings") == "too few different recordings to hold any out for validation"
