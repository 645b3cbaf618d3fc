"""A transformers model as GGUF: read back by transformers, weights and tokenizer; what isn't known is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lorabank as lb
from lorabank.cli import main
from lorabank.errors import ModelError
from lorabank.formats.gguf_adapter import places
from lorabank.formats.gguf_base import read_base
from lorabank.models.gguf_tokenizer import SPLITS, pre_tokenizer
from lorabank.models.gguf_write import write_model_gguf

TEXT = "Hello, wörld 123! It's  two\n\nlines."
RULES: dict[str, tuple[Any, Any]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    **{
        name: (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(regex), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            normalizers.NFC() if name == "qwen2" else None,
        )
        for regex, name in SPLITS.items()
    },
}


def tokenizer_of(rule: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "e"), ("l", "o"), ("Ġ", "w"), ("1", "2")]
    words = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(BPE(vocab={token: index for index, token in enumerate(words)}, merges=merges))
    splits, normalizer = RULES[rule]
    made.pre_tokenizer, made.decoder = splits, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


def folder_of(folder: Path, kind: str = "llama", *, rule: str = "smollm", dtype: str = "float32", **more: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 270,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**sizes, **more})).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    tokenizer_of(rule).save_pretrained(folder)
    return model


def write(folder: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_model_gguf(model, AutoTokenizer.from_pretrained(folder), folder, file, where="tiny")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model_back(kind: str, tied: bool, tmp_path: Path) -> None:
    width = {"head_dim": 128} if kind == "qwen3" else {}  # transformers reads no other from a GGUF file
    model = folder_of(tmp_path / "base", kind, tie_word_embeddings=tied, **width)
    write(tmp_path / "base", tmp_path / "a.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype="float32")
    x = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_splitting_is_known_and_named(rule: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "base", rule=rule)
    write(tmp_path / "base", tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    said = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    tokenizer = tokenizer_of(rule)
    assert said["ggml.pre"] == rule
    assert said["ggml.model"] == "gpt2"
    assert said["ggml.tokens"][:262] == tokenizer.convert_ids_to_tokens(list(range(262)))
    assert said["ggml.tokens"][262] == "[PAD262]"  # rows of the embedding without a token
    assert said["ggml.merges"] == ["H e", "l o", "Ġ w", "1 2"]
    assert (said["ggml.bos_token_id"], said["ggml.eos_token_id"], said["ggml.add_bos_token"]) == (0, 1, False)
    assert said["chat_template"] == tokenizer.chat_template
    assert said["ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL]
    assert said["ggml.token_type"][-1] == gguf.TokenType.UNUSED


def test_other_rules_are_not_guessed() -> None:
    data = json.loads(tokenizer_of("qwen2").backend_tokenizer.to_str())
    assert pre_tokenizer(data) == "qwen2"
    assert pre_tokenizer({**data, "normalizer": None}) is None
    assert pre_tokenizer({**data, "model": {**data["model"], "byte_fallback": True}}) is None
    steps = data["pre_tokenizer"]["pretokenizers"]
    steps[0]["pattern"]["Regex"] += "|x"
    assert pre_tokenizer(data) is None


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "g", "gemma")
    with pytest.raises(ModelError, match=r"how a 'gemma' model is written as GGUF isn't known here.*convert_hf_to_gguf.py"):
        write(tmp_path / "g", tmp_path / "a.gguf")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder_of(tmp_path / "r", rope_parameters=rope)
    with pytest.raises(ModelError, match="positions are of the kind 'dynamic'"):
        write(tmp_path / "r", tmp_path / "a.gguf")
    folder_of(tmp_path / "m", "qwen3_moe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)
    with pytest.raises(ModelError, match=r"llama\.cpp always normalises the weights"):
        write(tmp_path / "m", tmp_path / "a.gguf")
    folder_of(tmp_path / "t")
    whole = tokenizer_of("smollm")
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.save_pretrained(tmp_path / "t")
    with pytest.raises(ModelError, match="no byte-level BPE whose rule of splitting"):
        write(tmp_path / "t", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_llama3_positions_are_divided_as_transformers_does(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    model = folder_of(tmp_path / "base", rope_parameters={**rope, "original_max_position_embeddings": 32})
    write(tmp_path / "base", tmp_path / "a.gguf")
    found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    plain = 5e5 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(found["rope_freqs.weight"]), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_merges_into_a_folder(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "base", dtype=dtype)
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=2, alpha=4))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_(std=0.3)
    adapter = bank.adapter("a")
    adapter.save(tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--to", "gguf", "--merged", "--base", str(tmp_path / "base")]
    assert main([*words, "--dtype", "fp32", "--output", str(tmp_path / "m.gguf")]) == 0
    assert "14 weights changed" in capsys.readouterr().out
    assert len(places(adapter, read_base(tmp_path / "m.gguf"))) == 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    lb.merge(model, adapter, say=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32")
    x = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "base", "m.gguf"]  # no scratch is left
