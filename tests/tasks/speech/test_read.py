"""From cells and folders to utterances: texts that are none, numbers as text, names of any bytes, folders that are closed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from lorabank.config.speech import SpeechConfig
from lorabank.config.train import DataConfig
from lorabank.data.row_report import Splits
from lorabank.errors import DataError
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.speech.read import read_utterances
from lorabank.tasks.speech.rows import SpeechRow
from tests.data.locked import locked
from tests.tasks.speech.tiny import RATE, WINDOW_S, tiny_tokens, tone, two_tones

ALL = DataConfig(val_split=0)
SPEECH = SpeechConfig(window=WINDOW_S)


def prepared(source: object, data: DataConfig = ALL) -> Splits[SpeechRow]:
    return prepare_speech(data, SPEECH, tiny_tokens(), RATE, seed=1, train=source)


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    """A table beside two recordings: a good row, and `rows`, which are about 1.wav."""
    two_tones(folder, 2)
    lines = [{"file_name": "0.wav", "transcription": "low"}, *({"file_name": "1.wav", **row} for row in rows)]
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return table


def test_numbers_are_text(tmp_path: Path) -> None:
    table = rows_file(tmp_path, {"transcription": 7}, {"transcription": 1.5})
    assert [row.text for row in prepared(str(table)).train] == ["low", "7", "1.5"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"transcription": "bad \ud83d end"}, "column 'transcription' holds half of a surrogate pair"),
        ({"transcription": ["a"]}, "column 'transcription': expected text, got list"),
        ({"transcription": None}, "there is no transcript"),
        ({"transcription": "a", "file_name": "x\ud83d.wav"}, "holds NUL or half of a surrogate pair"),
        ({"transcription": "a", "file_name": "a\0b.wav"}, "holds NUL or half of a surrogate pair"),
        ({"transcription": "a", "file_name": "~draft 1.wav"}, "there is no such recording"),
        ({"transcription": "a", "file_name": "UklGRiQAAABXQVZF" * 1000}, "longer than a file's may be"),
        ({"transcription": "a", "file_name": None}, "the row names no recording"),
    ],
)
def test_what_is_no_text_or_no_name_is_a_bad_row(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    table = rows_file(tmp_path, row)
    found = prepared(str(table))
    assert [kept.text for kept in found.train] == ["low"]
    (said,) = found.report.dropped
    assert reason in said
    lines = "\n".join(found.report.lines())
    assert f"{table}:2" in lines and len(lines) < 1000
    lines.encode()  # as a report is written
    assert not any(mark < " " for mark in lines if mark != "\n")
    with pytest.raises(DataError, match="1 of 2 recordings can't be used"):
        prepared(str(table), replace(ALL, bad_rows="stop"))


@pytest.mark.parametrize("column", ["transcription", "file_name", "speaker"])
def test_nan_follows_its_own_setting(column: str, tmp_path: Path) -> None:
    table = rows_file(tmp_path, {"transcription": "a", "speaker": "ann", column: float("nan")})
    table.write_text(table.read_text().replace('"low"', '"low", "speaker": "bob"'))
    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 2 recordings(.|\n)*data\.nan_rows to drop"):
        prepared(str(table), replace(ALL, group_by="speaker"))
    found = prepared(str(table), replace(ALL, nan_rows="drop", bad_rows="stop", group_by="speaker"))
    assert (len(found.train), list(found.report.dropped)) == (1, [f"column {column!r} holds NaN"])


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe4.wav")
    table = rows_file(tmp_path, {"transcription": "high", "file_name": name})
    (tmp_path / "1.wav").rename(tmp_path / name)
    row = prepared(str(table)).train[1]
    assert (row.name, row.text) == ("\\udce4.wav", "high")
    table.unlink()
    (tmp_path / "metadata.csv").unlink()
    listed = read_utterances(str(tmp_path), SPEECH, role="test", with_text=False)
    assert [each.name for each in listed] == ["0.wav", "\\udce4.wav"]
    assert all(each.origin.isascii() and len(each.sound(RATE).samples_S) for each in listed)


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("open", "shut"):
        two_tones(Path("data") / name, 2)
    with locked(Path("data/shut"), 0):
        found = prepared("data")
        assert [row.origin for row in found.train] == ["data/open/metadata.csv:2", "data/open/metadata.csv:3"]
        assert "dropped 1: a folder can't be read (Permission denied) (data/shut, shut/)" in found.report.lines()
        with pytest.raises(DataError, match="1 of 3 recordings can't be used"):
            prepared("data", replace(ALL, bad_rows="stop"))
    for table in Path("data").rglob("metadata.csv"):
        table.unlink()
    with locked(Path("data/shut"), 0):
        listed = read_utterances("data", SPEECH, role="test", with_text=False)
        assert [each.name for each in listed] == ["open/0.wav", "open/1.wav", "shut/"]
        with pytest.raises(DataError, match=r"found open, shut; shut/ can't be read"):
            prepared("data")


@pytest.mark.parametrize("mode", [0, 0o111])
def test_a_folder_that_may_not_be_read_is_one_sentence(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two_tones(Path("data"), 2)
    with locked(Path("data"), mode), pytest.raises(DataError, match=r"^data: this folder can't be read \(Permission denied\)"):
        read_utterances("data", SPEECH, role="test", with_text=False)
    with locked(Path("data"), mode), pytest.raises(DataError, match=r"^data: this folder can't be read \(Permission denied\)"):
        prepared("data")


def test_recordings_of_a_folder_that_may_not_be_entered_are_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two_tones(Path("data/in"), 2)
    rows = [{"audio": f"data/{name}", "text": "low"} for name in ("in/0.wav", "in/1.wav", "out.wav")]
    soundfile.write("data/out.wav", tone(0.3, 300), RATE)
    with locked(Path("data/in"), 0o444):
        found = prepared(rows)
        assert [(reason, each.count) for reason, each in found.report.dropped.items()] == [
            ("the recording can't be read (Permission denied)", 2)
        ]


def test_recordings_that_libsndfile_does_not_read_are_not_left_out(tmp_path: Path) -> None:
    two_tones(tmp_path, 1)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    assert [each.name for each in read_utterances(str(tmp_path), SPEECH, role="test", with_text=False)] == ["0.wav", "b.m4a"]
    alone = read_utterances(str(tmp_path / "b.m4a"), SPEECH, role="test", with_text=False)
    assert [each.name for each in alone] == ["b.m4a"]
