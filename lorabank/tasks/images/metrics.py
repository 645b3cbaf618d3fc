"""What a classifier's answers are worth: accuracy among the first 1 and 5, F1 over the classes, the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorabank.errors import ConfigError, MissingExtraError, Setting

TOP = 5
ACCURACY, TOP5, F1 = "accuracy", "top5_accuracy", "f1_macro"
METRICS = (ACCURACY, TOP5, F1)
"""Besides `loss`. All are shares, 0 to 1."""


def check_top5(metrics: Sequence[str], labels: Sequence[int]) -> None:
    """Raise ConfigError where the accuracy among five is asked for and no head has more labels. `labels`: how many each has."""
    if TOP5 in metrics and labels and max(labels) <= TOP:
        raise ConfigError(
            Setting("eval.metrics"), f": {TOP5} is for more than {TOP} labels, and there are {max(labels)}. Leave it out."
        )


@dataclass(frozen=True)
class Answer:
    """What one adapter says of one picture."""

    ranked: tuple[int, ...]
    """Labels by their numbers, the likeliest first, up to TOP of them."""
    shares: tuple[float, ...]
    """Their probabilities."""
    loss: float = 0.0
    """−log p of the true label, nats."""


def scores(answers: Sequence[Answer], true: Sequence[int], labels: int) -> dict[str, float]:
    """`loss`, `accuracy`, `f1_macro`, and `top5_accuracy` where there are more than five labels.

    F1 (scikit-learn's) is a mean over the classes that occur, among the true or the predicted: each counts the same.
    """
    count = max(1, len(answers))
    found = {
        "loss": sum(answer.loss for answer in answers) / count,
        ACCURACY: sum(answer.ranked[0] == label for answer, label in zip(answers, true, strict=True)) / count,
    }
    if labels > TOP:
        found[TOP5] = sum(label in answer.ranked for answer, label in zip(answers, true, strict=True)) / count
    try:
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise MissingExtraError("f1_macro: needs scikit-learn: pip install 'lorabank[images]'") from error
    first = [answer.ranked[0] for answer in answers]
    f1: Any = f1_score  # its annotation knows texts alone for zero_division
    found[F1] = float(f1(list(true), first, average="macro", zero_division=0.0))
    return found


def confusion(true: Sequence[int], predicted: Sequence[int], labels: int) -> np.ndarray:
    """int64 (labels, labels): how often the label of a row was taken for that of a column."""
    counts = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(counts, (np.asarray(true, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return counts


def mistaken(counts: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """(true, predicted, times) of the pairs that are mistaken most often, the first ones first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(place), wrong.shape[1]) for place in order]
    return [(a, b, int(wrong[a, b])) for a, b in pairs if wrong[a, b]]
