"""`prepare_texts`: from sources to labelled token rows in splits, with a report.

What can't be used is named and counted, and left out or refused as the user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorabank.data.read import Source, read_rows
from lorabank.data.report import MAX_ORIGINS
from lorabank.data.row import NanError, Row, RowError
from lorabank.errors import DataError, Setting
from lorabank.tasks.text_classification.columns import Columns, find_columns
from lorabank.tasks.text_classification.labels import (
    MULTI,
    REGRESSION,
    SINGLE,
    LabelSet,
    find_kind,
    make_set,
    names_in,
)
from lorabank.tasks.text_classification.report import LabelReport, build_report
from lorabank.tasks.text_classification.rows import ClassRow, LabelledText, encode, texts_of
from lorabank.tasks.text_classification.splits import label_notes, split_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What the user chose about texts and labels."""

    text: str | None = None
    """Column of the text; None: recognised."""
    text_pair: str | None = None
    """Column of a second text that is read with it; None: recognised where the names tell."""
    label: str | None = None
    """Column of the label; None: recognised."""
    labels: Sequence[str] | None = None
    """The labels in the head's order; None: the data set's own names, else those of the training rows."""
    problem_type: str | None = None
    """`single_label`, `multi_label` or `regression`; None: what the labels look like."""
    max_length: int = 512
    """Tokens of a row, special ones included; longer rows are cut, of two texts the longer first."""
    val_split: float | int = 0.05
    test_split: float | int = 0
    group_by: str | None = None
    limit: int | None = None
    bad_rows: str = "drop"
    """What follows on a row that can't be used: `drop` and count it, or `stop` with an error that names all of them."""
    nan_rows: str = "stop"
    """The same for NaN."""


@dataclass(frozen=True, kw_only=True)
class PreparedTexts:
    """Rows ready to be batched, in the order of their sources."""

    train: list[ClassRow]
    val: list[ClassRow]
    test: list[ClassRow]
    labels: LabelSet
    report: LabelReport


@dataclass
class _Reading:
    """What was read of one source so far."""

    columns: Columns
    texts: list[LabelledText]
    classes: Sequence[str] | None
    errors: list[RowError] = field(default_factory=list)


def prepare_texts(
    sources: Mapping[str, Source | None],
    settings: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    labels: LabelSet | None = None,
    progress: Progress | None = None,
) -> PreparedTexts:
    """Read, label, tokenise and split. `sources`: `train` (needed), `val` and `test` to a path, id or object.

    `labels`: those of a trained head; None: found in the training rows. Rows that can't be used (an empty text, no label, a label
    that the head lacks) are counted in the report by reason, or refused, as the settings say. Raises DataError and ConfigError.
    """
    given = {role: source for role, source in sources.items() if source is not None}
    if "train" not in given:
        raise DataError("no training data: set data.train to a file, a folder or a data set id, or pass the rows themselves")
    kind = settings.problem_type if labels is None else labels.kind
    raw = {role: read_rows(source, limit=settings.limit, role=role) for role, source in given.items()}
    parts = {role: _read(rows, settings, kind) for role, rows in raw.items()}
    if kind is None:
        kind = find_kind(text.label for text in parts["train"].texts if text.label is not None)
        for part, rows in zip(parts.values(), raw.values(), strict=True):
            _settle(part, rows, kind)
    errors = [error for part in parts.values() for error in part.errors]
    read = sum(map(len, raw.values()))
    _refuse(errors, read, settings)
    for role, part in parts.items():
        if not part.texts:
            raise nothing_left(role, len(raw[role]), part.errors)
    if labels is None:
        labels = _labels(parts["train"], settings, kind)
    coded: dict[str, list[ClassRow]] = {}
    done = 0
    for role, part in parts.items():
        found = encode(part.texts, labels, tokenizer, max_length=settings.max_length)
        more = [row for row in found if isinstance(row, RowError)]
        coded[role], errors = [row for row in found if isinstance(row, ClassRow)], [*errors, *more]
        if not coded[role] and not (settings.bad_rows == "stop" and more):
            raise nothing_left(role, len(raw[role]), [*part.errors, *more])
        done += len(part.texts)
        if progress is not None:
            progress(done, sum(len(part.texts) for part in parts.values()))
    _refuse(errors, read, settings)
    splits, notes = split_texts(coded, val=settings.val_split, test=settings.test_split, seed=seed, by_group=settings.group_by)
    notes |= label_notes(splits["train"], labels)
    columns = {
        "text": parts["train"].columns.text,
        "text_pair": parts["train"].columns.pair,
        "label": parts["train"].columns.label,
    }
    report = build_report(read=read, columns=columns, labels=labels, errors=errors, splits=splits, notes=notes)
    return PreparedTexts(train=splits["train"], val=splits["val"], test=splits["test"], labels=labels, report=report)


def _read(rows: Sequence[Row], settings: TextSettings, kind: str | None) -> _Reading:
    columns = find_columns(
        rows[0].values, text=settings.text, pair=settings.text_pair, label=settings.label, origin=rows[0].origin
    )
    found = texts_of(rows, columns, kind=kind, need_label=True, group_by=settings.group_by)
    texts = [text for text in found if isinstance(text, LabelledText)]
    classes = rows[0].classes.get(columns.label or "")
    return _Reading(columns, texts, classes, [error for error in found if isinstance(error, RowError)])


def _settle(part: _Reading, rows: Sequence[Row], kind: str) -> None:
    """Read labels again, now that their kind is known: numbers with a fraction among names are names no more."""
    if kind == SINGLE and not any(isinstance(text.label, float) for text in part.texts):
        return
    if kind == MULTI and all(isinstance(text.label, tuple) for text in part.texts):
        return
    by_origin = {text.origin: text for text in part.texts}
    again = texts_of([row for row in rows if row.origin in by_origin], part.columns, kind=kind, need_label=True)
    kept: list[LabelledText] = []
    for text in again:
        if isinstance(text, RowError):
            part.errors.append(text)
        else:
            kept.append(replace(by_origin[text.origin], label=text.label))
    part.texts = kept


def _labels(part: _Reading, settings: TextSettings, kind: str) -> LabelSet:
    known = settings.labels if settings.labels is not None else part.classes
    found = [text.label for text in part.texts if text.label is not None]
    if kind != REGRESSION and known is not None:  # others are refused one by one, or all together where that leaves none
        found = [label for label in found if set(names_in(label)) <= set(known)] or found
    return make_set(found, kind=kind, column=part.columns.label or "label", known=known, where=_where(part))


def _where(part: _Reading) -> str:
    return part.texts[0].origin.rpartition(":")[0] or part.texts[0].origin


def _refuse(errors: Sequence[RowError], read: int, settings: TextSettings) -> None:
    """Raise DataError for rows that the user wants to be told of rather than to lose."""
    nan = [error for error in errors if isinstance(error, NanError)]
    if nan and settings.nan_rows == "stop":
        raise DataError(
            f"data: NaN, a missing value, in {len(nan):,} of {read:,} rows:{_listed(nan)}\nCorrect or delete these rows, or set ",
            Setting("data.nan_rows"),
            " to drop, which leaves them out and counts them.",
        )
    rest = [error for error in errors if not isinstance(error, NanError)]
    if rest and settings.bad_rows == "stop":
        raise DataError(
            f"data: {len(rest):,} of {read:,} rows can't be used:{_listed(rest)}\nCorrect or delete these rows, or set ",
            Setting("data.bad_rows"),
            " to drop, which leaves them out and counts them.",
        )


def nothing_left(role: str, count: int, errors: Sequence[RowError]) -> DataError:
    """The error for a source without a row that can be used."""
    return DataError(f"{role} data: none of the {count:,} rows can be used:{_listed(errors)}")


def _listed(errors: Sequence[RowError]) -> str:
    reasons: dict[str, list[str]] = {}
    for error in errors:
        reasons.setdefault(error.reason, []).append(error.origin)
    lines = [
        f"\n  - {len(origins):,} × {reason} ({', '.join(origins[:MAX_ORIGINS])}{', …' if len(origins) > MAX_ORIGINS else ''})"
        for reason, origins in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return "".join(lines)
