"""`lorabank predict` of voices: a folder an adapter, with a WAV file a text and a table of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.data.bad_rows import NAMED, listed, refuse
from lorabank.data.files import READERS
from lorabank.data.reasons import gather
from lorabank.data.row import RowError, unread_note
from lorabank.engine.engine import Engine
from lorabank.errors import ConfigError, DataError, OutputError, closest
from lorabank.formats.files import escaped, write_files
from lorabank.tasks.speech.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES, as_wav
from lorabank.tasks.speech.left_out import left_out
from lorabank.tasks.synthesis.rows import SynthesisRow
from lorabank.tasks.synthesis.texts import texts
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.synthesis.task import SpeechSynthesis

OPTIONS = ("bad_rows",)
FILES = (*AUDIO_SUFFIXES, *UNREAD_SUFFIXES, *READERS, ".txt")
"""Suffixes of what is a file's name, and no folder's."""


def predict(task: SpeechSynthesis, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
    """Say each text by each name, into `output/NAME/0001.wav` and on, and a metadata.csv; returns what was done in a sentence.

    A file's number is its text's place. Texts that can't be said are named, and left out or refused as the option `bad_rows`
    says, or else the run's `data.bad_rows`. Raises ConfigError, OutputError and DataError before anything is said.
    """
    if unknown := [name for name in wanted.options if name not in OPTIONS]:
        raise ConfigError(f"predict: text-to-speech knows no option {unknown[0]!r}{closest(unknown[0], OPTIONS)}")
    check_output(wanted.output)
    found = texts(wanted.data, task.settings, task.processor, task.limits, wanted.max_rows, name=wanted.data_name)
    rows = {place: row for place, row in enumerate(found, 1) if isinstance(row, SynthesisRow)}
    dropped = [row for row in found if isinstance(row, RowError)]
    data = task.config.data
    refuse(dropped, len(found), replace(data, bad_rows=wanted.options.get("bad_rows") or data.bad_rows), what="texts")
    if not rows:
        raise DataError(f"{wanted.data_name}: none of {counted(len(found), 'text')} can be said:{listed(dropped, NAMED)}")
    done = 0
    for name in wanted.names:
        files: dict[str, bytes] = {}
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file_name", "transcription"])
        for place, row in rows.items():
            files[f"{place:04d}.wav"] = as_wav(task.say(engine, name, row), task.rate)
            writer.writerow([f"{place:04d}.wav", row.text])
            done += 1
            busy("saying", done, len(rows) * len(wanted.names))
        write_files(wanted.output / name, {**files, "metadata.csv": table.getvalue().encode()})
    said = f"{counted(len(rows), 'text')} said by {', '.join(wanted.names)}: {wanted.output}."
    return escaped(said + left_out(dropped) + _unread(list(rows.values())))


def _unread(rows: Sequence[SynthesisRow]) -> str:
    """Lines that name rows with columns that nobody reads; empty where there are none."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.unread:
            notes.setdefault(unread_note(row.unread), []).append(row.origin)
    return "".join(f"\n{counted(len(origins), 'text')} {note}: {gather(origins).some}" for note, origins in notes.items())


def check_output(output: Path) -> None:
    """Raise OutputError for what names a file: recordings go into a folder."""
    if output.suffix.lower() in FILES:
        raise OutputError(
            f"{output}: expected a folder, got the name of a {output.suffix} file. Text-to-speech writes a WAV file a text, such "
            f"as {output.with_suffix('') / 'default' / '0001.wav'}: name a folder, such as {output.with_suffix('')}."
        )
