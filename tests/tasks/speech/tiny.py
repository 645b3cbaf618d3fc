"""A tiny Whisper with a byte-level tokenizer, English-only or with three languages, and recordings made of tones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from lorabank.config.speech import SpeechConfig
from lorabank.tasks.speech.tokens import SpeechTokens, speech_tokens

LANGUAGES = ("en", "zh", "de")
WINDOW_S = 2
RATE = 16_000


@cache
def tiny_tokenizer_json(multilingual: bool) -> str:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in (*names, "notimestamps")])
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(50 * WINDOW_S + 1)])
    return tokenizer.to_str()


def tiny_whisper(*, multilingual: bool = False, width: int = 16, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) that hear two seconds."""
    tokenizer = WhisperTokenizer(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer_json(multilingual)), pad_token="<|endoftext|>"
    )
    known = tokenizer.get_vocab()
    end, start = known["<|endoftext|>"], known["<|startoftranscript|>"]
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=len(known),
        num_mel_bins=8,
        d_model=width,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_source_positions=50 * WINDOW_S,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # tokens far apart, so that an adapter learns to tell them in few steps
            parameter.data = torch.randn_like(parameter) * (0.6 if "embed" in name else 0.15)
    generation: Any = model.generation_config
    generation.is_multilingual = multilingual
    generation.no_timestamps_token_id = known["<|notimestamps|>"]
    generation.max_initial_timestamp_index = 50
    generation.begin_suppress_tokens = [end]
    generation.suppress_tokens = list(range(start, known["<|notimestamps|>"] + 1))
    if multilingual:
        generation.lang_to_id = {f"<|{code}|>": known[f"<|{code}|>"] for code in LANGUAGES}
        generation.task_to_id = {task: known[f"<|{task}|>"] for task in ("translate", "transcribe")}
    features = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=160, chunk_length=WINDOW_S, n_fft=400)
    return model, WhisperProcessor(features, tokenizer)


def tiny_tokens(config: SpeechConfig | None = None, *, multilingual: bool = False) -> SpeechTokens:
    model, processor = tiny_whisper(multilingual=multilingual)
    return speech_tokens(processor.tokenizer, model, config or SpeechConfig())


def tone(seconds: float, pitch: float, rate: int = RATE, *, seed: int = 0) -> np.ndarray:
    """A tone with a little noise, so that no two are alike."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed + round(pitch)).standard_normal(len(t)) * 0.01
    return (0.3 * np.sin(2 * np.pi * pitch * t) + noise).astype(np.float32)


def audio_folder(folder: Path, rows: Sequence[tuple[str, np.ndarray, str]], rate: int = RATE, header: str = "") -> Path:
    """A folder as `datasets` has it: recordings and metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header or "file_name,transcription"]
    for name, samples, text in rows:
        soundfile.write(folder / name, samples, rate)
        lines.append(f'{name},"{text}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def two_tones(folder: Path, count: int = 8, words: Mapping[float, str] | None = None) -> Path:
    """Recordings of one word each, which the pitch tells."""
    words = words or {300.0: "low", 1200.0: "high"}
    pitches = list(words)
    rows = [
        (f"{i}.wav", tone(0.3 + 0.02 * i, pitches[i % len(pitches)], seed=i), words[pitches[i % len(pitches)]])
        for i in range(count)
    ]
    return audio_folder(folder, rows)
