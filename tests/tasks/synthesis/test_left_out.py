"""What isn't said, or isn't read, is told: blank lines of a file of texts, rows without a text, columns that most rows lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorabank as lb
from lorabank import api
from lorabank.config.classification import ClassificationConfig
from lorabank.config.speech import SpeechConfig
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.synthesis.rows import Limits, prepare
from lorabank.tasks.text_classification.prepare import prepare_texts
from tests.tasks.speech.tiny import RATE, WINDOW_S, audio_folder, tiny_tokens, tone
from tests.tasks.synthesis.made import RATE as SAID_RATE
from tests.tasks.synthesis.made import saved_model, spoken_rows, tiny_processor, tones
from tests.tasks.tiny import labelled_rows
from tests.training.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("voice")
    model = saved_model(folder / "model")
    lb.train(model=str(model), task="text-to-speech", data=spoken_rows(8), output=str(folder / "run"), max_steps=1)
    return folder / "run"


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_blank_lines_of_texts_are_counted_and_named(voice: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("aeio\n\n  \noi\n")
    told = api.predict(voice, str(data), tmp_path / "said", ["default"])
    assert f"2 texts said by default: {tmp_path / 'said'}. 2 left out: {data}:2: there is no text; {data}:3: there is no" in told
    said = tmp_path / "said" / "default"
    assert (said / "metadata.csv").read_text().splitlines()[1:] == ["0001.wav,aeio", "0004.wav,oi"], "by their lines"
    with pytest.raises(DataError, match=rf"2 of 4 texts can't be used:\n  - 2 × there is no text \({data}:2, {data}:3\)"):
        api.predict(voice, str(data), tmp_path / "stopped", ["default"], options={"bad_rows": "stop"})
    data.write_text("\n\n")
    with pytest.raises(DataError, match="none of 2 texts can be said"):
        api.predict(voice, str(data), tmp_path / "stopped", ["default"])


def said(source: Path, data: DataConfig, where: Path) -> Any:
    limits = Limits(speaker=4, text=40, reduction=2)
    return prepare(data, SynthesisConfig(), tiny_processor(where / "spm"), limits, seed=0, train=str(source), val=None)


def test_a_row_without_a_text_is_named_with_its_line_in_training(tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "voice", [(f"{i}.wav", tones("aei"), "ae" * (i != 1)) for i in range(4)], rate=SAID_RATE)
    report = said(folder, DataConfig(val_split=0), tmp_path).report
    (table,) = folder.glob("metadata.*")
    assert report.dropped["there is no text"].origins == (f"{table}:3, 1.wav",)


def test_columns_that_most_rows_lack_are_told_where_nobody_reads_them(voice: Path, tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "voice", [(f"{i}.wav", tones("aei"), "ae") for i in range(4)], rate=SAID_RATE)
    (table,) = folder.glob("metadata.*")
    table.unlink()
    rows: list[dict[str, Any]] = [{"file_name": f"{i}.wav", "text": "aei"} for i in range(4)]
    rows[2] |= {"transcription": "ioe", "mood": "glad"}
    rows[3]["speaker_embedding"] = [1.0] * 4
    lines(folder / "metadata.jsonl", rows)
    found = said(folder, DataConfig(val_split=0), tmp_path)
    note = "with the columns 'transcription', 'mood', which most rows lack: not read"
    assert dict(found.report.notes) == {note: found.report.notes[note]}
    assert found.report.notes[note].origins == (f"{folder / 'metadata.jsonl'}:3, 2.wav",)
    assert found.train[3].speaker == (1.0,) * 4, "which is read where it is"

    texts = lines(tmp_path / "texts.jsonl", [{"text": "ae"}, {"text": "io", "mood": "sad"}, {"text": "ea"}])
    told = api.predict(voice, str(texts), tmp_path / "said", ["default"])
    assert f"\n1 text with the column 'mood', which most rows lack: not read: {texts}:2" in told
    assert "not read" not in api.predict(voice, str(lines(texts, [{"text": "ae"}])), tmp_path / "again", ["default"])


def test_recordings_and_labelled_texts_tell_of_them_too(tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "sounds", [(f"{i}.wav", tone(0.3, 300.0 + i, seed=i), "ae") for i in range(3)])
    (table,) = folder.glob("metadata.*")
    table.unlink()
    rows: list[dict[str, Any]] = [{"file_name": f"{i}.wav", "text": f"tone {i}"} for i in range(3)]
    lines(folder / "metadata.jsonl", [rows[0], {**rows[1], "language": "en", "mood": "glad"}, rows[2]])
    heard = prepare_speech(DataConfig(train=str(folder), val_split=0), SpeechConfig(window=WINDOW_S), tiny_tokens(), RATE, seed=0)
    assert heard.report.notes["with the column 'mood', which most rows lack: not read"].count == 1

    labelled = labelled_rows(8)
    labelled[4]["text_pair"] = "and more"
    source = lines(tmp_path / "rows.jsonl", labelled)
    data = DataConfig(train=str(source), val_split=0)
    found = prepare_texts(data, ClassificationConfig(), tiny_tokenizer(None), seed=0)
    note = "with the column 'text_pair', which most rows lack: not read"
    assert found.report.notes[note].origins == (f"{source}:5",)
    grouped = [{**row, **({"take": "a"} if i < 2 else {})} for i, row in enumerate(labelled_rows(8))]
    data = DataConfig(train=str(lines(source, grouped)), val_split=0, group_by="take")
    assert not any(
        "take" in note for note in prepare_texts(data, ClassificationConfig(), tiny_tokenizer(None), seed=0).report.notes
    )
