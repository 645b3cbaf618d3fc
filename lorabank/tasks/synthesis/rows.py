"""`SynthesisRow`: a text, how it was said (a log-mel spectrum) and by whom; `prepare`: from sources to rows in splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import nothing_left, refuse
from lorabank.data.formats import refuse_nan
from lorabank.data.hold_out import hold_out
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.row import RowError, unread_note
from lorabank.data.row_report import Splits, row_report
from lorabank.data.sources import left_aside, main_part, sources_of
from lorabank.data.split import group_of
from lorabank.tasks.speech.audio import AUDIO_SUFFIXES
from lorabank.tasks.speech.doubts import doubts
from lorabank.tasks.speech.read import Utterance, read_utterances


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model takes."""

    speaker: int
    """Numbers of a speaker's embedding."""
    text: int
    """Tokens of a text."""
    reduction: int
    """Frames that the decoder makes at once; spectra are cut to a multiple."""


@dataclass(frozen=True, kw_only=True)
class SynthesisRow:
    """One utterance."""

    origin: str
    name: str
    text: str
    input_ids: tuple[int, ...]
    mel_TM: np.ndarray = field(repr=False, compare=False)
    """fp32 log10 of mel energies, frames × bins; without frames for a text that is to be said."""
    speaker: tuple[float, ...] = field(repr=False)
    seconds: float
    digest: str
    """Of its spectrum."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Columns of its row that most rows lack, and that nobody reads."""
    group: str | None = field(default=None, compare=False)
    """Value of the column `data.group_by`, if one is set."""

    @property
    def size(self) -> int:
        """Whole seconds, at least one."""
        return max(1, round(self.seconds))

    @property
    def frames(self) -> int:
        """Of its spectrum."""
        return len(self.mel_TM)

    @property
    def prompt_text(self) -> str:
        """The text."""
        return self.text

    @property
    def reference(self) -> str:
        """The recording's name."""
        return self.name

    @property
    def content(self) -> object:
        """What training depends on."""
        return self.input_ids, self.digest, self.speaker


def prepare(
    data: DataConfig,
    config: SynthesisConfig,
    processor: Any,
    limits: Limits,
    *,
    seed: int,
    train: Source | None,
    val: Source | None,
    progress: Progress | None = None,
) -> Splits[SynthesisRow]:
    """Read, decode, make spectra, check and split. Raises DataError and ConfigError."""
    sources = sources_of(data, train, val, expected="an audio folder, a table or a data set id", loose=AUDIO_SUFFIXES)
    speech = SpeechConfig(audio_column=config.audio_column, text_column=config.text_column)
    read = {role: read_utterances(source, speech, limit=data.limit, role=role) for role, source in sources.items()}
    total, done = sum(map(len, read.values())), 0
    errors: list[RowError] = []
    notes: dict[str, list[str]] = {}
    parts: dict[str, list[SynthesisRow]] = {}
    for role, utterances in read.items():
        parts[role], before = [], len(errors)
        for utterance in utterances:
            try:
                group_by = data.group_by if role == "train" else None
                parts[role].append(_row(utterance, config, processor, limits, group_by, notes))
            except RowError as error:
                errors.append(error.at(utterance.place))
            done += 1
            if progress is not None:
                progress(done, total)
        refuse(errors[before:], len(utterances), data, what="recordings")
        if not parts[role]:
            raise nothing_left(role, len(utterances), errors[before:], what="recordings")
    splits = _split(data, parts, seed)
    lengths = ", ".join(f"{sum(row.seconds for row in part):,.1f} s {name}" for name, part in splits.items() if part)
    speakers = len({row.speaker for row in splits[main_part(parts)] if any(row.speaker)})
    facts = [lengths, f"{speakers} speakers' embeddings" if speakers else "no speakers' embeddings: zeros"]
    facts += left_aside(sources, loose=AUDIO_SUFFIXES)
    report = row_report(read=total, errors=errors, splits=splits, facts=facts, notes=notes, what="recordings")
    return Splits(train=splits["train"], val=splits["val"], test=splits["test"], report=report)


def _row(
    utterance: Utterance,
    config: SynthesisConfig,
    processor: Any,
    limits: Limits,
    group_by: str | None,
    notes: dict[str, list[str]],
) -> SynthesisRow:
    if utterance.fault is not None:
        raise utterance.fault
    ids = token_ids(utterance.text, processor, limits)
    features = processor.feature_extractor
    sound = utterance.sound(features.sampling_rate)
    if sound.seconds > config.max_seconds:
        raise RowError(f"longer than {config.max_seconds:g} s (synthesis.max_seconds)")
    made = features(audio_target=sound.samples_S, sampling_rate=features.sampling_rate, return_tensors="np")
    mel = np.asarray(made["input_values"][0], np.float32)
    mel = mel[: len(mel) // limits.reduction * limits.reduction]
    if not len(mel):
        raise RowError("too short for a spectrum")
    values = utterance.values or {}
    if group_by is not None:
        refuse_nan(values.get(group_by), group_by)
    speaker, group = speaker_of(values, config, limits), group_of(values, group_by, utterance.origin)
    unread = tuple(name for name in utterance.unread if name not in (config.speaker_column, group_by))
    for note in [*doubts(utterance.text, sound), *([unread_note(unread)] if unread else [])]:
        notes.setdefault(note, []).append(utterance.place)
    return SynthesisRow(
        origin=utterance.origin,
        name=utterance.name,
        text=utterance.text,
        input_ids=ids,
        mel_TM=mel,
        speaker=speaker,
        seconds=sound.seconds,
        digest=hashlib.blake2b(np.ascontiguousarray(mel).tobytes(), digest_size=16).hexdigest(),
        unread=unread,
        group=group,
    )


def token_ids(text: str, processor: Any, limits: Limits) -> tuple[int, ...]:
    """Tokens of a text. Raises RowError for none, and for more than the model takes."""
    if not text.strip():
        raise RowError("there is no text")
    ids = tuple(processor.tokenizer(text.strip())["input_ids"])
    if len(ids) > limits.text:
        raise RowError(f"its text has more than the model's {limits.text} tokens")
    return ids


def speaker_of(values: Mapping[str, Any], config: SynthesisConfig, limits: Limits) -> tuple[float, ...]:
    """A row's speaker, zeros where there is none. Raises RowError for what is no embedding of the model's."""
    given = values.get(config.speaker_column)
    if given is None:
        return (0.0,) * limits.speaker
    try:
        numbers = np.asarray(given, np.float64).reshape(-1) if isinstance(given, list | tuple | np.ndarray) else np.zeros(0)
    except (ValueError, TypeError, OverflowError):
        numbers = np.zeros(0)
    if len(numbers) != limits.speaker or not (np.abs(numbers) <= np.finfo(np.float32).max).all():
        raise RowError(f"column {config.speaker_column!r}: expected {limits.speaker} numbers, the speaker's embedding")
    return tuple(numbers.tolist())


def _split(data: DataConfig, parts: Mapping[str, list[SynthesisRow]], seed: int) -> dict[str, list[SynthesisRow]]:
    keys = [row.digest if row.group is None else row.group for row in parts.get("train", ())]
    return hold_out(parts, keys, data, seed=seed, unit="recordings").splits
