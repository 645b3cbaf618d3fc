"""A label's only row is trained on, and its group with it; what can't be held out is counted."""

from __future__ import annotations

import pytest

from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from lorabank.tasks.text_classification.rows import ClassRow, LabelledText
from lorabank.tasks.text_classification.splits import split_texts


def row(text: str, label: str, group: str | None = None) -> ClassRow:
    return ClassRow(
        input_ids=(1,),
        token_type_ids=(0,),
        source=LabelledText(text=text, pair=None, label=label, origin=text, group=group),
        truncated=False,
    )


def test_the_group_of_a_labels_only_row_stays_in_training() -> None:
    rows = [row(f"{user} {i}", "ab"[i % 2], user) for user in ("u0", "u1", "u2", "u3") for i in range(4)]
    rows += [row(f"rare {user}", f"rare {user}", user) for user in ("u0", "u2")]
    splits, _ = split_texts({"train": rows}, DataConfig(group_by="user", val_split=0.25), seed=0)
    groups = {name: {each.source.group for each in part} for name, part in splits.items()}
    assert groups["val"]
    assert not groups["val"] & groups["train"]
    assert groups["train"] >= {"u0", "u2"}


def test_rows_that_can_not_be_held_out_are_counted_in_the_refusal() -> None:
    rows = [row("good", "a"), row("bad", "b")]
    with pytest.raises(DataError, match=r"ask for 1 of 0 rows.* Not among them: 2 rows that stay in training"):
        split_texts({"train": rows}, DataConfig(val_split=1), seed=0)
