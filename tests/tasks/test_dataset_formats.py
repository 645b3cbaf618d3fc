"""`datasets` objects with a format, which each task reads as without it, or a transform: rows are what it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from tests.tasks.reading import READINGS

TASKS = pytest.mark.parametrize("task", READINGS)
ALL = DataConfig(val_split=0)
COLUMN = {"text-generation": "prompt", "summarization": "document"}
"""Of a task's rows, a text; `text` for others."""


def contents(sets: Any) -> list[object]:
    return [row.content for row in sets.train]


@TASKS
@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_changes_nothing(task: str, kind: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    plain = reading.rows(4, 0)
    wanted = contents(reading.read(ALL, tmp_path, plain))
    assert contents(reading.read(ALL, tmp_path, plain.with_format(kind))) == wanted
    split = datasets.DatasetDict({"train": plain, "validation": reading.rows(2, 1)}).with_format(kind)
    assert contents(reading.read(ALL, tmp_path, split)) == wanted
    first = next(iter(plain.features))
    assert contents(reading.read(ALL, tmp_path, plain.with_format(kind, columns=[first]))) == wanted


@TASKS
def test_a_streamed_one_s_format_changes_nothing(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    plain = reading.rows(4, 0)
    wanted = contents(reading.read(ALL, tmp_path, plain))
    streamed = plain.to_iterable_dataset()
    assert contents(reading.read(ALL, tmp_path, streamed.with_format("numpy"))) == contents(reading.read(ALL, tmp_path, streamed))
    assert len(wanted) == 4


def same(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch


@TASKS
def test_rows_are_those_that_a_transform_makes(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    plain = reading.rows(4, 0)

    def renamed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {f"my_{name}": values for name, values in batch.items()} | batch

    for transform in (same, renamed):
        sets = reading.read(ALL, tmp_path, plain.with_transform(transform))
        assert [reading.shown(row) for row in sets.train] == [
            reading.shown(row) for row in reading.read(ALL, tmp_path, plain).train
        ]
    column = COLUMN.get(task, "text")
    if column not in plain.column_names:
        column = "label" if "label" in plain.column_names else "objects"

    def without(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: values for name, values in batch.items() if name != column}

    with pytest.raises(DataError, match=r"column|known form|caption"):
        reading.read(ALL, tmp_path, plain.with_transform(without))


@TASKS
@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (
            lambda batch: batch["nothing"],
            r"row 1 of .*: the transform of the data set fails on it \(KeyError: 'nothing'\)\.",
        ),
        (lambda batch: [1], r"row 1 of .*: expected a dict of columns, got int|the transform of the data set fails on it"),
    ],
)
def test_a_transform_that_fails_is_said_with_its_row(
    task: str, transform: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    reading = READINGS[task]
    with pytest.raises(DataError, match=said):
        reading.read(ALL, tmp_path, reading.rows(4, 0).with_transform(transform))
