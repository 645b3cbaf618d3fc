"""Pairs as tokens, in splits, with a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.formats import MISSING_WORD, is_missing_word
from lorabank.data.hold_out import hold_out, too_few
from lorabank.data.prepare import Progress
from lorabank.data.read import Source, read_rows
from lorabank.data.row import Row, RowError, typical
from lorabank.data.row_report import Splits, in_two_splits, row_report
from lorabank.data.sources import left_aside, main_part, sources_of
from lorabank.tasks.seq2seq.pairs import Pair, PairReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One row as a model takes it."""

    input_ids: tuple[int, ...]
    """Of the source, prefix and special tokens included, cut to `max_length`."""
    target_ids: tuple[int, ...]
    """Of the target, special tokens included, cut to `max_target_length`; empty for a row that is only predicted."""
    pair: Pair
    cut: tuple[str, ...]
    """Which of `source` and `target` lost tokens."""

    @property
    def origin(self) -> str:
        """Where the row came from."""
        return self.pair.origin

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def prompt_text(self) -> str:
        """The source, without the prefix."""
        return self.pair.source

    @property
    def reference(self) -> str:
        """The target."""
        return self.pair.target or ""

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.input_ids, self.target_ids


def prepare_pairs(
    data: DataConfig,
    config: Seq2SeqConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    prefix: str = "",
    train: Source | None = None,
    val: Source | None = None,
    longest: int | None = None,
    progress: Progress | None = None,
) -> Splits[PairRow]:
    """Read, check, tokenise and split. `train` and `val` override the sources of `data`; `longest`: positions of the model.

    Rows that can't be used are counted in the report by reason, or refused, by `data.bad_rows`; NaN by `data.nan_rows`. Raises
    DataError and ConfigError.
    """
    sources = sources_of(data, train, val)
    raw = {role: read_rows(source, limit=data.limit, role=role) for role, source in sources.items()}
    read, done = sum(map(len, raw.values())), 0
    errors: dict[str, list[RowError]] = {}
    parts: dict[str, list[PairRow]] = {}
    facts: list[str] = []
    for role, rows in raw.items():
        pairs, reader = read_pairs(rows, data, config)
        errors[role] = [pair for pair in pairs if isinstance(pair, RowError)]
        facts = facts or [reader.described, *([f"before every source: {prefix!r}"] if prefix else [])]
        kept = [pair for pair in pairs if isinstance(pair, Pair)]
        parts[role] = []
        for start in range(0, len(kept), _BATCH):
            part = kept[start : start + _BATCH]
            parts[role] += encode_pairs(part, data, config, tokenizer, prefix=prefix, longest=longest)
            if progress is not None:
                progress(done + min(start + _BATCH, len(kept)), read)
        done += len(rows)
    refuse([error for found in errors.values() for error in found], read, data)
    for role, rows in raw.items():
        if not parts[role]:
            raise nothing_left(role, len(rows), errors[role])
    splits, notes = _split(parts, data, seed)
    notes |= {f"{text} cut to {_limit(text, data, config, longest)} tokens": _cut(splits, text) for text in ("source", "target")}
    notes |= in_two_splits(splits, lambda row: row.pair.source, "source")
    rows = [row.pair for part in splits.values() for row in part]
    notes |= {MISSING_WORD: [pair.origin for pair in rows if is_missing_word(pair.source) or is_missing_word(pair.target)]}
    report = row_report(
        read=read,
        errors=[error for found in errors.values() for error in found],
        splits=splits,
        facts=[*filter(None, facts), _lengths(splits[main_part(parts)]), *left_aside(sources)],
        notes={note: origins for note, origins in notes.items() if origins},
    )
    return Splits(train=splits["train"], val=splits["val"], test=splits["test"], report=report)


def read_pairs(
    rows: Sequence[Row], data: DataConfig, config: Seq2SeqConfig, *, need_target: bool = True
) -> tuple[list[Pair | RowError], PairReader]:
    """Each row's texts, or why it can't be used, in order; and what read them."""
    reader = PairReader(data, config, typical(rows), need_target=need_target)
    found: list[Pair | RowError] = []
    for row in rows:
        try:
            found.append(reader(row))
        except RowError as error:
            found.append(error)
    return found, reader


def encode_pairs(
    pairs: Sequence[Pair],
    data: DataConfig,
    config: Seq2SeqConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str = "",
    longest: int | None = None,
) -> list[PairRow]:
    """Token ids, in order. Longer texts are cut at their end, special tokens kept."""
    limits = {text: _limit(text, data, config, longest) for text in ("source", "target")}
    texts: dict[str, list[str]] = {"source": [prefix + pair.source for pair in pairs]}
    targets = [pair.target for pair in pairs if pair.target is not None]
    coded = {"source": _ids(tokenizer, limits["source"], text=texts["source"])}
    if targets:
        coded["target"] = _ids(tokenizer, limits["target"], text_target=targets)
    rows = []
    for i, pair in enumerate(pairs):
        ids = {text: found[i] for text, found in coded.items()}
        cut = tuple(text for text, (_, was_cut) in ids.items() if was_cut)
        target = ids["target"][0] if "target" in ids else ()
        rows.append(PairRow(input_ids=ids["source"][0], target_ids=target, pair=pair, cut=cut))
    return rows


def _ids(tokenizer: Any, limit: int, **texts: list[str]) -> list[tuple[tuple[int, ...], bool]]:
    """(ids, whether they were cut) of each text."""
    whole = tokenizer(**texts, verbose=False)["input_ids"]
    found = []
    for i, ids in enumerate(whole):
        if len(ids) <= limit:
            found.append((tuple(ids), False))
            continue
        (only,) = (values[i] for values in texts.values())
        shorter = tokenizer(**dict.fromkeys(texts, only), truncation=True, max_length=limit, verbose=False)["input_ids"]
        found.append((tuple(shorter), True))
    return found


def _limit(text: str, data: DataConfig, config: Seq2SeqConfig, longest: int | None) -> int:
    wanted = data.max_length if text == "source" else config.max_target_length
    return min(wanted, longest or wanted)


def _split(
    parts: Mapping[str, list[PairRow]], data: DataConfig, seed: int
) -> tuple[dict[str, list[PairRow]], dict[str, list[str]]]:
    """Hold rows out, equal sources together."""
    rows = parts.get("train", [])
    keys = [row.pair.source if data.group_by is None else str(row.pair.group) for row in rows]
    held = hold_out(parts, keys, data, seed=seed, unit="sources")
    return held.splits, {too_few("rows"): [row.origin for row in rows]} if held.spared else {}


def _cut(splits: Mapping[str, Sequence[PairRow]], text: str) -> list[str]:
    return [row.origin for rows in splits.values() for row in rows if text in row.cut]


def _lengths(rows: Sequence[PairRow]) -> str:
    lengths = {"sources": sorted(len(row.input_ids) for row in rows), "targets": sorted(len(row.target_ids) for row in rows)}
    told = [f"{what} up to {found[-1]:,}, half below {found[len(found) // 2] + 1:,}" for what, found in lengths.items()]
    return f"tokens: {'; '.join(told)}"
