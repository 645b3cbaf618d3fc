"""SpecAugment's masks: of a row's own draw, within what holds audio, as many as said, and none in evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorabank as lb
from lorabank.config.speech import SpeechConfig
from lorabank.errors import ConfigError
from lorabank.tasks.speech.masking import masked, spans
from tests.tasks.speech.tiny import tiny_whisper, two_tones

TIME = SpeechConfig(mask_time_prob=0.2, mask_time_length=5)
WORDS = {"a": {300.0: "low", 1200.0: "high"}, "b": {500.0: "in", 900.0: "out"}}
BINS = SpeechConfig(mask_feature_prob=0.5, mask_feature_length=2)


def test_time_is_masked_within_the_audio_alone() -> None:
    features = torch.ones(64, 8, 100)
    found = masked(features, [60] * 64, list(range(1, 65)), TIME)
    assert bool((features == 1).all())  # what is kept for later passes isn't written to
    assert bool((found[:, :, 60:] == 1).all())
    assert bool((found.std(1) == 0).all())  # whole frames
    share = (found[:, 0, :60] == 0).float().mean().item()
    assert 0.12 < share < 0.2  # 12 frames of 60 but for overlaps: 1 − (1 − 5/60)^2.4 ≈ 0.18 inside


def test_bins_are_masked_over_the_whole_time() -> None:
    found = masked(torch.ones(64, 8, 20), [20] * 64, list(range(1, 65)), BINS)
    assert bool((found.std(2) == 0).all())
    assert 0.3 < (found[:, :, 0] == 0).float().mean().item() < 0.5


def test_a_rows_masks_are_its_own() -> None:
    features = torch.ones(3, 8, 100)
    both = SpeechConfig(mask_time_prob=0.2, mask_time_length=5, mask_feature_prob=0.5, mask_feature_length=2)
    together, alone = masked(features, [100] * 3, [7, 8, 7], both), masked(features[:1], [100], [8], both)
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(masked(features, [100] * 3, [0, 0, 0], both), features)


def test_the_number_of_spans_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [len(spans(0.05, 10, 90, generator)) for _ in range(4000)]
    assert set(counts) == {0, 1}
    assert sum(counts) / len(counts) == pytest.approx(0.45, abs=0.03)
    assert spans(0.5, 10, 9, generator) == []


def test_joint_training_with_masks_is_training_alone(tmp_path: Path) -> None:
    """Law 3, over two steps; and the masks do change what is learned."""
    rows = {name: str(two_tones(tmp_path / name, 4, words)) for name, words in WORDS.items()}
    settings: dict[str, Any] = {
        "task": "automatic-speech-recognition", "learning_rate": 1e-2, "batch_size": 2, "max_steps": 2, "val_split": 0,
    }  # fmt: skip

    def learned(names: Sequence[str], share: float) -> dict[str, torch.Tensor]:
        model, processor = tiny_whisper()
        adapters = {name: {"rank": 2, "data": rows[name]} for name in names}
        speech = {"window": 0.5, "mask_time_prob": share, "mask_time_length": 5}
        result = lb.train(model=model, tokenizer=processor, adapters=adapters, speech=speech, **settings)
        return {path: layer.B for path, layer in result.trained["a"].layers.items()}

    alone, plain = learned(["a"], 0.2), learned(["a"], 0.0)
    for path, layer in learned(["a", "b"], 0.2).items():
        torch.testing.assert_close(layer, alone[path], atol=2e-5, rtol=2e-4)
    assert max(float((layer - plain[path]).abs().max()) for path, layer in alone.items()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_time_prob": 1.5}, r"mask_time_prob: .*\[0, 1\)"),
        ({"mask_time_length": 0}, r"mask_time_length"),
        ({"mask_feature_prob": 0.1}, r"speech\.mask_feature_length: at most this model's 8 Mel bins, got 10"),
    ],
)
def test_wrong_masks_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model, processor = tiny_whisper()
    data = str(two_tones(tmp_path / "rows", 4))
    with pytest.raises(ConfigError, match=message):
        lb.train(model=model, tokenizer=processor, task="automatic-speech-recognition", data=data, speech=settings, max_steps=1)
