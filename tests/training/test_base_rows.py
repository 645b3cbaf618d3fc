"""Names of the base by whose held-out rows it was scored on."""

from __future__ import annotations

from lorabank.training.base_rows import base_labels, base_rows, base_table, is_base


def test_one_set_keeps_the_plain_name() -> None:
    assert base_labels({"a": [1, 2], "b": [1, 2], "c": []}) == {"a": "base", "b": "base"}
    assert base_rows({"a": [], "b": []}) == {}


def test_each_distinct_set_once() -> None:
    held = {"a": [1], "b": [2], "c": [1], "d": [2], "e": [2]}
    assert base_rows(held) == {"base (a and c's rows)": [1], "base (b and 2 more's rows)": [2]}
    assert all(is_base(label) for label in base_labels(held).values())
    assert not is_base("based")


def test_the_rows_of_a_table() -> None:
    assert base_table({"loss": 1.0}, {"a": {"loss": 1.0}}) == {"base": {"loss": 1.0}}
    assert base_table({}, {"a": {"loss": 1.0}, "b": {"loss": 2.0}}) == {
        "base (a's rows)": {"loss": 1.0},
        "base (b's rows)": {"loss": 2.0},
    }
