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
    source: LabelledText
    truncated: bool
    """Whether tokens were cut off."""

    @property
    def label(self) -> Label | None:
        """As it was read; None for a row that is only predicted."""
        return self.source.label

    @property
    def origin(self) -> str:
        """Where the row came from."""
        return self.source.origin

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def prompt_text(self) -> str:
        """The texts."""
        return self.source.text if self.source.pair is None else f"{self.source.text} ‖ {self.source.pair}"

    @property
    def reference(self) -> str:
        """The label, for people."""
        return ", ".join(self.label) if isinstance(self.label, tuple) else "" if self.label is None else str(self.label)

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.input_ids, self.token_type_ids, self.label


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
    texts: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, *, max_length: int, labels: Sequence[LabelSet] = ()
) -> list[ClassRow | RowError]:
    """Token ids, in order; a RowError for a text without a token, or a label that none of the `labels` has (if any are given).

    Of two texts the longer one is cut first. Texts keep the tokenizer's special tokens; where it has none to stand between two
    texts, a new line does.
    """
    found: list[ClassRow | RowError] = []
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        coded: dict[int, dict[str, Any]] = {}
        given = [_texts_for(text, tokenizer) for text in part]
        for paired in (False, True):
            chosen = [i for i, (_, second) in enumerate(given) if (second is not None) is paired]
            if chosen:
                coded |= dict(zip(chosen, _tokens([given[i] for i in chosen], tokenizer), strict=True))
        found += [_row(part[i], given[i], coded[i], tokenizer, max_length, labels) for i in range(len(part))]
    return found


def _texts_for(text: LabelledText, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """What the tokenizer is given: decoders' would join two texts without a sign of where one ends."""
    if text.pair is not None and tokenizer.sep_token is None:
        return f"{text.text}\n{text.pair}", None
    return text.text, text.pair


def _tokens(texts: Sequence[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokenizer's own columns of each text, uncut."""
    seconds = [second for _, second in texts if second is not None] or None
    coded: Any = tokenizer([first for first, _ in texts], text_pair=seconds, verbose=False)
    return [{key: coded[key][i] for key in coded if key != "attention_mask"} for i in range(len(texts))]


def _row(
    text: LabelledText,
    given: tuple[str, str | None],
    coded: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[LabelSet],
) -> ClassRow | RowError:
    cut = len(coded["input_ids"]) > max_length
    if cut:
        coded = dict(tokenizer(*given, truncation="longest_first", max_length=max_length, verbose=False))
    ids = tuple(coded["input_ids"])
    if not ids:
        return RowError("the text has no token", text.origin)
    misfits = [] if text.label is None else [_misfit(known, text.label) for known in labels]
    if misfits and all(misfits):
        return RowError(str(misfits[0]), text.origin)
    types = tuple(coded["token_type_ids"]) if "token_type_ids" in coded else None
    return ClassRow(input_ids=ids, token_type_ids=types, source=text, truncated=cut)


def _misfit(labels: LabelSet, label: Label) -> str | None:
    """Why the label isn't one of these; None where it is."""
    try:
        labels.target(label)
    except RowError as error:
        return error.reason
    return None
