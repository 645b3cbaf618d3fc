"""`LabelledText`: rows of text classification, read from columns, checked, tokenised and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabank.config.classification import ClassificationConfig
from lorabank.config.train import DataConfig
from lorabank.data.prepare import Progress
from lorabank.data.read import Source, read_rows
from lorabank.data.row import Row, RowError
from lorabank.data.row_report import Splits, row_report
from lorabank.data.split import split_rows
from lorabank.errors import DataError, closest

TEXTS = ("text", "sentence", "sentence1", "premise", "question", "question1", "content")
"""Columns that a text is looked for in, in this order."""
PAIRS: Mapping[str, tuple[str, ...]] = {
    "sentence1": ("sentence2",),
    "premise": ("hypothesis",),
    "question": ("sentence", "passage"),
    "question1": ("question2",),
    "text": ("text_pair",),
}
"""Column of the first text to those of the second."""
LABELS = ("label", "labels")


@dataclass(frozen=True)
class LabelledText:
    """One row."""

    text: str
    pair: str | None
    label: str | None
    """The label's name, or the number as text; None where it isn't known (`predict`)."""
    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None
    origin: str

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def prompt_text(self) -> str:
        """The text, or both."""
        return self.text if self.pair is None else f"{self.text} | {self.pair}"

    @property
    def reference(self) -> str:
        """The label."""
        return "" if self.label is None else self.label

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.input_ids, self.token_type_ids, self.label


def prepare(
    config: DataConfig,
    columns: ClassificationConfig,
    tokenizer: Any,
    *,
    seed: int,
    train: Source | None,
    val: Source | None,
    labelled: bool = True,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Splits[LabelledText]:
    """Read, check, tokenise and split. `names`: of labels that come as numbers (a head's own)."""
    sources = {"train": config.train if train is None else train, "val": config.val if val is None else val, "test": config.test}
    if sources["train"] is None:
        raise DataError("no training data: set data.train to a file, a folder or a data set id, or pass the rows themselves")
    raw = {role: read_rows(source, limit=config.limit, role=role) for role, source in sources.items() if source is not None}
    total, done = sum(map(len, raw.values())), 0
    errors: list[RowError] = []
    parts: dict[str, list[LabelledText]] = {}
    cut: list[str] = []
    for role, rows in raw.items():
        found = _columns(columns, rows[0], labelled=labelled)
        parts[role] = []
        for row in rows:
            try:
                made, was_cut = _row(row, found, tokenizer, config.max_length, names)
                parts[role].append(made)
                cut += [made.origin] if was_cut else []
            except RowError as error:
                errors.append(error.at(row.origin))
            done += 1
            if progress is not None and (done % 256 == 0 or done == total):
                progress(done, total)
        if not parts[role]:
            raise DataError(f"{role} data: none of the {len(rows):,} rows can be used: {errors[-1]}")
    splits = _split(config, parts, seed)
    counts = Counter(row.label for row in splits["train"] if row.label is not None)
    notes: dict[str, list[str]] = {"cut to data.max_length": cut} if cut else {}
    lone = [row.origin for row in splits["train"] if row.label is not None and counts[row.label] == 1]
    if lone and len(counts) > 1 and len(lone) < len(splits["train"]):
        notes["labels that a single training row has"] = lone
    return Splits(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        report=row_report(read=total, errors=errors, splits=splits, facts=_facts(counts), notes=notes),
    )


def _facts(counts: Counter[str]) -> list[str]:
    if not counts or len(counts) > 200:
        return []
    shown = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(8))
    return [f"{len(counts)} labels in training: {shown}{', …' if len(counts) > 8 else ''}"]


def _split(config: DataConfig, parts: Mapping[str, list[LabelledText]], seed: int) -> dict[str, list[LabelledText]]:
    rows = parts["train"]
    val = 0 if "val" in parts else config.val_split
    test = 0 if "test" in parts else config.test_split
    keys = [f"{row.text}\0{row.pair}" for row in rows]
    if val == DataConfig.val_split and len(set(keys)) == 1:
        val = 0
    split = split_rows(keys, val=val, test=test, seed=seed)
    held = {"val": split.val, "test": split.test}
    return {
        "train": [rows[i] for i in split.train],
        **{role: parts[role] if role in parts else [rows[i] for i in held[role]] for role in ("val", "test")},
    }


@dataclass(frozen=True)
class _Columns:
    text: str
    pair: str | None
    label: str | None


def _columns(wanted: ClassificationConfig, row: Row, *, labelled: bool) -> _Columns:
    known = list(row.values)

    def one(setting: str, name: str | None, usual: Sequence[str], *, needed: bool) -> str | None:
        if name is not None and name not in known:
            raise DataError(
                f"classification.{setting}: the data has no column {name!r}{closest(name, known)}. It has: {', '.join(known)}."
            )
        found = name or next((each for each in usual if each in known), None)
        if found is None and needed:
            raise DataError(
                f"data: no column of the {setting}. It has: {', '.join(known)}. Name it with classification.{setting}."
            )
        return found

    text = one("text", wanted.text, TEXTS, needed=True) or ""
    pair = one("text_pair", wanted.text_pair, PAIRS.get(text, ()), needed=False)
    label = one("label", wanted.label, LABELS, needed=labelled) if labelled else None
    return _Columns(text, pair, label)


def _row(row: Row, columns: _Columns, tokenizer: Any, max_length: int, names: Sequence[str] | None) -> tuple[LabelledText, bool]:
    text, pair = row.values.get(columns.text), row.values.get(columns.pair) if columns.pair else None
    for name, value in ((columns.text, text), *([(columns.pair, pair)] if columns.pair else [])):
        if not isinstance(value, str):
            raise RowError(f"column {name!r} holds no text")
        if not value.strip():
            raise RowError(f"column {name!r} is empty")
    label = None if columns.label is None else _label(row.values.get(columns.label), columns.label, names)
    encoded = tokenizer(text, pair) if pair is not None else tokenizer(text)
    ids = encoded["input_ids"]
    was_cut = len(ids) > max_length
    if was_cut:
        encoded = tokenizer(text, pair, truncation=True, max_length=max_length)
        ids = encoded["input_ids"]
    types = encoded.get("token_type_ids")
    made = LabelledText(str(text), pair, label, tuple(ids), None if types is None else tuple(types), row.origin)
    return made, was_cut


def _label(value: Any, column: str, names: Sequence[str] | None) -> str:
    if value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip()):
        raise RowError(f"column {column!r} has no label")
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        return str(value)
    if isinstance(value, int) and names is not None and 0 <= value < len(names):
        return names[value]
    if isinstance(value, int) and value < 0:
        raise RowError(f"column {column!r} holds a negative label (what unlabelled rows of GLUE have)")
    return str(value)
