"""From raw rows to `LabelledText`s, and to `ClassRow`s: token ids and a target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabank.data.formats import text_of
from lorabank.data.row import Row, RowError
from lorabank.tasks.text_classification.columns import Columns
from lorabank.tasks.text_classification.labels import Label, LabelSet, label_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = "no label"
_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """One row: a text, or two that are read together, and its label."""

    text: str
    pair: str | None
    label: Label | None
    origin: str
    """`file:line` or `row N of …`."""
    group: str | None = None
    """Value of the column `group_by`, if one is set."""

    @property
    def key(self) -> str:
        """The texts as one string: equal ones never land in two splits, whatever their labels."""
        return json.dumps([self.text, self.pair], ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One row as a model takes it."""

    input_ids: tuple[int, ...]
    """Cut to `max_length`, special tokens included."""
    token_type_ids: tuple[int, ...] | None
    """0 for the first text, 1 for the second, where the tokenizer gives them."""
    target: int | float | tuple[float, ...] | None
    """What the loss compares the head's outputs with; None for a row without a label."""
    source: LabelledText
    truncated: bool
    """Whether tokens were cut off."""

    @property
    def origin(self) -> str:
        """Where the row came from."""
        return self.source.origin


def texts_of(
    rows: Sequence[Row], columns: Columns, *, kind: str | None, need_label: bool, group_by: str | None = None
) -> list[LabelledText | RowError]:
    """One text a row, or why there is none: an empty text, no label, NaN (a NanError). Order is kept."""
    found: list[LabelledText | RowError] = []
    for row in rows:
        try:
            found.append(_text_of(row, columns, kind, need_label, group_by))
        except RowError as error:
            found.append(error.at(row.origin))
    return found


def _text_of(row: Row, columns: Columns, kind: str | None, need_label: bool, group_by: str | None) -> LabelledText:
    text = text_of(row.values, columns.text)
    pair = text_of(row.values, columns.pair) if columns.pair is not None else None
    label = label_of(row, columns.label, kind) if columns.label is not None else None
    if label is None and need_label:
        raise RowError(f"{NO_LABEL} in column {columns.label!r}")
    group = None if group_by is None else text_of(row.values, group_by)
    return LabelledText(text=text, pair=pair, label=label, origin=row.origin, group=group)


def encode(
    texts: Sequence[LabelledText], labels: LabelSet, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[ClassRow | RowError]:
    """Token ids and targets, in order; a RowError for a label that the head lacks, or a text without a single token.

    Of two texts the longer one is cut first. Texts keep the tokenizer's special tokens.
    """
    found: list[ClassRow | RowError] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        paired = [i for i, text in enumerate(part) if text.pair is not None]
        coded: dict[int, dict[str, Any]] = {}
        for chosen in (paired, [i for i in range(len(part)) if part[i].pair is None]):
            if chosen:
                coded |= dict(zip(chosen, _tokens([part[i] for i in chosen], tokenizer), strict=True))
        for i, text in enumerate(part):
            found.append(_row(text, coded[i], labels, tokenizer, max_length))
    return found


def _tokens(texts: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokenizer's own columns of each text, uncut."""
    seconds = [text.pair for text in texts if text.pair is not None] or None
    coded: Any = tokenizer([text.text for text in texts], text_pair=seconds, verbose=False)
    return [{key: coded[key][i] for key in coded if key != "attention_mask"} for i in range(len(texts))]


def _row(
    text: LabelledText, coded: dict[str, Any], labels: LabelSet, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ClassRow | RowError:
    cut = len(coded["input_ids"]) > max_length
    if cut:
        coded = dict(tokenizer(text.text, text.pair, truncation="longest_first", max_length=max_length, verbose=False))
    ids = tuple(coded["input_ids"])
    if not ids:
        return RowError("the text has no token", text.origin)
    types = tuple(coded["token_type_ids"]) if "token_type_ids" in coded else None
    try:
        target = None if text.label is None else labels.target(text.label)
    except RowError as error:
        return error.at(text.origin)
    return ClassRow(input_ids=ids, token_type_ids=types, target=target, source=text, truncated=cut)
