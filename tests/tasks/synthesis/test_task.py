"""Speech synthesis on a tiny SpeechT5: transformers' loss, joint training, resuming, files to listen to, bad rows."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

import lorabank as lb
from lorabank import api
from lorabank.cli import main
from lorabank.config.synthesis import SynthesisConfig
from lorabank.config.train import DataConfig, TrainConfig
from lorabank.errors import ConfigError, DataError, ModelError, OutputError
from lorabank.tasks.synthesis.loss import seeded, synthesis_loss
from lorabank.tasks.synthesis.rows import SynthesisRow
from lorabank.tasks.synthesis.task import SpeechSynthesis
from lorabank.tasks.synthesis.texts import texts
from lorabank.tasks.synthesis.vocoder import griffin_lim
from lorabank.training.data_sets import RowObjects
from tests.tasks.synthesis.made import RATE, saved_model, spoken_rows, tiny_model, tiny_processor, tones
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run

SETTINGS: dict[str, Any] = {
    "task": "text-to-speech",
    "rank": 4,
    "learning_rate": 5e-3,
    "batch_size": 4,
    "max_steps": 4,
    "val_split": 0.25,
    "eval": {"every": 2, "metrics": ["loss", "mae"], "samples": 1},
    "save": {"every": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("speecht5"))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_processor(tmp_path_factory.mktemp("letters"))


def test_a_row_s_loss_is_transformers_own_whatever_is_beside_it(processor: Any) -> None:
    """With the same prenet: the library's own would draw one mask for all rows from the global state."""
    model = tiny_model()
    task = SpeechSynthesis(TrainConfig(task="text-to-speech"), model, processor, {})
    rows = task.read(
        TrainConfig(task="text-to-speech"), RowObjects(train=spoken_rows(5, speaker=[1.0, 0.5, 0.0, -1.0]))
    ).by_adapter
    chosen = list(rows["default"].train)[:3]
    assert len({row.frames for row in chosen}) > 1
    model.requires_grad_(True)
    batch = task.batch([[row] for row in chosen], ["a"] * 3, examples=range(3), draws=[11, 12, 13])
    losses = synthesis_loss(model, batch.inputs, batch.targets)
    losses.sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, row in enumerate(chosen):
        with seeded(model, [11 + i], [row.frames // 2]):
            out: Any = model(
                input_ids=torch.tensor([row.input_ids]),
                attention_mask=torch.ones(1, len(row.input_ids), dtype=torch.long),
                speaker_embeddings=torch.tensor([row.speaker]),
                labels=torch.from_numpy(row.mel_TM)[None],
            )
        torch.testing.assert_close(losses[i], out.loss * row.frames, atol=1e-4, rtol=1e-5)
        (out.loss * row.frames).backward()
    largest = max(float(g.abs().max()) for g in together.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert float((together[name] - p.grad).abs().max()) < 2e-5 * largest, name
    assert type(model.speecht5.decoder.prenet).__name__ == "SpeechT5SpeechDecoderPrenet"  # as it was


def test_it_learns_and_leaves_files_to_listen_to(base: Path, tmp_path: Path) -> None:
    rows = spoken_rows(12)
    result = lb.train(
        model=str(base),
        data=rows,
        output=str(tmp_path / "run"),
        **{**SETTINGS, "max_steps": 40, "eval": {"every": 20, "metrics": ["loss", "mae"], "samples": 1}},
    )
    assert result.adapters["default"].best_metrics["mae"] < 0.8 * result.base_metrics["mae"]
    samples, rate = soundfile.read(tmp_path / "run" / "samples" / "default-1.wav")
    assert rate == RATE and len(samples) >= 512 and np.isfinite(samples).all()
    assert (
        "| samples/default-1.wav | samples/default-1-base.wav | samples/default-1-recording.wav |"
        in (tmp_path / "run" / "samples.md").read_text()
    )
    beside = tmp_path / "run" / "samples"
    untrained, recording = (soundfile.read(beside / f"default-1-{of}.wav")[0] for of in ("base", "recording"))
    assert len(untrained) >= 512 and not np.array_equal(untrained[:512], samples[:512]) and np.abs(recording).max() > 0.01
    (tmp_path / "texts.txt").write_text("aeio\noi\n")
    told = api.predict(tmp_path / "run", tmp_path / "texts.txt", tmp_path / "said", ["default", "base"])
    assert "2 texts said by default, base" in told
    first = [soundfile.read(tmp_path / "said" / name / "0001.wav")[0] for name in ("default", "base")]
    assert all(len(sound) >= 512 for sound in first) and not np.array_equal(first[0][:512], first[1][:512])
    assert (tmp_path / "said" / "default" / "metadata.csv").read_text().splitlines()[1] == "0001.wav,aeio"
    again = api.predict(tmp_path / "run", tmp_path / "texts.txt", tmp_path / "again", ["default"])
    assert "2 texts" in again and np.array_equal(soundfile.read(tmp_path / "again" / "default" / "0001.wav")[0], first[0])


@pytest.fixture(scope="module")
def voice(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    output = tmp_path_factory.mktemp("voice") / "run"
    lb.train(model=str(base), data=spoken_rows(8), output=str(output), **{**SETTINGS, "max_steps": 1, "eval": {"every": 0}})
    return output


def test_a_text_that_can_t_be_said_is_left_out_and_named(voice: Path, tmp_path: Path) -> None:
    bad = [{"text": ""}, {"text": None}, {"text": float("nan")}, {"text": "ae" * 40}, {"text": "half \ud83d"}]
    rows = [{"text": "aeio"}, *bad, {"text": 7}]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = api.predict(voice, data, tmp_path / "said", ["default"])
    said = tmp_path / "said" / "default"
    assert (said / "metadata.csv").read_text().splitlines()[1:] == ["0001.wav,aeio", "0007.wav,7"]
    assert sorted(path.name for path in said.iterdir()) == ["0001.wav", "0007.wav", "metadata.csv"]
    assert f"2 texts said by default: {tmp_path / 'said'}. 5 left out: {data}:2: there is no text; {data}:3: there" in told
    for reason in ("column 'text' holds NaN", "more than the model's 40 tokens", "half of a surrogate pair"):
        assert reason in told
    with pytest.raises(DataError, match="5 of 7 texts can't be used"):
        api.predict(voice, data, tmp_path / "stopped", ["default"], options={"bad_rows": "stop"})
    data.write_text("".join(json.dumps(row) + "\n" for row in bad[:2]))
    with pytest.raises(DataError, match=r"none of 2 texts can be said:\n  - 2 × there is no text \("):
        api.predict(voice, data, tmp_path / "stopped", ["default"])
    with pytest.raises(ConfigError, match=r"knows no option 'badrows' \(did you mean 'bad_rows'\?\)"):
        api.predict(voice, data, tmp_path / "stopped", ["default"], options={"badrows": "stop"})
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("name", ["x.mp3", "x.WAV", "x.csv"])
def test_one_file_as_output_is_refused_with_the_way_out(name: str, voice: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("aeio\n")
    with pytest.raises(OutputError, match=rf"{name}: expected a folder, got the name of .*: name a folder, such as .*/x\.$"):
        api.predict(voice, tmp_path / "texts.txt", tmp_path / name, ["default"])
    assert not (tmp_path / name).exists()


def test_voices_train_jointly_as_they_do_alone(base: Path) -> None:
    """Law 3, with recordings of other lengths and dropout that is always on."""
    voices = {"low": spoken_rows(8), "high": spoken_rows(10, shift=1.5), "odd": spoken_rows(9, shift=0.7)}
    settings = {**SETTINGS, "eps": 1e-5}
    joint = lb.train(model=str(base), data=voices, adapters={name: {} for name in voices}, **settings)
    for name, rows in voices.items():
        alone = lb.train(model=str(base), data={name: rows}, adapters={name: {}}, **settings)
        mine, other = joint.trained[name], alone.trained[name]
        for path, layer in mine.layers.items():
            torch.testing.assert_close(layer.A, other.layers[path].A, atol=5e-5, rtol=5e-4)
            torch.testing.assert_close(layer.B, other.layers[path].B, atol=5e-5, rtol=5e-4)


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "voice"
    folder.mkdir()
    lines = ["file_name,transcription"]
    for i, row in enumerate(spoken_rows(8)):
        soundfile.write(folder / f"{i}.wav", row["audio"]["array"], RATE)
        lines.append(f"{i}.wav,{row['text']}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    runs = {"data": str(folder), "output": str(tmp_path / "run"), **SETTINGS}
    lb.train(model=str(base), **runs)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(model=str(base), listeners=[SignalAt(("step", 3), signal.SIGINT)], **runs)
    assert halved.interrupted and halved.adapters["default"].steps == 3
    lb.train(model=str(base), resume=True, **runs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def hifigan(folder: Path) -> Path:
    """A tiny random HifiGan: 2 × 2 samples a frame."""
    torch.manual_seed(0)
    config = SpeechT5HifiGanConfig(
        model_in_dim=20,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )
    SpeechT5HifiGan(config).save_pretrained(folder)
    return folder


def test_an_adapter_alone_and_a_merged_model_speak_by_the_runs_vocoder(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocoder, run = hifigan(tmp_path / "hifigan"), tmp_path / "run"
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "synthesis": {"vocoder": str(vocoder), "stop": 0.6}}
    lb.train(model=str(base), data=spoken_rows(6), output=str(run), **settings)
    shutil.copytree(run / "default", tmp_path / "alone")
    assert main(["merge", str(run / "default"), "--output", str(tmp_path / "merged"), "--device", "cpu"]) == 0
    assert f"used with, as in training: vocoder {str(vocoder)!r}, stop 0.6" in capsys.readouterr().out
    (tmp_path / "texts.txt").write_text("aeio\n")

    def said(source: str, name: str) -> Any:
        api.predict(tmp_path / source, tmp_path / "texts.txt", tmp_path / f"said-{source}", [name], device="cpu")
        return soundfile.read(tmp_path / f"said-{source}" / name / "0001.wav")[0]

    sound = said("run", "default")
    assert np.array_equal(said("alone", "alone"), sound)
    assert len(said("merged", "base")) == len(sound)
    shutil.rmtree(vocoder)
    shutil.rmtree(tmp_path / "said-alone")
    with pytest.warns(UserWarning, match=r"hifigan.*The adapter was trained with it\. Griffin-Lim"):
        assert len(said("alone", "alone")) > 50 * len(sound)


def test_a_vocoder_makes_the_sound_where_one_is_given(processor: Any, base: Path, tmp_path: Path) -> None:
    settings = TrainConfig(task="text-to-speech", synthesis=SynthesisConfig(vocoder=str(hifigan(tmp_path / "hifigan"))))
    model = tiny_model()
    task = SpeechSynthesis(settings, model, processor, {})
    (tmp_path / "texts.txt").write_text("aeio\n")
    (row,) = texts(str(tmp_path / "texts.txt"), settings.synthesis, processor, task.limits, None, name="texts.txt")
    assert isinstance(row, SynthesisRow)
    sound = task.say(task.engine(lb.attach(model)), "base", row)
    plain = SpeechSynthesis(TrainConfig(task="text-to-speech"), tiny_model(), processor, {})
    other = plain.say(plain.engine(lb.attach(plain.model)), "base", row)
    assert sound.ndim == 1 and len(sound) * 64 == len(other)  # 4 samples a frame, not 256
    for wrong, message in ((tmp_path / "nowhere", r"'.*nowhere': no .* Name the folder or hub id of a"), (base, "")):
        settings = TrainConfig(task="text-to-speech", synthesis=SynthesisConfig(vocoder=str(wrong)))
        with pytest.raises(ModelError, match=rf"^synthesis\.vocoder {message}"):
            SpeechSynthesis(settings, tiny_model(), processor, {})


def test_griffin_lim_gives_the_spectrum_back(processor: Any) -> None:
    sound = tones("aeioaeio")
    features = processor.feature_extractor
    mel = torch.from_numpy(features(audio_target=sound, sampling_rate=RATE)["input_values"][0])
    again = features(audio_target=griffin_lim(mel, features), sampling_rate=RATE)["input_values"][0]
    count = min(len(mel), len(again))
    loud = mel[:count] > mel.max() - 2
    error = np.abs(mel[:count].numpy() - again[:count])[loud.numpy()].mean()
    assert loud.sum() > 40 and error < 0.15


def test_nan_follows_its_setting_and_slips_are_noted(processor: Any) -> None:
    task = SpeechSynthesis(TrainConfig(task="text-to-speech"), tiny_model(), processor, {})
    rows = spoken_rows(6)
    rows[0]["text"], rows[1]["text"] = "NaN", float("nan")
    loud = {"array": rows[2]["audio"]["array"] * 32768, "sampling_rate": RATE}
    rows[2] |= {"audio": loud}

    def read(**data: Any) -> Any:
        config = TrainConfig(task="text-to-speech", data=DataConfig(val_split=0, **data))
        return task.read(config, RowObjects(train=rows)).by_adapter["default"]

    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 6 recordings"):
        read()
    for row in rows:
        row["speaker"] = float("nan")
    with pytest.raises(DataError, match=r"5 × column 'speaker' holds NaN"):
        read(group_by="speaker")
    found = read(nan_rows="drop", bad_rows="stop")
    assert list(found.report.dropped) == ["column 'text' holds NaN"]
    assert len(found.train) == 5 and found.train[0].text == "NaN"
    words, far = found.report.notes.items()
    assert "trained as that word" in words[0] and words[1].origins == ("row 1 of the train rows given",)
    assert "divided by 32,768" in far[0] and far[1].origins == ("row 3 of the train rows given",)


def test_rows_that_cannot_be_used_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFFnothing")
    bad = [
        {"audio": str(tmp_path / "gone.wav"), "text": "a"},
        {"audio": str(tmp_path / "broken.wav"), "text": "a"},
        {"audio": spoken_rows(1)[0]["audio"], "text": " "},
        {"audio": spoken_rows(1)[0]["audio"], "text": "half \ud83d"},
        {"audio": spoken_rows(1)[0]["audio"], "text": "a", "speaker_embedding": [1.0]},
        {"audio": spoken_rows(1)[0]["audio"], "text": "a", "speaker_embedding": ["x", "y", "z", "w"]},
        {"audio": spoken_rows(1)[0]["audio"], "text": "a", "speaker_embedding": [1e40] * 4},
        {"audio": {"array": np.tile(tones("aeio"), 90), "sampling_rate": RATE}, "text": "a"},
    ]
    output = tmp_path / "run"
    lb.train(model=str(base), data=[*spoken_rows(6), *bad], output=str(output), **{**SETTINGS, "max_steps": 1})
    report = (output / "data_report.json").read_text()
    for reason in ("no text", "half of a surrogate pair", "longer than 20 s", "expected 4 numbers", "gone.wav", "broken.wav"):
        assert reason in report
    assert '"read": 14,' in report and '"kept": 6,' in report
    with pytest.raises(DataError, match="8 of 14 recordings can't be used"):
        lb.train(model=str(base), data=[*spoken_rows(6), *bad], bad_rows="stop", **SETTINGS)
    with pytest.raises(DataError, match="none of the 8 recordings"):
        lb.train(model=str(base), data=bad, **SETTINGS)
    with pytest.raises(ConfigError, match="is in the postnet"):
        lb.train(model=str(base), data=spoken_rows(6), targets=["all-linear", "all-conv"], **SETTINGS)
    with pytest.raises(ConfigError, match=r"expected some of loss, mae, got 'wer'"):
        lb.train(model=str(base), data=spoken_rows(6), **{**SETTINGS, "eval": {"metrics": ["wer"]}})
