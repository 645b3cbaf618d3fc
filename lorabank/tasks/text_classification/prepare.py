"""`prepare_texts`: from sources to labelled token rows in splits, with a report.

What can't be used is named and counted, and left out or refused as the user chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorabank.config.classification import ClassificationConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.formats import MISSING_WORD, is_missing_word
from lorabank.data.prepare import Progress
from lorabank.data.read import Source, read_rows
from lorabank.data.row import Row, RowError, typical, unread_note, unusual
from lorabank.data.row_report import RowReport, in_two_splits, row_report
from lorabank.data.sources import left_aside, main_part, sources_of
from lorabank.errors import DataError, Setting, closest
from lorabank.tasks.text_classification.columns import Columns, find_columns
from lorabank.tasks.text_classification.labels import (
    MULTI,
    REGRESSION,
    SINGLE,
    Label,
    LabelSet,
    find_kind,
    is_number,
    make_set,
    names_in,
    shown,
)
from lorabank.tasks.text_classification.rows import ClassRow, LabelledText, encode, texts_of
from lorabank.tasks.text_classification.splits import label_notes, split_texts
from lorabank.tasks.text_classification.texts_a_row import TWO, texts_of_rows
from lorabank.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_LABELS = 8


@dataclass(frozen=True, kw_only=True)
class PreparedTexts:
    """Rows ready to be batched, in the order of their sources."""

    train: list[ClassRow]
    val: list[ClassRow]
    test: list[ClassRow]
    labels: LabelSet
    """Found in the rows; of rows that are only scored, the first that was given."""
    report: RowReport


@dataclass
class _Reading:
    """What was read of one source so far."""

    columns: Columns
    texts: list[LabelledText]
    classes: Sequence[str] | None
    errors: list[RowError] = field(default_factory=list)


def prepare_texts(
    data: DataConfig,
    columns: ClassificationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    train: Source | None = None,
    val: Source | None = None,
    max_length: int | None = None,
    known: Sequence[LabelSet] = (),
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> PreparedTexts:
    """Read, label, tokenise and split. `train` and `val` override the sources of `data`.

    `max_length`: what the model has positions for; rows are cut to that or `data.max_length`. `known`: label sets of trained
    heads, one of which a row must suit; empty: the labels are found in the training rows. `names`: labels in the order of the
    model's own head, taken where the rows have no others. Rows that can't be used (an empty text, no label, a label that the head
    lacks) are counted in the report by reason, or refused, by `data.bad_rows`; NaN by `data.nan_rows`. Raises DataError and
    ConfigError.
    """
    sources = sources_of(data, train, val)
    raw = {role: read_rows(source, limit=data.limit, role=role) for role, source in sources.items()}
    main = main_part(raw)
    kinds = {labels.kind for labels in known} or ({columns.kind} - {"auto"})
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    parts = {role: _read(rows, columns, kind, data.group_by) for role, rows in raw.items()}
    if kind is None:
        _refuse_some_numbers(parts[main])
        kind = find_kind(text.label for text in parts[main].texts if text.label is not None)
        for part, rows in zip(parts.values(), raw.values(), strict=True):
            _settle(part, rows, kind)
    read = sum(map(len, raw.values()))
    for role, part in parts.items():
        if not part.texts:
            raise nothing_left(role, len(raw[role]), part.errors)
    labels = known[0] if known else _labels(parts[main], columns.labels or names, kind, given=columns.labels is not None)
    longest = min(data.max_length, max_length or data.max_length)
    coded: dict[str, list[ClassRow]] = {}
    for done, (role, part) in enumerate(parts.items(), start=1):
        found = encode(part.texts, tokenizer, max_length=longest, labels=known or [labels])
        coded[role] = [row for row in found if isinstance(row, ClassRow)]
        part.errors += [row for row in found if isinstance(row, RowError)]
        if progress is not None:
            progress(done, len(parts))
    errors = [error for part in parts.values() for error in part.errors]
    refuse(errors, read, data)
    for role, part in parts.items():
        if not coded[role]:
            raise nothing_left(role, len(raw[role]), part.errors)
    splits, notes = split_texts(coded, data, seed=seed)
    rows = [row for part in splits.values() for row in part]
    notes |= {f"cut to {longest} tokens": [row.origin for row in rows if row.truncated]}
    notes |= _other_texts(splits, main) | _unread(raw.values(), data.group_by)
    notes |= {MISSING_WORD: [row.origin for row in rows if any(map(is_missing_word, _texts_in(row)))]}
    notes |= in_two_splits(splits, lambda row: row.source.key, "text")
    notes |= {"same text, another label": _contradictions(rows), **({} if known else label_notes(splits[main], labels))}
    report = row_report(
        read=read,
        errors=errors,
        splits=splits,
        facts=[*_facts(parts[main].columns, splits[main], labels, trained=main == "train"), *left_aside(sources)],
        notes={note: origins for note, origins in notes.items() if origins},
    )
    return PreparedTexts(train=splits["train"], val=splits["val"], test=splits["test"], labels=labels, report=report)


def _other_texts(splits: Mapping[str, Sequence[ClassRow]], main: str) -> dict[str, list[str]]:
    """Note on the rows that are pairs where those of `main` are single texts, or the other way round."""
    texts = texts_of_rows(splits[main])
    what = "single texts, and the others are pairs" if texts == TWO else "pairs of texts, and the others are single"
    return {what: [row.origin for own in splits.values() for row in own if texts_of_rows([row]) != texts]}


def _unread(parts: Iterable[Sequence[Row]], group_by: str | None) -> dict[str, list[str]]:
    """Notes on columns that most rows of a source lack: what is read was told by those."""
    notes: dict[str, list[str]] = {}
    for rows in parts:
        usual = typical(rows)
        for row in rows:
            if columns := unusual(row, usual, (group_by,)):
                notes.setdefault(unread_note(columns), []).append(row.origin)
    return notes


def _texts_in(row: ClassRow) -> Sequence[str | None]:
    """The texts of a row and of its label."""
    return [row.source.text, row.source.pair, *names_in(row.label)]


# ---- labels ---------------------------------------------------------------------------------------------------------


def _read(rows: Sequence[Row], wanted: ClassificationConfig, kind: str | None, group_by: str | None) -> _Reading:
    usual = typical(rows)
    columns = find_columns(usual.values, text=wanted.text, pair=wanted.text_pair, label=wanted.label, origin=usual.origin)
    found = texts_of(rows, columns, kind=kind, need_label=True, group_by=group_by)
    texts = [text for text in found if isinstance(text, LabelledText)]
    classes = rows[0].classes.get(columns.label or "")
    return _Reading(columns, texts, classes, [error for error in found if isinstance(error, RowError)])


def _refuse_some_numbers(part: _Reading) -> None:
    """Raise DataError where most labels are numbers, some with a fraction, and others aren't: a slip makes names of them all."""
    single = [text for text in part.texts if isinstance(text.label, str | float)]
    others = [text for text in single if not is_number(text.label)]
    fractions = any(isinstance(text.label, float) and not text.label.is_integer() for text in single)
    if fractions and others and 2 * len(others) < len(single):
        named = ", ".join(f"{text.label!r} ({text.origin})" for text in others[:SHOWN_LABELS])
        raise DataError(
            f"column {part.columns.label!r}: {len(single) - len(others):,} of its labels are numbers, some with a fraction, and "
            f"{len(others):,} {'is' if len(others) == 1 else 'are'} not: {named}{', …' if len(others) > SHOWN_LABELS else ''}. "
            "Correct or delete them; or set ",
            Setting("classification.kind"),
            " to regression, which counts them as bad rows, or to single, where each number in quotes is a label.",
        )


def _settle(part: _Reading, rows: Sequence[Row], kind: str) -> None:
    """Read labels again, now that their kind is known: numbers with a fraction among names are names no more."""
    if kind == SINGLE and not any(isinstance(text.label, float) for text in part.texts):
        return
    if kind == MULTI and all(isinstance(text.label, tuple) for text in part.texts):
        return
    by_origin = {text.origin: text for text in part.texts}
    again = texts_of([row for row in rows if row.origin in by_origin], part.columns, kind=kind, need_label=True)
    part.errors += [text for text in again if isinstance(text, RowError)]
    part.texts = [replace(by_origin[text.origin], label=text.label) for text in again if isinstance(text, LabelledText)]


def _labels(part: _Reading, order: Sequence[str] | None, kind: str, *, given: bool) -> LabelSet:
    """`order`: the labels as the user gives them (`given`), or as the model's own head has them."""
    found = [text.label for text in part.texts if text.label is not None]
    there = {name for label in found for name in names_in(label)}
    own = order if given or (order is not None and there <= set(order)) else part.classes
    where = part.texts[0].origin.rpartition(":")[0] or part.texts[0].origin
    if kind != REGRESSION and own is not None:  # others are refused one by one, or all together where that leaves none
        kept = [label for label in found if set(names_in(label)) <= set(own)]
        if given and kind == SINGLE and len({*kept}) < 2 and len(kept) < len(found):
            raise _not_listed(found, own, where)
        found = kept or found
    return make_set(found, kind=kind, column=part.columns.label or "label", known=own, where=where)


def _not_listed(labels: Sequence[Label], listed: Sequence[str], where: str) -> DataError:
    """The rows have labels that the user's list lacks, and no two that it has."""
    counts = Counter(name for label in labels for name in names_in(label) if name not in listed)
    named = "; ".join(f"{count:,} × {name!r}{closest(name, listed)}" for name, count in counts.most_common(SHOWN_LABELS))
    return DataError(
        f"{where}: no two labels of the list are there, and others are: {named}. The list, ",
        Setting("classification.labels"),
        f", has {shown(listed)}.",
    )


# ---- the report -----------------------------------------------------------------------------------------------------


def _facts(columns: Columns, rows: Sequence[ClassRow], labels: LabelSet, *, trained: bool) -> list[str]:
    """Which columns were read, and how many rows each label has."""
    used = {"text": columns.text, "second text": columns.pair, "label": columns.label}
    facts = ["columns: " + ", ".join(f"{name!r} as the {part}" for part, name in used.items() if name is not None)]
    if labels.kind == REGRESSION:
        numbers = [row.label for row in rows if isinstance(row.label, float)]
        mean = sum(numbers) / max(1, len(numbers))
        return [*facts, f"numbers from {min(numbers):g} to {max(numbers):g}, mean {mean:.3g}"]
    counts = label_counts(rows, labels)
    common = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in common[:SHOWN_LABELS])
    more = f", … and {len(common) - SHOWN_LABELS} rarer ones" if len(common) > SHOWN_LABELS else ""
    facts.append(f"{counted(len(counts), 'label')}{' (any number of them a row)' if labels.kind == MULTI else ''}: {named}{more}")
    if trained and (unlearned := [name for name, count in counts.items() if not count]):
        facts.append(f"labels without a training row, never predicted rightly: {shown(unlearned)}")
    return facts


def label_counts(rows: Sequence[ClassRow], labels: LabelSet) -> dict[str, int]:
    """Rows of each label, in the head's order."""
    counts = Counter(name for row in rows for name in names_in(row.label))
    return {name: counts[name] for name in labels.names}


def _contradictions(rows: Sequence[ClassRow]) -> list[str]:
    """Rows whose text came earlier with another label."""
    seen: dict[str, object] = {}
    return [row.origin for row in rows if seen.setdefault(row.source.key, row.label) != row.label]
