"""`prepare_speech`: from a configuration to rows in splits, with a report. What training, scoring and previews call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lorabank.config.speech import SpeechConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left
from lorabank.data.hold_out import hold_out, too_few
from lorabank.data.read import Source
from lorabank.data.row_report import Splits, row_report
from lorabank.data.sources import left_aside, sources_of
from lorabank.tasks.speech.audio import AUDIO_SUFFIXES
from lorabank.tasks.speech.read import read_utterances
from lorabank.tasks.speech.rows import KEPT_BYTES, Rows, SpeechRow, make_rows
from lorabank.tasks.speech.tokens import SpeechTokens

Progress = Callable[[int, int], None]
"""Called with recordings done and recordings in all."""


def prepare_speech(
    data: DataConfig,
    speech: SpeechConfig,
    tokens: SpeechTokens,
    rate: int,
    *,
    seed: int,
    train: Source | None = None,
    val: Source | None = None,
    kept_bytes: int = KEPT_BYTES,
    progress: Progress | None = None,
) -> Splits[SpeechRow]:
    """Read, decode, check, tokenise and split.

    `train` and `val` override the paths of `data`. Recordings that can't be used are counted in the report by reason, or refused,
    as `data.bad_rows` and `speech` say. Equal settings, recordings and seed give equal splits. Raises DataError and ConfigError.
    """
    sources = sources_of(data, train, val, expected="an audio folder, a table or a data set id", loose=AUDIO_SUFFIXES)
    read = {role: read_utterances(source, speech, limit=data.limit, role=role) for role, source in sources.items()}
    total, done = sum(map(len, read.values())), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    parts: dict[str, Rows] = {}
    for role, utterances in read.items():
        parts[role] = make_rows(utterances, speech, tokens, rate, data=data, kept_bytes=kept_bytes, progress=step)
        kept_bytes -= sum(row.kept.nbytes for row in parts[role].rows if row.kept is not None)
        if not parts[role].rows:
            raise nothing_left(role, len(utterances), parts[role].errors, what="recordings")
    notes: dict[str, list[str]] = {}
    for part in parts.values():
        for note, names in part.notes.items():
            notes.setdefault(note, []).extend(names)
    splits = _split(data, parts, seed, notes)
    errors = [error for part in parts.values() for error in part.errors]
    notes |= _leaks(splits)
    facts = [*_facts(splits, parts), *left_aside(sources, loose=AUDIO_SUFFIXES)]
    report = row_report(read=total, errors=errors, splits=splits, facts=facts, notes=notes, what="recordings")
    return Splits(train=splits["train"], val=splits["val"], test=splits["test"], report=report)


def _facts(splits: Mapping[str, Sequence[SpeechRow]], parts: Mapping[str, Rows]) -> list[str]:
    changes = sum((part.changes for part in parts.values()), Counter[str]())
    rows = [row for part in splits.values() for row in part]
    lengths = ", ".join(f"{_clock(sum(row.seconds for row in part))} {name}" for name, part in splits.items() if part)
    learned = sum(row.tokens for row in rows) / max(1e-9, sum(row.seconds for row in rows))
    timed = sum(row.timed for row in rows)
    times = f"; {timed:,} with timestamps" if timed else ""
    facts = [f"{lengths}; up to {max(row.seconds for row in rows):.1f} s a row, {learned:.1f} learned tokens a second{times}"]
    return facts + ["; ".join(f"{what}: {count:,}" for what, count in changes.most_common())] * bool(changes)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _leaks(splits: Mapping[str, Sequence[SpeechRow]]) -> dict[str, list[str]]:
    """Notes on recordings that are there twice."""
    seen: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, rows in splits.items():
        for row in rows:
            if row.digest in seen:
                where = "an earlier row" if seen[row.digest] == name else f"a row of {seen[row.digest]}, heard again in {name}"
                found.setdefault(f"the same samples as {where}", []).append(row.name)
            seen.setdefault(row.digest, name)
    return found


def _split(data: DataConfig, parts: dict[str, Rows], seed: int, notes: dict[str, list[str]]) -> dict[str, list[SpeechRow]]:
    """Hold rows out, those of one recording together."""
    rows = parts["train"].rows if "train" in parts else []
    by_role = {role: part.rows for role, part in parts.items()}
    held = hold_out(by_role, [row.group for row in rows], data, seed=seed, unit="recordings")
    if held.spared:
        notes[too_few("recordings")] = [row.name for row in rows]
    return held.splits
