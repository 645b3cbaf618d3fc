"""Which columns of a row are the text, its pair and the label: named by the user, or recognised by GLUE's and other names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorabank.data.row import quoted
from lorabank.errors import DataError, Setting, closest

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)
"""Two columns that are read together: of MRPC, STS-B, RTE, WNLI; of MNLI, SNLI and AX; of QQP; of QNLI; of BoolQ; and others."""
TEXTS = ("text", "sentence", "content", "review", "tweet", "comment", "title", "headline", "utterance", "question", "premise")
LABELS = ("label", "labels", "target", "class", "category", "intent", "sentiment", "score", "similarity_score", "rating")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one data set."""

    text: str
    pair: str | None = None
    label: str | None = None
    """None: the rows have none, and can only be predicted."""

    def without_label(self) -> Columns:
        """The texts alone, to be predicted."""
        return replace(self, label=None)


def find_columns(
    values: Mapping[str, Any], *, text: str | None, pair: str | None, label: str | None, origin: str, need_label: bool = True
) -> Columns:
    """The columns of a data set whose first row has `values`. `text`, `pair` and `label` name them; None: recognised.

    Raises DataError, naming the row and its columns, where one that is named or needed isn't there.
    """
    names = list(values)
    for setting, name in (("classification.text", text), ("classification.text_pair", pair)):
        _check_there(setting, name, names, origin)
    if label is not None and (need_label or label in names):
        _check_there("classification.label", label, names, origin)
    found_label = label if label in names else None
    if label is None:
        found_label = next((name for name in LABELS if name in names and name not in (text, pair)), None)
    if found_label is None and need_label:
        raise DataError(
            f"{origin}: no column with the label: expected one called {', '.join(LABELS)}, got {quoted(names)}. Name it with ",
            Setting("classification.label"),
            ".",
        )
    if text is None:
        first, second = _texts(names, found_label)
        if first is None:
            raise DataError(
                f"{origin}: no column with the text: expected one called {', '.join(TEXTS)}, or a pair such as sentence1 and "
                f"sentence2, got {quoted(names)}. Name it with ",
                Setting("classification.text"),
                ".",
            )
        return Columns(text=first, pair=second if pair is None else pair, label=found_label)
    return Columns(text=text, pair=pair, label=found_label)


def _texts(names: Collection[str], label: str | None) -> tuple[str | None, str | None]:
    for first, second in PAIRS:
        if first in names and second in names and label not in (first, second):
            return first, second
    return next((name for name in TEXTS if name in names and name != label), None), None


def _check_there(setting: str, name: str | None, names: Collection[str], origin: str) -> None:
    if name is not None and name not in names:
        raise DataError(Setting(setting), f": {origin} has no column {name!r}{closest(name, names)}; it has {quoted(names)}")
