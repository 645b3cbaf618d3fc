"""Tiny random models, as transformers has them and as GGUF files of our own writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TOKENS = 261
WIDTH, HEADS, BLOCKS, LENGTH, EXPERTS = 64, 4, 2, 256, 4
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": TOKENS}


def gpt2(file: Path) -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers transformers stores transposed; also written to `file`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=LENGTH, **ENDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    writer = _writer(file, "gpt2", 4 * WIDTH)
    writer.add_layer_norm_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, BLOCKS)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # the embedding
            stem, _, suffix = name.rpartition(".")
            stored = value.t() if ".h." in name and value.ndim == 2 else value
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(stored.numpy()))
    _close(writer)
    return model


def llama(file: Path) -> LlamaForCausalLM:
    """A Llama with an output head of its own; also written to `file`, with the rows of q and k interleaved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        **ENDS,
    )
    model = LlamaForCausalLM(config).eval()
    writer = _writer(file, "llama", 96)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, value in model.state_dict().items():
        heads = HEADS if "q_proj" in name else 2 if "k_proj" in name else None
        rows = value if heads is None else value.reshape(heads, 2, -1, WIDTH).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(rows.numpy()))
    _close(writer)
    return model


def mixture(file: Path, kind: str = "qwen3_moe") -> Any:
    """A mixture of four experts, two a token; also written to `file`, where gate, up and down are three stacks.

    kind: `qwen3_moe`, or `mixtral`, which llama.cpp has as a Llama.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    own: dict[str, Any] = {
        "qwen3_moe": {"moe_intermediate_size": 96, "num_experts": EXPERTS, "head_dim": WIDTH // HEADS, "norm_topk_prob": True},
        "mixtral": {"intermediate_size": 96, "num_local_experts": EXPERTS},
    }[kind]
    config = CONFIG_MAPPING[kind](
        **sizes, **own, **ENDS, num_experts_per_tok=2, max_position_embeddings=LENGTH, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a router of tiny weights takes experts by rounding
        for name, parameter in model.named_parameters():
            parameter.mul_(20.0 if name.endswith("mlp.gate.weight") else 2.0 if parameter.ndim > 1 else 1.0)
    architecture = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}[kind]
    writer = _writer(file, architecture, 96)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(96)
    names = gguf.get_tensor_name_map({value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], BLOCKS)
    for name, value in model.state_dict().items():
        heads = None if kind != "mixtral" else HEADS if "q_proj" in name else 2 if "k_proj" in name else None
        rows = value if heads is None else value.reshape(heads, 2, -1, WIDTH).transpose(1, 2).reshape(value.shape)
        stem = name.removesuffix(".weight")
        halves = {stem: rows}
        if stem.endswith("gate_up_proj"):
            halves = dict(zip((stem.replace("gate_up", "gate"), stem.replace("gate_up", "up")), rows.chunk(2, 1), strict=True))
        for part, numbers in halves.items():
            writer.add_tensor(f"{names.get_name(part)}.weight", np.ascontiguousarray(numbers.numpy()))
    _close(writer)
    return model


def _writer(file: Path, architecture: str, inner: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = [f"t{i}" for i in range(TOKENS)]  # ids go in and come out
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (TOKENS - 3))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
