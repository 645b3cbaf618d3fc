"""`SpeechRow`: a window of a recording with its labels; `make_rows`: utterances checked, cut or split, and tokenised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorabank.config.speech import SpeechConfig
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import refusal, refuse
from lorabank.data.formats import refuse_nan
from lorabank.data.row import NanError, RowError, unread_note
from lorabank.data.split import group_of
from lorabank.errors import DataError
from lorabank.tasks.speech.audio import Sound, load_sound
from lorabank.tasks.speech.doubts import doubts
from lorabank.tasks.speech.read import Utterance
from lorabank.tasks.speech.tokens import SpeechTokens
from lorabank.tasks.speech.transcripts import STEP_S, Segment, check_times, has_times, parse, plain_text, windows, with_times

KEPT_BYTES = 2**30
"""Decoded samples of a run that stay in memory (about 4½ hours at 16 kHz); further recordings are decoded again when needed."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SpeechRow:
    """At most a window of one recording, and what was said in it."""

    origin: str
    name: str
    seconds: float
    labels: tuple[int, ...]
    """Prefix, text and end; with timestamps where the transcript has them."""
    prefix: int
    """Labels at the start that are given, not learned."""
    spoken: str | None
    """Language of the recording, by name or code; None for an English-only model."""
    language: str
    """Code of the language of the transcript."""
    text: str
    """The words alone."""
    transcript: str
    """With timestamps where there are any."""
    start: float
    """Seconds into the recording at which it begins."""
    digest: str
    """Of its samples."""
    group: str
    """Rows of one group never land in two splits: those of one recording, or of one value of `data.group_by`."""
    source: Any = field(repr=False, compare=False)
    near: Path | None = field(repr=False, compare=False)
    rate: int = field(repr=False, compare=False)
    kept: np.ndarray | None = field(repr=False, compare=False)
    """Its samples; None: decoded when they are needed."""

    @property
    def size(self) -> int:
        """Whole seconds, at least one."""
        return max(1, round(self.seconds))

    @property
    def timed(self) -> bool:
        """Whether its labels have timestamps."""
        return self.transcript != self.text

    @property
    def tokens(self) -> int:
        """Labels that are learned."""
        return len(self.labels) - self.prefix

    @property
    def prompt_text(self) -> str:
        """The recording's name, and where in it."""
        return self.name if not self.start else f"{self.name} from {self.start:.2f} s"

    @property
    def reference(self) -> str:
        """What was said, for people."""
        return self.transcript

    @property
    def content(self) -> object:
        """What training depends on."""
        return (self.digest, self.labels, self.prefix)

    def samples(self) -> np.ndarray:
        """float32 samples (S,) at the model's rate. Raises DataError where a recording has changed or gone since it was read."""
        if self.kept is not None:
            return self.kept
        try:
            sound = load_sound(self.source, self.rate, near=self.near)
        except RowError as error:
            raise DataError(f"{self.origin}: {self.name}: {error.reason}; it could be read when the run began") from error
        found = _slice(sound, self.start, self.start + self.seconds)
        if _digest(found) != self.digest:
            raise DataError(f"{self.origin}: {self.name}: its samples have changed since the run began. Start the run again.")
        return found


@dataclass(kw_only=True)
class Rows:
    """What utterances became."""

    rows: list[SpeechRow] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    """What was left out: the row, and the recording's name."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What the user should look at, and the recordings that it is about."""
    changes: Counter[str] = field(default_factory=Counter)
    """What was done to recordings, and to how many."""


def make_rows(
    utterances: Sequence[Utterance],
    config: SpeechConfig,
    tokens: SpeechTokens,
    rate: int,
    *,
    data: DataConfig,
    kept_bytes: int = KEPT_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> Rows:
    """Decode, check and tokenise every utterance. What can't be used is in `errors`, with its reason.

    Raises DataError, naming the recordings, where `data.bad_rows` or `config.long_audio` is `stop`.
    """
    found = Rows()
    too_long: list[RowError] = []
    others: list[RowError] = []
    room = kept_bytes
    for utterance in utterances:
        try:
            made = _rows_of(utterance, config, tokens, rate, data.group_by, found.notes, found.changes)
        except RowError as error:
            (too_long if isinstance(error, TooLongError) else others).append(_named(error, utterance))
            found.errors.append(_named(error, utterance))
        else:
            for row in made:
                size = 0 if row.kept is None else row.kept.nbytes
                room -= size
                found.rows.append(row if room >= 0 else replace(row, kept=None))
        progress()
    refuse(others, len(utterances), data, what="recordings")
    if too_long and config.long_audio == "stop":
        ways = "drop, which leaves them out and counts them, or to cut or split"
        raise refusal(too_long, len(utterances), "speech.long_audio", ways, what="recordings")
    return found


def _named(error: RowError, utterance: Utterance) -> RowError:
    """The error with the recording's name beside its row."""
    return NanError(error.column, utterance.place) if isinstance(error, NanError) else RowError(error.reason, utterance.place)


class TooLongError(RowError):
    """A recording is longer than the window, and isn't to be cut or split."""

    def at(self, origin: str) -> TooLongError:
        """The same with the row's origin filled in."""
        return self if self.origin else TooLongError(self.reason, origin)


def _rows_of(
    utterance: Utterance,
    config: SpeechConfig,
    tokens: SpeechTokens,
    rate: int,
    group_by: str | None,
    notes: dict[str, list[str]],
    changes: Counter[str],
) -> list[SpeechRow]:
    if utterance.fault is not None:
        raise utterance.fault
    if not utterance.text.strip():
        raise RowError("there is no transcript")
    segments = parse(utterance.text)
    if not plain_text(segments):
        raise RowError("there is no transcript")
    if not has_times(segments) and config.timestamps == "keep":
        raise RowError("the transcript has no timestamps, and speech.timestamps is keep")
    sound = utterance.sound(rate)
    changes.update(changes_of(sound, rate))
    if has_times(segments):
        check_times(segments, sound.seconds)
    if group_by is not None:
        refuse_nan((utterance.values or {}).get(group_by), group_by)
    group = group_of(utterance.values or {}, group_by, utterance.origin)
    group = _digest(sound.samples_S) if group is None else group
    rows = [
        _row(utterance, sound, start, end, part, config, tokens, group)
        for start, end, part in _parts(sound, segments, config, utterance, notes)
    ]
    unread = tuple(name for name in utterance.unread if name != group_by)
    for note in [*doubts(utterance.text, sound), *([unread_note(unread)] if unread else [])]:
        notes.setdefault(note, []).append(utterance.place)
    return rows


def changes_of(sound: Sound, rate: int) -> list[str]:
    """What was done to a recording before it was heard."""
    resampled = [f"resampled from {sound.source_rate:,} to {rate:,} Hz"] if sound.source_rate != rate else []
    return resampled + ([f"{sound.source_channels} channels averaged to one"] if sound.source_channels > 1 else [])


def _parts(
    sound: Sound, segments: Sequence[Segment], config: SpeechConfig, utterance: Utterance, notes: dict[str, list[str]]
) -> Sequence[tuple[float, float, Sequence[Segment]]]:
    """(start, end, segments) of what a recording is used as: the whole of it, or windows."""
    if sound.seconds <= config.window + STEP_S:  # resampling may have added a sample or two, which are cut off
        return [(0.0, min(sound.seconds, config.window), segments)]
    if config.long_audio in ("drop", "stop"):
        raise TooLongError(f"the recording is longer than the window of {config.window:g} s")
    if config.long_audio == "cut" and not has_times(segments):
        note = f"cut to {config.window:g} s; the transcript was kept whole, since no timestamp says what is heard by then"
        notes.setdefault(note, []).append(utterance.name)
        return [(0.0, config.window, segments)]
    try:
        parts = windows(segments, sound.seconds, config.window)
    except RowError as error:
        raise TooLongError(f"the recording is longer than the window of {config.window:g} s, and {error.reason}") from error
    done = "cut" if config.long_audio == "cut" else "split"
    notes.setdefault(f"longer than {config.window:g} s: {done} between timestamps", []).append(utterance.name)
    return parts[:1] if config.long_audio == "cut" else parts


def _row(
    utterance: Utterance,
    sound: Sound,
    start: float,
    end: float,
    segments: Sequence[Segment],
    config: SpeechConfig,
    tokens: SpeechTokens,
    group: str,
) -> SpeechRow:
    timed = has_times(segments) and config.timestamps != "drop"
    if not timed:
        segments = [Segment(plain_text(segments))]
    language = utterance.language or config.language
    if utterance.language is not None and not tokens.knows(utterance.language):
        raise RowError(f"its language {utterance.language!r} is none that this model knows")
    labels, prefix = tokens.labels(segments, language, config.task)
    samples = _slice(sound, start, end)
    return SpeechRow(
        origin=utterance.origin,
        name=utterance.name,
        seconds=len(samples) / sound.rate,
        labels=labels,
        prefix=prefix,
        spoken=language,
        language="en" if config.task == "translate" else tokens.code(language),
        text=plain_text(segments),
        transcript=with_times(segments) if timed else plain_text(segments),
        start=start,
        digest=_digest(samples),
        group=group,
        source=utterance.audio,
        near=utterance.near,
        rate=sound.rate,
        kept=samples,
    )


def _slice(sound: Sound, start: float, end: float) -> np.ndarray:
    return sound.samples_S[round(start * sound.rate) : round(end * sound.rate)]


def _digest(samples: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(samples).tobytes(), digest_size=16).hexdigest()
