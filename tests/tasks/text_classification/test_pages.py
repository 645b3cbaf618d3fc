"""What people look at: the table of labels, the confusions, the worst rows, the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabank.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, LabelSet
from lorabank.tasks.text_classification.pages import (
    Outcome,
    confused,
    confusion,
    decided,
    label_table,
    page,
    picture,
    probabilities,
    worst_rows,
)
from lorabank.tasks.text_classification.rows import ClassRow, LabelledText


def outcome(labels: LabelSet, given: list, outputs: list, losses: list | None = None) -> Outcome:
    rows = [
        ClassRow(
            input_ids=(1,),
            token_type_ids=None,
            source=LabelledText(text=f"text | {i}", pair="other" if i == 1 else None, label=label, origin=f"f:{i + 1}"),
            truncated=False,
        )
        for i, label in enumerate(given)
    ]
    values = np.array(outputs, dtype=np.float64)
    return Outcome(labels=labels, rows=rows, outputs_NK=values, losses_N=np.array(losses or range(len(rows)), dtype=np.float64))


ABC = LabelSet(kind=SINGLE, names=("a", "b", "c"))
FOUR = outcome(ABC, ["a", "b", "b", "c"], [[2, 0, 0], [0, 0, 3], [0, 1, 0], [0, 2, 0]], [0.1, 3.0, 0.5, 2.0])


def test_confusions_by_hand() -> None:
    assert confusion(FOUR).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert confused(FOUR) == [("b", "c", 1), ("c", "b", 1)]
    assert decided(FOUR.outputs_NK, ABC) == ["a", "c", "b", "b"]


def test_a_row_a_label_by_hand() -> None:
    a, b, c = label_table(FOUR)
    assert a == {"label": "a", "rows": 1, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert b == {"label": "b", "rows": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert c == {"label": "c", "rows": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    never = label_table(outcome(ABC, ["a"], [[1, 0, 0]]))[2]
    assert never == {"label": "c", "rows": 0, "precision": None, "recall": None, "f1": None}


def test_the_worst_rows_are_those_that_are_wrong() -> None:
    worst = worst_rows(FOUR)
    assert [(row["row"], row["label"], row["predicted"], row["loss"]) for row in worst] == [
        ("f:2", "b", "c", 3.0),
        ("f:4", "c", "b", 2.0),
    ]
    assert worst[0]["text_pair"] == "other"
    assert worst[0]["probability"] == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-4)
    assert [row["row"] for row in worst_rows(FOUR, 1)] == ["f:2"]


def test_probabilities() -> None:
    assert probabilities(np.array([[0.0, 0.0, -np.inf]]), ABC).tolist() == [[0.5, 0.5, 0.0]]
    two = LabelSet(kind=MULTI, names=("a", "b"))
    assert probabilities(np.array([[0.0, -1e4]]), two)[0].tolist() == pytest.approx([0.5, 0.0])
    number = LabelSet(kind=REGRESSION, names=("score",))
    assert probabilities(np.array([[3.7]]), number).tolist() == [[3.7]]


def test_a_page_for_each_kind() -> None:
    text = page("mood", FOUR, {"accuracy": 0.5})
    assert "# mood: 4 held-out rows" in text
    assert "| b | 2 | 0.500 | 0.500 | 0.500 |" in text
    assert "| b | c | 1 |" in text
    assert "| 3.000 | b | c | text \\| 1 ‖ other | f:2 |" in text
    several = outcome(LabelSet(kind=MULTI, names=("a", "b")), [("a",), ()], [[1, -1], [-1, 1]])
    assert worst_rows(several)[0]["predicted"] == ["b"]
    assert "| 1.000 |  | b |" in page("tags", several, {"f1_micro": 2 / 3})
    numbers = outcome(LabelSet(kind=REGRESSION, names=("score",)), [1.0, 2.0], [[1.5], [5.0]], [0.25, 9.0])
    assert [row["predicted"] for row in worst_rows(numbers)] == [5.0, 1.5]
    assert "furthest off" in page("stars", numbers, {"pearson": 1.0})


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION, "many"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    shown = {
        SINGLE: FOUR,
        MULTI: outcome(LabelSet(kind=MULTI, names=("a", "b")), [("a",), ()], [[1, -1], [-1, 1]]),
        REGRESSION: outcome(LabelSet(kind=REGRESSION, names=("score",)), [1.0, 2.0], [[1.5], [5.0]]),
        "many": outcome(
            LabelSet(kind=SINGLE, names=tuple(f"label {i}" for i in range(40))),
            [f"label {i}" for i in range(40)],
            np.roll(np.eye(40), 3, axis=1).tolist(),
        ),
    }[kind]
    with Image.open(picture(shown, f"{kind}: held-out rows", tmp_path / "one.png")) as drawn:
        assert drawn.width > 400
        assert len(drawn.convert("L").getcolors() or []) > 10, "not a blank page"
