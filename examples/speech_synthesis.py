"""Two voices over one tiny SpeechT5, in one pass: letters said as tones, one voice a fifth above the other. No download.

python examples/speech_synthesis.py            # about a minute; listen to out/tones/samples
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import SpeechT5Config, SpeechT5FeatureExtractor, SpeechT5ForTextToSpeech, SpeechT5Processor, SpeechT5Tokenizer

import lorabank as lb

RATE, TONES = 16000, {"a": 300.0, "e": 450.0, "i": 700.0, "o": 1000.0}


def voice(count: int, pitch: float) -> list[dict[str, Any]]:
    """Words of three to five letters, 80 ms each."""
    numbers = np.random.default_rng(round(pitch * 100))
    t = np.arange(round(0.08 * RATE)) / RATE
    rows = []
    for _ in range(count):
        word = "".join(numbers.choice(list(TONES), size=numbers.integers(3, 6)))
        sound = np.concatenate(
            [0.4 * np.sin(2 * np.pi * TONES[letter] * pitch * t) * np.sin(np.pi * t / t[-1]) for letter in word]
        )
        rows.append({"audio": {"array": sound.astype(np.float32), "sampling_rate": RATE}, "text": word})
    return rows


def letters(folder: Path) -> SpeechT5Processor:
    """A tokenizer of letters and spectra of forty bins."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a e i o aeio oiea"] * 20),
        model_writer=made,
        vocab_size=12,
        model_type="char",
        hard_vocab_limit=False,
        pad_id=1,
        bos_id=0,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "spm_char.model").write_bytes(made.getvalue())
    features = SpeechT5FeatureExtractor(num_mel_bins=40, sampling_rate=RATE)
    return SpeechT5Processor(features, SpeechT5Tokenizer(vocab_file=str(folder / "spm_char.model")))


def main(output: str = "out/tones", steps: int = 120) -> None:
    torch.manual_seed(0)
    config = SpeechT5Config(
        vocab_size=40,
        hidden_size=64,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        num_mel_bins=40,
        speech_decoder_prenet_units=64,
        speech_decoder_postnet_units=32,
        speaker_embedding_dim=8,
        reduction_factor=2,
        initializer_range=0.1,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = lb.train(
            model=SpeechT5ForTextToSpeech(config).eval().requires_grad_(False),  # random: use a pretrained one for real work
            tokenizer=letters(Path(folder)),
            task="text-to-speech",
            output=output,
            adapters={"low": {"rank": 16}, "high": {"rank": 16}},
            data={"low": voice(60, 1.0), "high": voice(60, 1.5)},
            learning_rate=4e-3,
            batch_size=8,
            max_steps=steps,
            val_split=0.1,
            eval={"every": 40, "metrics": ["loss", "mae"], "samples": 2},
        )
    for name, adapter in result.adapters.items():
        before = result.base_metrics_of[name]["mae"]
        print(f"{name}: error of the spectrum {before:.3f} before, {adapter.best_metrics['mae']:.3f} after")
    print(f"listen to {Path(output) / 'samples'}")


if __name__ == "__main__":
    main()
