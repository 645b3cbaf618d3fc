"""Where recordings and transcripts come from: audio folders, tables, `datasets` objects → `Utterance`s with their origin.

An audio folder holds recordings and a `metadata.csv` (or `.jsonl`) with the columns file_name and transcription, as in
`datasets`; the folder's folders may have their own. Recordings are only named here: `audio.py` decodes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.config.speech import SpeechConfig
from lorabank.data.files import READERS
from lorabank.data.formats import refuse_nan, text_of
from lorabank.data.listing import listed
from lorabank.data.read import Source, read_rows
from lorabank.data.repository import is_saved, splits_of
from lorabank.data.row import Row, RowError, typical, unusual
from lorabank.errors import DataError, MissingExtraError, Setting, closest, first_line
from lorabank.tasks.speech.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES, Sound, load_sound
from lorabank.tasks.speech.names import shown

AUDIO_COLUMNS = ("file_name", "audio", "path", "file", "audio_path", "audio_filepath", "wav")
TEXT_COLUMNS = ("transcription", "text", "sentence", "transcript", "normalized_text")
LANGUAGE_COLUMN = "language"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "metadata.tsv", "metadata.json")


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording by name or value, and what was said in it."""

    origin: str
    """`file:line` of its row, or the recording's own path."""
    audio: Any
    """What `load_sound` takes."""
    near: Path | None
    """Folder that a relative path is below."""
    text: str
    """Its transcript; "" where there is none, or it can't be used."""
    language: str | None = None
    """What its row says."""
    name: str = ""
    """The recording's name, for people."""
    values: Mapping[str, Any] | None = None
    """Other columns of its row."""
    unread: tuple[str, ...] = ()
    """Columns of its row that most rows of its table lack, and that nobody reads."""
    fault: RowError | None = None
    """Why it can't be used, where that is known before it is decoded: its text is none, or its folder may not be read."""

    @property
    def place(self) -> str:
        """Its row, and its name beside it."""
        return self.origin if self.name == self.origin else f"{self.origin}, {self.name}"

    def sound(self, rate: int) -> Sound:
        """Its samples at `rate`. Raises RowError, also for its `fault`."""
        if self.fault is not None:
            raise self.fault
        if self.audio is None:
            raise RowError("the row names no recording")
        return load_sound(self.audio, rate, near=self.near)


def read_utterances(
    source: Source, config: SpeechConfig, *, limit: int | None = None, role: str = "train", with_text: bool = True
) -> list[Utterance]:
    """Every utterance of `source`, at most `limit` of each file.

    `with_text` False: recordings to transcribe; a folder without metadata, or a recording, will do then. Raises DataError for a
    source that is missing, malformed or empty, or without the columns.
    """
    if isinstance(source, str | Path):
        found = list(_from_name(str(source), config, limit, role, with_text))
    else:
        found = _from_rows(read_rows(_undecoded(source), limit=limit, role=role), config, None, with_text)
    if not found:
        raise DataError(f"{source}: expected at least one recording, got none")
    return found


def _from_name(name: str, config: SpeechConfig, limit: int | None, role: str, with_text: bool) -> Iterator[Utterance]:
    path = expanded(name, place=f"data.{role}", kind=DataError)
    if path.is_file() and path.suffix.lower() in (*AUDIO_SUFFIXES, *UNREAD_SUFFIXES):
        if with_text:
            raise DataError(
                f"{path}: a recording has no transcript. Give a table with columns {AUDIO_COLUMNS[0]} and {TEXT_COLUMNS[0]}, or "
                "a folder that holds one as metadata.csv."
            )
        yield _recording(path, path.name)
    elif path.is_dir() and not is_saved(path):
        splits = splits_of(path, loose=AUDIO_SUFFIXES)
        if splits is None or not (with_text or splits.in_tables):  # recordings to transcribe are all there are
            yield from _from_folder(path, config, limit, with_text)
            return
        part = splits.part(role)
        if not part.tables:
            yield from _from_folder(part.folder, config, limit, with_text)
        rows = [row for table in part.tables for row in read_rows(table, limit=limit)]
        yield from _from_rows(rows, config, part.folder, with_text)
    elif path.is_file():
        yield from _from_rows(read_rows(path, limit=limit, role=role), config, path.parent, with_text)
    else:
        yield from _from_rows(read_rows(_dataset(name, path, role), limit=limit, role=role), config, None, with_text)


def _from_folder(folder: Path, config: SpeechConfig, limit: int | None, with_text: bool) -> Iterator[Utterance]:
    files, closed = _files_below(folder)
    tables = [path for path in files if path.name in METADATA]
    for table in tables:
        yield from _from_rows(read_rows(table, limit=limit), config, table.parent, with_text)
    if tables:
        yield from closed
        return
    known = (*AUDIO_SUFFIXES, *UNREAD_SUFFIXES)
    recordings = [path for path in files if path.suffix.lower() in known and not path.name.startswith(".")]
    if with_text or not (recordings or closed):
        there = ", ".join([path.name for path in listed(folder)[:5]]) or "nothing"
        unread = f"; {', '.join(each.name for each in closed)} can't be read" if closed else ""
        raise DataError(
            f"{folder}: expected a metadata.csv (or {', '.join(METADATA[1:])}) with columns {AUDIO_COLUMNS[0]} and "
            f"{TEXT_COLUMNS[0]}, found {there}{unread}"
            if with_text
            else f"{folder}: expected recordings ({' '.join(AUDIO_SUFFIXES)}), found {there}"
        )
    for path in islice(recordings, limit):
        yield _recording(path, str(path.relative_to(folder)))
    yield from closed


def _recording(path: Path, name: str) -> Utterance:
    return Utterance(origin=shown(str(path)), audio=path, near=None, text="", name=shown(name))


def _files_below(folder: Path) -> tuple[list[Path], list[Utterance]]:
    """Every file, sorted, and what stands for each folder that may not be read."""
    errors: list[OSError] = []
    files = sorted(Path(at) / name for at, _, names in os.walk(folder, onerror=errors.append) for name in names)
    return files, [_closed(folder, error) for error in errors]


def _closed(folder: Path, error: OSError) -> Utterance:
    where = Path(error.filename)
    name = f"{shown(str(where.relative_to(folder)))}{os.sep}"
    fault = RowError(f"a folder can't be read ({error.strerror})")
    return Utterance(origin=shown(str(where)), audio=None, near=None, text="", name=name, fault=fault)


def _from_rows(rows: Sequence[Row], config: SpeechConfig, near: Path | None, with_text: bool) -> list[Utterance]:
    if not rows:
        return []
    usual = typical(rows)
    audio = _column(usual, config.audio_column, AUDIO_COLUMNS, "recording", "speech.audio_column")
    text = _column(usual, config.text_column, TEXT_COLUMNS, "transcript", "speech.text_column") if with_text else None
    return [_utterance(row, audio, text, near, unusual(row, usual, (LANGUAGE_COLUMN,))) for row in rows]


def _utterance(row: Row, audio: str, text: str | None, near: Path | None, unread: tuple[str, ...]) -> Utterance:
    value, said, fault = row.values.get(audio), "", None
    if text is not None:
        try:
            refuse_nan(value, audio)
            said = said_in(row.values, text)
        except RowError as error:
            fault = error
    language = row.values.get(LANGUAGE_COLUMN)
    origin = shown(row.origin)
    return Utterance(
        origin=origin,
        audio=value,
        near=near,
        text=said,
        language=language if isinstance(language, str) and language.strip() else None,
        name=_name(value, origin),
        values={key: v for key, v in row.values.items() if key != audio},
        unread=unread,
        fault=fault,
    )


def said_in(values: Mapping[str, Any], column: str) -> str:
    """A column's text; "" where it is missing. Numbers are text, as of spoken digits. Raises RowError, and NanError for NaN."""
    return "" if values.get(column) is None else text_of(values, column, may_be_empty=True)


def _name(audio: Any, origin: str) -> str:
    said = audio.get("path") if isinstance(audio, Mapping) else audio
    return shown(str(said)) if isinstance(said, str | Path) and str(said) else origin


def _column(row: Row, wanted: str | None, known: Sequence[str], what: str, setting: str) -> str:
    if wanted is not None:
        if wanted not in row.values:
            raise DataError(f"{row.origin}: no column {wanted!r}{closest(wanted, row.values)}; there are {', '.join(row.values)}")
        return wanted
    found = next((name for name in known if name in row.values), None)
    if found is None:
        raise DataError(
            f"{row.origin}: expected a column with the {what} ({', '.join(known)}), got {', '.join(row.values)}. "
            f"Name it with {setting}."
        )
    return found


def _dataset(name: str, path: Path, role: str) -> Any:
    """A `datasets` object by its id, or saved in a folder, with its recordings left as bytes."""
    from lorabank.data.read import check_source

    check_source(name, place=f"data.{role}")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"data set {name!r}: needs the datasets library: pip install datasets") from error
    parts = [*name.split(":"), "", ""]
    try:
        loaded: Any = (
            datasets.load_from_disk(str(path))
            if path.is_dir()
            else datasets.load_dataset(parts[0], parts[1] or None, split=parts[2] or None)
        )
    except Exception as error:  # network, hub, builder: the library raises many kinds
        reason = first_line(error)
        raise DataError(
            Setting(f"data.{role}"),
            f": {name!r} is no file here, and no data set that can be loaded: {reason}. Expected an audio folder, a "
            f"table ({' '.join(READERS)}), or a data set id (name or name:config:split).",
        ) from error
    return _undecoded(loaded)


def _undecoded(source: Any) -> Any:
    """The same data set with recordings as bytes or paths: `datasets` decodes with torchcodec, which may not be here."""
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return source
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        return type(source)({split: _undecoded(part) for split, part in source.items()})
    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return source
    for column, feature in (source.features or {}).items():
        if isinstance(feature, datasets.Audio):
            source = source.cast_column(column, datasets.Audio(sampling_rate=feature.sampling_rate, decode=False))
    return source
