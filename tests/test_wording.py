"""Counts in what users see: one of a thing is one."""

from __future__ import annotations

import pytest

from lorabank.data.bad_rows import nothing_left, refusal
from lorabank.data.row import RowError
from lorabank.data.row_report import row_report
from lorabank.tasks.own_head import base_note
from lorabank.wording import counted


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes"), (1200, "1,200 boxes")], ids=lambda value: str(value)
)
def test_one_and_many(count: int, said: str) -> None:
    assert counted(count, "box", "boxes") == said
    assert counted(count, "row") == said.replace("boxes", "rows").replace("box", "row")


def test_reports_and_refusals_of_one() -> None:
    errors = [RowError("no label", "a.png")]
    report = row_report(read=1, errors=[], splits={"train": [0]}, notes={"cut": ["a.png"]}, what="pictures")
    assert report.lines() == ["1 picture read, 1 kept: 1 train", "cut: 1 picture (a.png)"]
    assert "1 of 1 picture can't be used" in str(refusal(errors, 1, "data.bad_rows", what="pictures"))
    assert str(nothing_left("val", 1, errors)).startswith("val data: not the only row can be used:")
    assert str(nothing_left("val", 2, errors * 2)).startswith("val data: none of the 2 rows can be used:")
    assert base_note(["base"], ["cat"], [["dog"]]) == " (base by its own head, of 1 other label: cat)"
