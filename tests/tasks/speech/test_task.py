"""Speech recognition from recordings to transcripts: alone, jointly with other speakers, resumed, loaded again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig

import lorabank as lb
from lorabank import api
from lorabank.cli.main import main
from lorabank.config.flags import parse_train_arguments
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError, ModelError, OutputError
from lorabank.tasks.merged_task import write_task
from tests.tasks.speech.tiny import RATE, audio_folder, tiny_whisper, tone, two_tones
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run

SETTINGS: dict[str, Any] = {
    "task": "automatic-speech-recognition",
    "rank": 4,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_steps": 6,
    "val_split": 2,
    "speech": {"window": 0.5},
    "eval": {"every": 3, "metrics": ["loss", "wer", "cer"], "max_new_tokens": 12},
    "save": {"every": 3},
}
SPEAKERS = {"ann": {300.0: "low", 1200.0: "high"}, "bob": {500.0: "in", 900.0: "out"}, "cyd": {400.0: "no", 1500.0: "yes"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    model, processor = tiny_whisper(width=32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("voices")
    return {name: two_tones(root / name, 10, words) for name, words in SPEAKERS.items()}


def tensors(adapter: Any) -> list[torch.Tensor]:
    return [tensor for path in sorted(adapter.layers) for tensor in (adapter.layers[path].A, adapter.layers[path].B)]


@pytest.fixture(scope="module")
def trained(base: Path, voices: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter knows two words."""
    output = tmp_path_factory.mktemp("runs") / "run"
    more = {**SETTINGS, "max_steps": 40, "batch_size": 8, "eval": {**SETTINGS["eval"], "every": 20, "best": "wer"}}
    result = lb.train(model=str(base), output=str(output), data=str(voices["ann"]), **more)
    mine = result.adapters["default"]
    assert mine.best_metrics["wer"] == mine.best_metrics["cer_normalized"] == 0.0
    assert result.base_metrics["wer"] > 0.5
    return output


def test_a_run_folder_tells_all(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scored = {(line["adapter"], line["step"]): line["metrics"] for line in lines if line["event"] == "eval"}
    assert list(scored) == [("base", 0), ("default", 20), ("default", 40)]
    assert all(set(metrics) == {"loss", "wer", "cer", "wer_normalized", "cer_normalized"} for metrics in scored.values())
    samples = (trained / "samples.md").read_text()
    assert "| reference | low |" in samples or "| reference | high |" in samples
    assert "| base |" in samples and "| default |" in samples
    report = json.loads((trained / "data_report.json").read_text())
    assert next(iter(report.values()))["what"] == "recordings"
    said = json.loads((trained / "default" / "lorabank.json").read_text())
    assert json.loads(said["metadata"]["speech"])["window"] == 0.5


def test_it_transcribes_recordings_of_its_own(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for name, pitch in (("a", 300.0), ("b", 1200.0)):
        soundfile.write(folder / f"{name}.flac", np.stack([tone(0.35, pitch, 44_100, seed=99)] * 2, 1), 44_100)
    (folder / "broken.wav").write_text("nothing")
    told = api.predict(trained, folder, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    heard = [(line["audio"], line["default"]) for line in lines]
    assert heard == [("a.flac", "low"), ("b.flac", "high"), ("broken.wav", None)]
    bad = lines.pop()
    assert (bad["base"], bad["seconds"]) == (None, None) and bad["error"].startswith("the recording can't be decoded")
    assert all("base" in line and line["seconds"] == 0.35 and "error" not in line for line in lines)
    assert told.startswith("2 recordings (0.7 s) transcribed by default, base: ")
    assert "1 left out: broken.wav: the recording can't be decoded" in told
    refused = ["predict", str(trained), "--data", str(folder), "--output", str(tmp_path / "stopped.jsonl"), "--bad-rows", "stop"]
    assert main(refused) != 0 and not (tmp_path / "stopped.jsonl").exists()
    assert "or set --bad-rows to drop" in capsys.readouterr().err
    api.predict(trained, folder / "a.flac", tmp_path / "a.txt", ["default"])
    assert (tmp_path / "a.txt").read_text() == "low\n"
    api.predict(trained, folder, tmp_path / "many", ["default"])
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == sorted(
        f"{stem}.default{kind}" for stem in "ab" for kind in (".txt", ".srt", ".vtt")
    )
    with pytest.raises(OutputError, match="holds one transcript, and there are 3 recordings and 1 models"):
        api.predict(trained, folder, tmp_path / "many.srt", ["default"])
    with pytest.raises(OutputError, match=r"got '\.doc'"):
        api.predict(trained, folder, tmp_path / "many.doc")
    with pytest.raises(DataError, match=r"none of 1 recording can be read:\n  - 1 × .*\(broken\.wav\)"):
        api.predict(trained, folder / "broken.wav", tmp_path / "broken.jsonl")


def test_a_bad_row_keeps_its_place_and_names_of_any_bytes_are_written(trained: Path, tmp_path: Path) -> None:
    """In a table with columns that are half a surrogate, and in a folder, into a file and into a folder."""
    folder = two_tones(tmp_path / "in", 2, SPEAKERS["ann"])
    (folder / "1.wav").rename(folder / os.fsdecode(b"\xe4.wav"))
    rows = [{"file_name": os.fsdecode(b"\xe4.wav")}, {"file_name": "gone.wav"}, {"file_name": "0.wav"}]
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps({**row, "note": "half \ud83d"}) + "\n" for row in rows))
    told = api.predict(trained, table, tmp_path / "out.jsonl", ["default"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["audio"], line["default"], line.get("error")) for line in lines] == [
        ("\\udce4.wav", "high", None),
        ("gone.wav", None, f"there is no such recording in {folder}"),
        ("0.wav", "low", None),
    ]
    assert all(line["note"] == "half \ud83d" for line in lines)
    assert told.endswith(f"1 left out: gone.wav: there is no such recording in {folder}.") and told.isascii()
    for file in ("rows.jsonl", "metadata.csv"):
        (folder / file).unlink()
    (folder / os.fsdecode(b"\xf6.m4a")).write_bytes(b"ftypM4A " * 40)
    told = api.predict(trained, folder, tmp_path / "many", ["default"])
    assert (tmp_path / "many" / "\\udce4.default.txt").read_text() == "high\n"
    assert "1 left out: \\udcf6.m4a: libsndfile doesn't read .m4a" in told


def test_recordings_are_transcribed_in_portions(
    trained: Path, voices: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, some are in memory at a time; what they become is the same."""
    api.predict(trained, voices["ann"], tmp_path / "whole.jsonl")
    monkeypatch.setattr("lorabank.tasks.speech.predict.PORTION_S", 0.7)
    api.predict(trained, voices["ann"], tmp_path / "portions.jsonl")
    assert (tmp_path / "portions.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = audio_folder(tmp_path / "rows", [("a.wav", tone(0.3, 300), "low")], header="file_name,transcription")
    (rows / "metadata.csv").write_text("file_name,language\na.wav,french\n")
    with pytest.raises(DataError, match="'french' is none that this model knows"):
        api.predict(trained, rows / "metadata.csv", tmp_path / "rows.jsonl")


def test_long_recordings_are_transcribed_in_windows(trained: Path, tmp_path: Path) -> None:
    quiet = np.zeros(round(0.3 * RATE), np.float32)
    pitches = (300.0, 1200.0, 1200.0, 300.0, 1200.0)
    soundfile.write(tmp_path / "long.wav", np.concatenate([part for p in pitches for part in (tone(0.38, p), quiet)]), RATE)
    api.predict(trained, tmp_path / "long.wav", tmp_path / "out.jsonl", ["default"])
    heard = json.loads((tmp_path / "out.jsonl").read_text())["default"].split()
    assert len(heard) >= 5 and set(heard) <= {"low", "high"}


def test_scores_of_other_rows_and_of_a_bare_adapter(trained: Path, voices: dict[str, Path]) -> None:
    own = api.evaluate(trained, DataConfig(test=str(voices["ann"])), metrics=["wer"])
    assert own["default"]["wer"] == 0.0 and own["base"]["wer"] > 0.5
    bare = api.evaluate(trained / "default", DataConfig(test=str(voices["ann"])), metrics=["wer"])
    assert bare["default"] == own["default"]  # its window is in its own file


def test_three_speakers_train_jointly_as_they_do_alone(base: Path, voices: dict[str, Path]) -> None:
    """Law 3: recordings and transcripts of three adapters in one pass; each ends where it ends alone."""
    all_three = {name: {"data": str(folder), "rank": 2 + i} for i, (name, folder) in enumerate(voices.items())}
    joint = lb.train(model=str(base), adapters=all_three, **SETTINGS)
    for name, mine in all_three.items():
        alone = lb.train(model=str(base), adapters={name: mine}, **SETTINGS)
        for one, other in zip(tensors(joint.trained[name]), tensors(alone.trained[name]), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
        assert joint.adapters[name].best_metrics["loss"] == pytest.approx(alone.adapters[name].best_metrics["loss"], rel=1e-4)
        assert joint.base_metrics_of[name]["wer"] == alone.base_metrics["wer"]
    layers = set(joint.trained["ann"].layers)
    assert any("encoder.layers" in path for path in layers) and any("encoder_attn" in path for path in layers)


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(
    base: Path, voices: dict[str, Path], tmp_path: Path
) -> None:
    run = {"data": str(voices["bob"]), "output": str(tmp_path / "run"), "dropout": 0.1, **SETTINGS}
    lb.train(model=str(base), **run)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(model=str(base), listeners=[SignalAt(("step", 4), signal.SIGINT)], **run)
    assert halved.interrupted and halved.adapters["default"].steps == 4
    lb.train(model=str(base), resume=True, **run)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_timestamps_are_learned_and_written(base: Path, tmp_path: Path) -> None:
    words = {300.0: "<|0.00|> low<|0.30|>", 1200.0: "<|0.00|> high<|0.30|>"}
    folder = two_tones(tmp_path / "timed", 10, words)
    more = {
        **SETTINGS,
        "max_steps": 40,
        "batch_size": 8,
        "speech": {"window": 0.5, "timestamps": "keep"},
        "eval": {**SETTINGS["eval"], "every": 0},
    }
    result = lb.train(model=str(base), output=str(tmp_path / "run"), data=str(folder), **more)
    assert result.adapters["default"].best_metrics["wer"] == 0.0
    assert "<\\|0.00\\|> " in (tmp_path / "run" / "samples.md").read_text()
    api.predict(tmp_path / "run", folder / "0.wav", tmp_path / "a.srt", ["default"])
    assert (tmp_path / "a.srt").read_text() == "1\n00:00:00,000 --> 00:00:00,300\nlow\n\n"


def test_the_command_line(trained: Path, voices: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, line = str(voices["ann"] / "0.wav"), ["predict", str(trained), "--adapters", "default", "--data"]
    assert main([*line, one, "--output", str(tmp_path / "a.vtt")]) == 0
    assert (tmp_path / "a.vtt").read_text().startswith("WEBVTT\n\n00:00:00.")
    assert main([*line, str(voices["ann"]), "--output", str(tmp_path / "a.jsonl"), "--timestamps", "--max-rows", "2"]) == 0
    lines = [json.loads(each) for each in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all({"transcription", "segments", "default"} <= set(each) for each in lines)
    capsys.readouterr()
    assert main([*line, one, "--output", str(tmp_path / "b.jsonl"), "--language", "klingon"]) == 2
    assert "expected english: this model knows no other, got 'klingon'" in capsys.readouterr().err
    words = ["--model", "x", "--data", "y", "--task", "automatic-speech-recognition", "--language", "german"]
    assert parse_train_arguments(words).config.speech.language == "german"


def test_what_can_be_known_is_refused_before_training(base: Path, voices: dict[str, Path], tmp_path: Path) -> None:
    data = str(voices["ann"])
    with pytest.raises(ConfigError, match=r"^eval\.metrics: expected some of loss, wer"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "eval": {"metrics": ["bleu"]}})
    with pytest.raises(ConfigError, match="expected english: this model knows no other, got 'german'"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "speech": {"language": "german"}})
    with pytest.raises(ConfigError, match="eva needs the model's whole window"):
        lb.train(model=str(base), data=data, init="eva", **SETTINGS)
    with pytest.raises(DataError, match="recordings can't be used"):
        broken = audio_folder(tmp_path / "broken", [("a.wav", tone(0.3, 300), "a"), ("b.wav", np.zeros(99, np.float32), "b")])
        lb.train(model=str(base), data=str(broken), bad_rows="stop", **{**SETTINGS, "val_split": 0})
    with pytest.raises(DataError, match=r"fillers/metadata\.csv:\d '(um|🙂)'.*\. Set data\.val to rows .* data\.val_split to 0"):
        fillers = two_tones(tmp_path / "fillers", 4, {300.0: "um", 1200.0: "🙂"})
        lb.train(model=str(base), data=str(fillers), **SETTINGS)
    with pytest.raises(DataError, match="empty once normalised"):  # of those that are scored, each
        (tmp_path / "val.csv").write_text("audio,text\n" + "".join(f"fillers/{i}.wav,{t}\n" for i, t in ((0, "um"), (1, "a"))))
        scored = {**SETTINGS, "eval": {**SETTINGS["eval"], "max_prompts": 1}, "val_data": str(tmp_path / "val.csv")}
        lb.train(model=str(base), data=data, **scored)
    with pytest.raises(ConfigError, match=r"expects a WhisperProcessor, .*, got a WhisperTokenizer"):
        model, processor = tiny_whisper()
        lb.train(model=model, tokenizer=processor.tokenizer, data=data, **SETTINGS)
    with pytest.raises(DataError, match="longer than the window of 2 s"):  # this model hears no more, whatever is asked for
        long = audio_folder(tmp_path / "long", [("a.wav", tone(2.1, 300), "a")])
        lb.train(model=str(base), data=str(long), **{**SETTINGS, "speech": {}})
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError):
        lb.train(model=str(tmp_path / "none"), data=data, **SETTINGS)


def test_a_run_from_objects(voices: dict[str, Path]) -> None:
    import datasets

    model, processor = tiny_whisper()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    files = [str(voices["ann"] / f"{i}.wav") for i in range(6)]
    rows = datasets.Dataset.from_dict({"audio": files, "text": ["low", "high"] * 3}).cast_column("audio", datasets.Audio())
    result = lb.train(model=model, tokenizer=processor, data=rows, **SETTINGS)
    assert result.adapters["default"].steps == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_merged_model_hears_and_writes_as_its_adapter_did(
    trained: Path, voices: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its window is in no file of transformers; a language is in the model's own settings of generation."""
    for way in ([], ["--by-shard"]):
        merged = tmp_path / f"merged{len(way)}"
        assert main(["merge", str(trained / "default"), "--output", str(merged), "--device", "cpu", *way]) == 0
        assert "used with, as in training: window 0.5" in capsys.readouterr().out
        assert api.evaluate(merged, DataConfig(test=str(voices["ann"])), metrics=["wer"])["base"]["wer"] == 0.0
    adapter = lb.Adapter.load(trained / "default")
    said = {**json.loads(adapter.metadata["speech"]), "language": "german", "task": "translate"}
    write_task(merged, replace(adapter, metadata={**adapter.metadata, "speech": json.dumps(said)}))
    found = GenerationConfig.from_pretrained(merged)
    assert (found.language, found.task) == ("german", "translate")


def test_a_multilingual_base_by_itself_is_told_its_language(
    voices: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word errors before any training."""
    model, processor = tiny_whisper(multilingual=True)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    said = json.loads(file.read_text())
    del said["_from_model_config"]  # of such a file transformers forgets the languages; those of real models are none
    file.write_text(json.dumps(said))
    words = ["eval", str(tmp_path / "base"), "--task", "automatic-speech-recognition", "--data", str(voices["ann"])]
    words += ["--metrics", "wer", "--max-new-tokens", "3", "--max-rows", "2", "--device", "cpu"]
    assert main(words) == 2
    assert "--language" in capsys.readouterr().err
    assert main([*words, "--language", "german"]) == 0
    assert "wer" in capsys.readouterr().out
