"""Transcripts of recordings: one file of JSON lines or text, or subtitles beside each other in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorabank.config.train import DataConfig, TrainConfig
from lorabank.data.bad_rows import NAMED, listed, refuse
from lorabank.data.row import RowError
from lorabank.engine.engine import Engine
from lorabank.errors import ConfigError, DataError, OutputError, closest
from lorabank.formats.files import escaped, write_files
from lorabank.tasks.speech.audio import Sound
from lorabank.tasks.speech.hearing import Hearing
from lorabank.tasks.speech.left_out import left_out
from lorabank.tasks.speech.read import Utterance, read_utterances
from lorabank.tasks.speech.subtitles import WRITERS
from lorabank.tasks.speech.tokens import SpeechTokens
from lorabank.tasks.speech.transcribe import Heard, Manner, cuts, moved, transcribe
from lorabank.tasks.speech.transcripts import Segment, plain_text
from lorabank.training.evaluate import route_of
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

TIMED = (".srt", ".vtt")
JSON_LINES = ".jsonl"
PORTION_S = 1800.0
"""Seconds of audio that are decoded and transcribed together: memory doesn't grow with their number."""
OPTIONS = ("bad_rows", "beams", "language", "max_new_tokens", "timestamps")


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was heard in one recording."""

    utterance: Utterance
    seconds: float
    heard: dict[str, list[Segment]]
    """Adapter, or `base`, to its segments."""


def predict(engine: Engine, hearing: Hearing, tokens: SpeechTokens, config: TrainConfig, wanted: Prediction, busy: Busy) -> str:
    """Transcribe a recording, a folder of them, or the rows of a table, of any length; returns what was done in a sentence.

    By the output's suffix: `.jsonl` has a line a recording (name, seconds, and each adapter's text; segments with times where
    timestamps were asked for; of one that can't be read why, as `error`), `.txt`, `.srt` and `.vtt` are one adapter's transcript
    of one recording. Without a suffix it is a folder with `NAME.ADAPTER.txt`, `.srt` and `.vtt` for each. Recordings that can't
    be read are named, and left out or refused as `data.bad_rows` says.

    Raises DataError, OutputError and ConfigError before anything is transcribed.
    """
    if unknown := [name for name in wanted.options if name not in OPTIONS]:
        raise ConfigError(f"predict: unknown option {unknown[0]!r}{closest(unknown[0], OPTIONS)}")
    speech, suffix = config.speech, wanted.output.suffix.lower()
    utterances = read_utterances(wanted.data, speech, limit=wanted.max_rows, role="test", with_text=False)[: wanted.max_rows]
    _check_output(wanted, suffix, len(utterances))
    language = wanted.options.get("language") or speech.language
    _check_languages(utterances, language, tokens)
    timed = bool(wanted.options.get("timestamps")) or suffix in (*TIMED, "") or speech.timestamps == "keep"
    manner = Manner(
        task=speech.task,
        beams=int(wanted.options.get("beams") or speech.beams),
        max_new_tokens=int(wanted.options.get("max_new_tokens") or tokens.longest),
        batch_size=wanted.batch_size,
    )
    data = replace(config.data, bad_rows=wanted.options.get("bad_rows") or config.data.bad_rows)
    if data.bad_rows == "stop":
        _check_all(utterances, hearing.rate, data, busy)
    found: dict[int, Transcript] = {}
    dropped: dict[int, RowError] = {}
    for sounds in _portions(utterances, hearing.rate, dropped):
        hearing.forget()

        def told(at: int, of: int, done: int = len(found) + len(dropped), part: int = len(sounds)) -> None:
            busy("transcribing", min(len(utterances) - 1, done + part * at // of), len(utterances))

        found |= _transcripts(engine, hearing, tokens, language, wanted.names, sounds, manner, timed, told)
    busy("transcribing", len(utterances), len(utterances))
    if not found:
        errors = list(dropped.values())
        raise DataError(
            f"{wanted.data_name}: none of {counted(len(utterances), 'recording')} can be read:{listed(errors, NAMED)}"
        )
    if suffix == JSON_LINES:
        rest = {place: _unread(utterances[place], wanted.names, error) for place, error in dropped.items()}
        _write_lines({place: _line(one, timed) for place, one in found.items()} | rest, wanted.output)
    else:
        _write(list(found.values()), wanted.output, suffix)
    return escaped(_told(list(found.values()), list(dropped.values()), wanted))


def _told(found: Sequence[Transcript], dropped: Sequence[RowError], wanted: Prediction) -> str:
    """What was done, and what wasn't, in a line."""
    seconds, by = sum(one.seconds for one in found), ", ".join(wanted.names)
    return f"{counted(len(found), 'recording')} ({seconds:.1f} s) transcribed by {by}: {wanted.output}.{left_out(dropped)}"


def check_output(output: Path) -> None:
    """Raise OutputError for a name that promises what isn't written."""
    known, suffix = (JSON_LINES, *WRITERS), output.suffix.lower()
    if suffix not in (*known, ""):
        raise OutputError(f"{output}: expected a name ending in {', '.join(known)}, or a folder, got {suffix!r}.")


def _check_output(wanted: Prediction, suffix: str, recordings: int) -> None:
    check_output(wanted.output)
    if suffix in WRITERS and recordings * len(wanted.names) > 1:
        raise OutputError(
            f"{wanted.output}: {suffix} holds one transcript, and there are {counted(recordings, 'recording')} "
            f"and {len(wanted.names)} "
            f"models ({', '.join(wanted.names)}). Name one with --adapters, or give a folder or a {JSON_LINES} file as output."
        )


def _check_languages(utterances: Sequence[Utterance], language: str | None, tokens: SpeechTokens) -> None:
    """Raise DataError or ConfigError for a language that the model doesn't know, or none where it needs one."""
    for one in utterances:
        if one.language is not None and not tokens.knows(one.language):
            raise DataError(f"{one.origin}: its language {one.language!r} is none that this model knows.")
    if any(one.language is None for one in utterances):
        tokens.code(language)


def _portions(
    utterances: Sequence[Utterance], rate: int, dropped: dict[int, RowError]
) -> Iterator[dict[int, tuple[Utterance, Sound]]]:
    """Recordings by their place, decoded, some PORTION_S seconds of them at a time; what can't be read goes to `dropped`."""
    held: dict[int, tuple[Utterance, Sound]] = {}
    for place, utterance in enumerate(utterances):
        try:
            held[place] = utterance, utterance.sound(rate)
        except RowError as error:
            dropped[place] = RowError(error.reason, utterance.name)
        if sum(sound.seconds for _, sound in held.values()) >= PORTION_S:
            yield held
            held = {}
    if held:
        yield held


def _check_all(utterances: Sequence[Utterance], rate: int, data: DataConfig, busy: Busy) -> None:
    """Raise DataError naming what can't be read, before anything is transcribed."""
    dropped: list[RowError] = []
    for done, utterance in enumerate(utterances, 1):
        try:
            utterance.sound(rate)
        except RowError as error:
            dropped.append(RowError(error.reason, utterance.name))
        busy("checking recordings", done, len(utterances))
    refuse(dropped, len(utterances), data, what="recordings")


def _transcripts(
    engine: Engine,
    hearing: Hearing,
    tokens: SpeechTokens,
    language: str | None,
    names: Sequence[str],
    sounds: Mapping[int, tuple[Utterance, Sound]],
    manner: Manner,
    timed: bool,
    told: Callable[[int, int], None],
) -> dict[int, Transcript]:
    jobs: list[Heard] = []
    places: list[tuple[int, str, float, float]] = []
    for number, (utterance, sound) in sounds.items():
        for start, end in cuts(sound.samples_S, sound.rate, hearing.window):
            for name in names:
                places.append((number, name, start, end))
                jobs.append(
                    Heard(
                        key=f"{number} from {start}",
                        samples=_part(sound, start, end),
                        seconds=end - start,
                        route=route_of(name),
                        language=utterance.language or language,
                        timestamps=timed,
                    )
                )
    heard = transcribe(engine, hearing, tokens, jobs, manner, told)
    found = {
        number: Transcript(utterance=utterance, seconds=sound.seconds, heard={name: [] for name in names})
        for number, (utterance, sound) in sounds.items()
    }
    for (number, name, start, end), segments in zip(places, heard, strict=True):
        found[number].heard[name] += moved(segments, start, end)
    return found


def _part(sound: Sound, start: float, end: float) -> Callable[[], np.ndarray]:
    first, last = round(start * sound.rate), round(end * sound.rate)
    return lambda: sound.samples_S[first:last]


def _write_lines(lines: Mapping[int, Mapping[str, Any]], output: Path) -> None:
    """JSON lines in the order of their places. What is no UTF-8 in a row's columns is escaped, as JSON has it."""
    text = "".join(json.dumps(lines[place], ensure_ascii=False, default=str) + "\n" for place in sorted(lines))
    write_files(output.parent, {output.name: text})


def _write(found: Sequence[Transcript], output: Path, suffix: str) -> None:
    if suffix:
        (segments,) = found[0].heard.values()
        write_files(output.parent, {output.name: WRITERS[suffix](segments, found[0].seconds).encode()})
        return
    files = {
        f"{stem}.{name}{kind}": write(segments, one.seconds).encode()
        for stem, one in zip(_stems(found), found, strict=True)
        for name, segments in one.heard.items()
        for kind, write in WRITERS.items()
    }
    write_files(output, files)


def _line(one: Transcript, timed: bool) -> dict[str, Any]:
    texts: dict[str, Any] = {name: plain_text(segments) for name, segments in one.heard.items()}
    line = _columns(one.utterance, round(one.seconds, 2), texts)
    if timed:
        line["segments"] = {
            name: [{"start": s.start, "end": s.end, "text": s.text} for s in segments] for name, segments in one.heard.items()
        }
    return line


def _unread(utterance: Utterance, names: Sequence[str], error: RowError) -> dict[str, Any]:
    return _columns(utterance, None, dict.fromkeys(names)) | {"error": error.reason}


def _columns(utterance: Utterance, seconds: float | None, texts: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in (utterance.values or {}).items() if key not in texts}
    return {"audio": utterance.name, "seconds": seconds, **rest, **texts}


def _stems(found: Sequence[Transcript]) -> list[str]:
    """A name for each recording's files; one that was taken, as by another folder's recording, gets a number."""
    stems: list[str] = []
    for one in found:
        stem = Path(one.utterance.name).stem or "recording"
        number, free = 1, stem
        while free in stems:
            number += 1
            free = f"{stem}-{number}"
        stems.append(free)
    return stems
