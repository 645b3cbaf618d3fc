"""From audio folders, tables and data sets to rows: what is read, dropped, refused, cut and split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lorabank.config.speech import SpeechConfig
from lorabank.config.train import DataConfig
from lorabank.data.row_report import Splits
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.speech.prepare import prepare_speech
from lorabank.tasks.speech.rows import SpeechRow
from tests.tasks.speech.tiny import RATE, WINDOW_S, audio_folder, tiny_tokens, tone, two_tones

ALL = DataConfig(val_split=0)
SPEECH = SpeechConfig(window=WINDOW_S)


def prepared(source: object, speech: SpeechConfig = SPEECH, data: DataConfig = ALL, **more: object) -> Splits[SpeechRow]:
    multilingual = bool(more.pop("multilingual", False))
    return prepare_speech(data, speech, tiny_tokens(multilingual=multilingual), RATE, seed=1, train=source, **more)  # pyright: ignore[reportArgumentType]


def test_an_audio_folder(tmp_path: Path) -> None:
    found = prepared(str(two_tones(tmp_path, 4)))
    assert [(row.name, row.text, row.origin) for row in found.train[:2]] == [
        ("0.wav", "low", f"{tmp_path}/metadata.csv:2"),
        ("1.wav", "high", f"{tmp_path}/metadata.csv:3"),
    ]
    assert [round(row.seconds, 2) for row in found.train] == [0.3, 0.32, 0.34, 0.36]
    assert found.report.lines()[0] == "4 recordings read, 4 kept: 4 train"
    assert found.report.lines()[1] == "1.3 s train; up to 0.4 s a row, 16.7 learned tokens a second"
    json.dumps(found.report.to_dict())


def test_what_was_done_to_recordings_is_counted(tmp_path: Path) -> None:
    audio_folder(
        tmp_path, [("a.wav", np.stack([tone(0.5, 440, 8_000)] * 2, 1), "a"), ("b.wav", tone(0.5, 550, 8_000), "b")], 8_000
    )
    lines = prepared(str(tmp_path)).report.lines()
    assert lines[2] == "resampled from 8,000 to 16,000 Hz: 2; 2 channels averaged to one: 1"


def test_folders_of_folders_and_jsonl(tmp_path: Path) -> None:
    two_tones(tmp_path / "a", 2)
    two_tones(tmp_path / "b", 3)
    rows = [{"file_name": f"{i}.wav", "transcription": f"word {i}"} for i in range(3)]
    (tmp_path / "b" / "metadata.csv").unlink()
    (tmp_path / "b" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.text for row in prepared(str(tmp_path)).train] == ["low", "high", "word 0", "word 1", "word 2"]


def test_tables_with_other_columns(tmp_path: Path) -> None:
    folder = two_tones(tmp_path / "a", 2)
    table = tmp_path / "rows.csv"
    table.write_text("clip,said,path\na/0.wav,one,nowhere\na/1.wav,two,nowhere\n")
    named = replace(SPEECH, audio_column="clip", text_column="said")
    assert [row.text for row in prepared(str(table), named).train] == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'clp' \(did you mean 'clip'\?\)"):
        prepared(str(table), replace(named, audio_column="clp"))
    with pytest.raises(DataError, match="expected a column with the transcript"):
        prepared(str(table), replace(SPEECH, audio_column="clip"))
    absolute = tmp_path / "other.jsonl"
    absolute.write_text(json.dumps({"audio": str(folder / "0.wav"), "text": "one"}) + "\n")
    assert prepared(str(absolute)).train[0].text == "one"


def test_data_sets_and_dicts(tmp_path: Path) -> None:
    import datasets

    two_tones(tmp_path, 2)
    files = [str(tmp_path / f"{i}.wav") for i in range(2)]
    expected = prepared(str(tmp_path)).train
    by_path = datasets.Dataset.from_dict({"audio": files, "text": ["low", "high"]}).cast_column("audio", datasets.Audio())
    arrays = [
        {"audio": {"array": soundfile.read(f)[0], "sampling_rate": RATE}, "text": t}
        for f, t in zip(files, ("low", "high"), strict=True)
    ]
    by_path.save_to_disk(str(tmp_path / "saved"))
    both = datasets.DatasetDict({"train": by_path, "test": by_path.select([0])})
    for source in (by_path, arrays, both, str(tmp_path / "saved")):
        found = prepared(source).train
        assert [row.content for row in found] == [row.content for row in expected]


def test_what_looks_like_a_slip_is_noted(tmp_path: Path) -> None:
    """As text generation notes the word of a missing value; and whole numbers in a float file."""
    rows = [(f"{i}.wav", tone(0.3, 300 + 100 * i), text) for i, text in enumerate(("NaN", "None", "none", "a"))]
    audio_folder(tmp_path, [*rows, ("late.wav", tone(0.3, 900), "<|0.00|> NaN<|1.00|>")])
    soundfile.write(tmp_path / "2.wav", tone(0.3, 500) * 32768, RATE, subtype="FLOAT")
    found = prepared(str(tmp_path))
    assert [row.text for row in found.train] == ["NaN", "None", "none", "a"]
    words, loud = found.report.notes.items()
    assert words[0] == "the whole text of a column is NaN, null or None, which is trained as that word"
    assert words[1].origins == (f"{tmp_path}/metadata.csv:2, 0.wav", f"{tmp_path}/metadata.csv:3, 1.wav")
    assert "divided by 32,768" in loud[0] and loud[1].origins == (f"{tmp_path}/metadata.csv:4, 2.wav",)


BAD = {
    "missing.wav": "there is no such recording",
    "text.wav": "can't be decoded",
    "empty.wav": "no samples",
    "silent.wav": "silent",
    "long.wav": "longer than the window of 2 s",
    "none.wav": "there is no transcript",
    "wordy.wav": "more tokens than the decoder has positions",
    "marks.wav": "own tokens",
    "late.wav": "beyond the recording's end",
}


def bad_folder(folder: Path) -> Path:
    good = tone(0.5, 440)
    rows = [
        ("good.wav", good, "yes"),
        ("empty.wav", np.zeros(0, np.float32), "a"),
        ("silent.wav", np.zeros(4000, np.float32), "a"),
        ("long.wav", tone(2.5, 440), "a"),
        ("none.wav", good, "  "),
        ("wordy.wav", good, "word " * 30),
        ("marks.wav", good, "<|en|> a"),
        ("late.wav", good, "<|0.00|> a<|1.00|>"),
        ("missing.wav", good, "a"),
        ("text.wav", good, "a"),
    ]
    audio_folder(folder, rows)
    (folder / "missing.wav").unlink()
    (folder / "text.wav").write_text("<html>404</html>")
    return folder


def test_bad_recordings_are_counted_by_name(tmp_path: Path) -> None:
    found = prepared(str(bad_folder(tmp_path)))
    assert [row.name for row in found.train] == ["good.wav"]
    assert (found.report.read, found.report.kept) == (10, 1)
    for name, reason in BAD.items():
        (said,) = [line for line in found.report.lines() if reason in line]
        assert said.startswith("dropped 1: ")
        assert "metadata.csv:" in said
        assert name in said


def test_bad_recordings_are_refused_all_at_once(tmp_path: Path) -> None:
    folder = bad_folder(tmp_path)
    with pytest.raises(DataError, match="8 of 10 recordings can't be used") as refused:
        prepared(str(folder), data=replace(ALL, bad_rows="stop"))
    assert all(name in str(refused.value) for name in BAD if name != "long.wav")
    with pytest.raises(DataError, match=r"1 of 10 recordings can't be used.*\n.*long\.wav"):
        prepared(str(folder), replace(SPEECH, long_audio="stop"))
    only_bad = tmp_path / "metadata.csv"
    only_bad.write_text("file_name,transcription\nmissing.wav,a\ntext.wav,b\n")
    with pytest.raises(DataError, match="none of the 2 recordings can be used"):
        prepared(str(folder))


def test_long_recordings_are_cut_or_split(tmp_path: Path) -> None:
    text = "<|0.00|> one<|1.00|><|1.20|> two<|2.40|><|2.50|> three<|4.00|>"
    samples = tone(4.2, 440)
    audio_folder(tmp_path, [("a.wav", samples, text), ("b.wav", samples * 0.9, "no times")])
    split = prepared(str(tmp_path), replace(SPEECH, long_audio="split"))
    assert [(row.start, row.text, row.transcript) for row in split.train] == [
        (0.0, "one", "<|0.00|> one<|1.00|>"),
        (1.2, "two", "<|0.00|> two<|1.20|>"),
        (2.5, "three", "<|0.00|> three<|1.50|>"),
    ]
    assert "no timestamps to split it at" in " ".join(split.report.dropped)
    assert np.allclose(split.train[1].samples(), samples[round(1.2 * RATE) : round(2.4 * RATE)], atol=1e-4)
    cut = prepared(str(tmp_path), replace(SPEECH, long_audio="cut"))
    assert [(row.text, row.seconds) for row in cut.train] == [("one", 1.0), ("no times", 2.0)]
    assert any("kept whole" in note for note in cut.report.notes)
    (tmp_path / "metadata.csv").write_text(f'file_name,transcription\na.wav,"{text}"\n')
    with pytest.raises(DataError, match="3 rows, different recordings: 1, too few"):  # its windows stay together
        prepared(str(tmp_path), replace(SPEECH, long_audio="split"), replace(ALL, val_split=1))


def test_timestamps_kept_or_dropped(tmp_path: Path) -> None:
    audio_folder(tmp_path, [("a.wav", tone(1, 440), "<|0.00|> one<|0.50|>"), ("b.wav", tone(1, 550), "two")])
    kept = prepared(str(tmp_path)).train
    assert [row.timed for row in kept] == [True, False]
    assert [row.timed for row in prepared(str(tmp_path), replace(SPEECH, timestamps="drop")).train] == [False, False]
    only = prepared(str(tmp_path), replace(SPEECH, timestamps="keep"))
    assert [row.name for row in only.train] == ["a.wav"]
    assert "no timestamps" in next(iter(only.report.dropped))


def test_each_row_may_have_its_language(tmp_path: Path) -> None:
    rows = [("a.wav", tone(1, 440), "ja"), ("b.wav", tone(1, 550), "yes"), ("c.wav", tone(1, 660), "oui")]
    audio_folder(tmp_path, rows)
    (tmp_path / "metadata.csv").write_text("file_name,transcription,language\na.wav,ja,german\nb.wav,yes,\nc.wav,oui,french\n")
    found = prepared(str(tmp_path), replace(SPEECH, language="en"), multilingual=True)
    assert [row.language for row in found.train] == ["de", "en"]
    assert "'french' is none that this model knows" in next(iter(found.report.dropped))
    with pytest.raises(ConfigError, match="knows many languages"):
        prepared(str(tmp_path), multilingual=True)


def test_splits_keep_groups_and_equal_recordings_together(tmp_path: Path) -> None:
    rows = [(f"{i}.wav", tone(0.3, 300 + 100 * (i // 2)), "word") for i in range(12)]  # each recording twice
    lines = "\n".join(f"{i}.wav,word,{'abc'[i // 4]}" for i in range(12))
    audio_folder(tmp_path, rows)
    halves = prepared(str(tmp_path), data=DataConfig(val_split=4))
    assert (len(halves.train), len(halves.val)) == (8, 4)
    assert {note: rows.count for note, rows in halves.report.notes.items()} == {"the same samples as an earlier row": 6}
    (tmp_path / "metadata.csv").write_text(f"file_name,transcription,speaker\n{lines}\n")
    grouped = prepared(str(tmp_path), data=DataConfig(val_split=4, group_by="speaker"))
    assert len({row.group for row in grouped.val}) == 1
    assert {row.group for row in grouped.val}.isdisjoint(row.group for row in grouped.train)
    with pytest.raises(DataError, match=r"group_by asks for column 'speakr' \(did you mean 'speaker'\?\)"):
        prepared(str(tmp_path), data=DataConfig(val_split=4, group_by="speakr"))
    again = prepared(str(tmp_path), data=DataConfig(val_split=4, group_by="speaker"))
    assert [row.content for row in again.val] == [row.content for row in grouped.val]


def test_recordings_beyond_the_budget_are_decoded_again(tmp_path: Path) -> None:
    folder = two_tones(tmp_path, 4)
    kept, again = prepared(str(folder)).train, prepared(str(folder), kept_bytes=30_000).train
    assert [row.kept is None for row in again] == [False, True, True, True]
    assert all(np.array_equal(a.samples(), b.samples()) for a, b in zip(kept, again, strict=True))
    soundfile.write(folder / "3.wav", tone(0.36, 500), RATE)
    with pytest.raises(DataError, match=r"3\.wav: its samples have changed"):
        again[3].samples()
    (folder / "3.wav").unlink()
    with pytest.raises(DataError, match=r"3\.wav: there is no such recording in .*; it could be read when the run began"):
        again[3].samples()


def test_sources_without_recordings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a metadata\.csv .* found nothing"):
        prepared(str(tmp_path))
    soundfile.write(tmp_path / "a.wav", tone(1, 440), RATE)
    with pytest.raises(DataError, match=r"expected a metadata\.csv"):
        prepared(str(tmp_path))
    with pytest.raises(DataError, match="a recording has no transcript"):
        prepared(str(tmp_path / "a.wav"))
    with pytest.raises(DataError, match="no file or folder"):
        prepared(str(tmp_path / "b.csv"))
    with pytest.raises(DataError, match="no training data"):
        prepared(None)
