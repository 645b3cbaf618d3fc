"""Splits are deterministic, keep groups whole, and leave something to train on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorabank.data.split import split_rows
from lorabank.errors import DataError

KEYS = [f"key {n}" for n in range(200)]
GROUPS = [f"group {n % 30}" for n in range(200)]


@pytest.mark.parametrize("keys", [KEYS, GROUPS])
@pytest.mark.parametrize(("val", "test"), [(0.1, 0), (20, 0.2), (0, 0), (1, 1), (0.05, 30)])
def test_parts_are_disjoint_complete_and_keep_groups_whole(keys: list[str], val: float, test: float) -> None:
    split = split_rows(keys, val=val, test=test, seed=3)
    assert sorted(split.train + split.val + split.test) == list(range(200))
    parts = [{keys[i] for i in part} for part in (split.train, split.val, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for part, wanted in ((split.val, val), (split.test, test)):
        rows = round(wanted * 200) if 0 < wanted < 1 else wanted
        if keys is KEYS:
            assert len(part) == rows
        else:
            assert (len(part) > 0) == (rows > 0) and len(part) <= max(rows, 7)


def test_the_seed_decides_and_the_order_does_not() -> None:
    split = split_rows(KEYS, val=0.1, test=10, seed=3)
    assert split == split_rows(KEYS, val=0.1, test=10, seed=3)
    assert split.val != split_rows(KEYS, val=0.1, test=10, seed=4).val
    backwards = split_rows(KEYS[::-1], val=0.1, test=10, seed=3)
    assert {KEYS[i] for i in split.val} == {KEYS[::-1][i] for i in backwards.val}


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from lorabank.data.split import split_rows\n"
        "print(split_rows([f'group {n % 30}' for n in range(200)], val=0.1, test=10, seed=3).val)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {str(split_rows(GROUPS, val=0.1, test=10, seed=3).val)}


def test_groups_larger_than_the_part() -> None:
    keys = ["big"] * 90 + ["small"] * 10
    split = split_rows(keys, val=0.05, test=0, seed=0)
    assert {keys[i] for i in split.val} == {"small"}


@pytest.mark.parametrize(
    ("keys", "val", "test", "expected"),
    [
        (KEYS, 200, 0, "leaves none to train on"),
        (KEYS, 0.5, 100, "leaves none to train on"),
        (["one"] * 50, 0.1, 0, "50 rows, different rows: 1, too few"),
        (["one", "two"] * 50, 0.1, 0.1, "too few"),
    ],
)
def test_splits_that_can_not_be_made(keys: list[str], val: float, test: float, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        split_rows(keys, val=val, test=test, seed=0)
