"""Ways of training that change memory or storage and not the result, and languages side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorabank as lb
from tests.tasks.speech.test_task import SETTINGS, tensors
from tests.tasks.speech.tiny import audio_folder, tiny_whisper, tone, two_tones

SHORT: dict[str, Any] = {**SETTINGS, "max_steps": 3, "eval": {"every": 0, "max_new_tokens": 8}}


@pytest.mark.parametrize("window", [0.5, 30.0])
def test_checkpointed_activations_give_the_same_adapter(tmp_path: Path, window: float) -> None:
    folder = str(two_tones(tmp_path, 8))
    found = []
    for more in ({}, {"gradient_checkpointing": True}):
        model, processor = tiny_whisper()
        how = {**SHORT, "speech": {"window": window}, "dropout": 0.1, **more}
        found.append(lb.train(model=model, tokenizer=processor, data=folder, **how).trained["default"])
    for one, other in zip(*map(tensors, found), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_accumulated_steps_count_tokens(tmp_path: Path) -> None:
    """Two micro-batches of two recordings are a batch of four: each transcript weighs as many tokens as it has."""
    folder = str(two_tones(tmp_path, 6, {300.0: "a", 1200.0: "much longer"}))
    found = []
    for more in ({"batch_size": 4}, {"batch_size": 2, "gradient_accumulation": 2}):
        model, processor = tiny_whisper()
        how = {**SHORT, "max_steps": 1, **more}
        found.append(lb.train(model=model, tokenizer=processor, data=folder, **how).trained["default"])
    for one, other in zip(*map(tensors, found), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_base_in_bf16_trains_fp32_adapters(tmp_path: Path) -> None:
    model, processor = tiny_whisper()
    how = {**SHORT, "max_steps": 20, "data": str(two_tones(tmp_path, 8))}
    result = lb.train(model=model.to(torch.bfloat16), tokenizer=processor, **how)
    mine = result.adapters["default"]
    assert mine.best_metrics["loss"] < 0.5 * result.base_metrics["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in tensors(result.trained["default"]))


def test_adapters_of_two_languages_train_jointly_as_they_do_alone(tmp_path: Path) -> None:
    """A row's own language is in its labels and in what is generated."""
    rows = {
        name: [(f"{i}.wav", tone(0.3 + 0.02 * i, 300.0 + 900 * (i % 2), seed=i), words[i % 2]) for i in range(8)]
        for name, words in {"german": ("tief", "hoch"), "chinese": ("低", "高")}.items()
    }
    for name, own in rows.items():
        audio_folder(tmp_path / name, own)
        lines = [f"{file},{text},{name}" for file, _, text in own]
        (tmp_path / name / "metadata.csv").write_text("\n".join(["file_name,transcription,language", *lines]))
    adapters = {name: {"data": str(tmp_path / name)} for name in rows}

    def run(*names: str) -> Any:
        model, processor = tiny_whisper(multilingual=True, width=32)
        how = {**SHORT, "max_steps": 30, "eval": {"every": 0, "metrics": ["wer"], "max_new_tokens": 8}}
        return lb.train(model=model, tokenizer=processor, adapters={name: adapters[name] for name in names}, **how)

    joint = run(*rows)
    for name in rows:
        alone = run(name)
        for one, other in zip(tensors(joint.trained[name]), tensors(alone.trained[name]), strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-3)
        assert joint.adapters[name].best_metrics["wer"] == alone.adapters[name].best_metrics["wer"] == 0.0
