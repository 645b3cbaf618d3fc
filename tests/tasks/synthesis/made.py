"""A tiny SpeechT5 with a tokenizer of letters, and recordings of tones that say their letters."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import SpeechT5Config, SpeechT5FeatureExtractor, SpeechT5ForTextToSpeech, SpeechT5Processor, SpeechT5Tokenizer

RATE = 16000
NOTES = {"a": 300.0, "e": 500.0, "i": 800.0, "o": 1200.0}


def tiny_processor(folder: Path) -> SpeechT5Processor:
    """Of letters; twenty mel bins."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a e i o ae io oi ea aeio", "oiea"] * 20),
        model_writer=model,
        vocab_size=12,
        model_type="char",
        hard_vocab_limit=False,
        pad_id=1,
        bos_id=0,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    file = folder / "spm_char.model"
    file.write_bytes(model.getvalue())
    features = SpeechT5FeatureExtractor(num_mel_bins=20, sampling_rate=RATE)
    return SpeechT5Processor(features, SpeechT5Tokenizer(vocab_file=str(file)))


def tiny_model(seed: int = 0) -> SpeechT5ForTextToSpeech:
    """Two blocks of width 32; in eval mode, random."""
    torch.manual_seed(seed)
    config = SpeechT5Config(
        vocab_size=40,
        hidden_size=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        num_mel_bins=20,
        speech_decoder_prenet_units=24,
        speech_decoder_postnet_units=16,
        speech_decoder_postnet_layers=3,
        speaker_embedding_dim=4,
        max_text_positions=40,
        max_speech_positions=400,
        reduction_factor=2,
        initializer_range=0.1,
    )
    return SpeechT5ForTextToSpeech(config).eval().requires_grad_(False)


def saved_model(folder: Path) -> Path:
    """With its processor."""
    tiny_processor(folder / "spm").save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder


def tones(word: str, shift: float = 1.0) -> np.ndarray:
    """60 ms a letter."""
    t = np.arange(round(0.06 * RATE)) / RATE
    return np.concatenate([0.4 * np.sin(2 * np.pi * NOTES[letter] * shift * t) for letter in word]).astype(np.float32)


def spoken_rows(count: int, shift: float = 1.0, speaker: list[float] | None = None) -> list[dict[str, Any]]:
    """Rows with samples in memory."""
    letters = "aeio"
    words = ["".join(letters[(i * 7 + j * (1 + i % 3)) % 4] for j in range(3 + i % 3)) for i in range(count)]
    rows: list[dict[str, Any]] = []
    for i, word in enumerate(words):
        sound = tones(word, shift) * (1 - 0.01 * i)
        rows.append({"audio": {"array": sound, "sampling_rate": RATE}, "text": word})
        if speaker is not None:
            rows[-1]["speaker_embedding"] = speaker
    return rows
