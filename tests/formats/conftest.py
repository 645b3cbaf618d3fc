"""Tiny random bases and adapters, built in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorabank.config.adapter import AdapterConfig
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.patterns import pattern_value

LLAMA_LEAVES = ("q_proj", "v_proj", "down_proj")
GPT2_LEAVES = ("attn.c_attn", "mlp.c_fc")


def llama(seed: int = 0, *, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes)).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).eval()


def adapter_of(
    model: nn.Module, leaves: tuple[str, ...], config: AdapterConfig, *, transposed: bool = False, seed: int = 7
) -> Adapter:
    """A random adapter, trained-like (B not zero), on every layer whose path ends with one of `leaves`."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, AdapterLayer] = {}
    for path, module in model.named_modules():
        if path.endswith(leaves):
            fan_out, fan_in = module.get_parameter("weight").shape[:: -1 if transposed else 1]
            rank = pattern_value(config.rank_pattern, path, config.rank)
            A = torch.randn(rank, fan_in, generator=generator) / math.sqrt(fan_in)
            B = torch.randn(fan_out, rank, generator=generator) / math.sqrt(rank)
            layers[path] = AdapterLayer(A, B, config.scaling(rank, pattern_value(config.alpha_pattern, path, config.alpha)))
    return Adapter(config=config, layers=layers, fingerprint=Fingerprint.of(model), base_model="tiny", task_type="CAUSAL_LM")


CONFIGS: dict[str, AdapterConfig] = {
    "plain": AdapterConfig(rank=4, alpha=8, targets=["q", "v_proj", "down_proj"]),
    "rslora": AdapterConfig(rank=4, alpha=6, use_rslora=True, init="gaussian", targets="all-linear", exclude=["k_proj"]),
    "patterns": AdapterConfig(
        rank=4,
        alpha=8,
        dropout=0.1,
        layers=[0, 1],
        rank_pattern={"down_proj": 2, r"layers\.1\..*\.q_proj": 6},
        alpha_pattern={"v_proj": 3.3},
    ),
    "rslora with patterns": AdapterConfig(
        rank=3, alpha=7, use_rslora=True, rank_pattern={"v_proj": 5}, alpha_pattern={r"0\.mlp.*": 1.7}
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def llama_case(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, Adapter]:
    """A tiny Llama and an adapter of it, for each way in which PEFT writes ranks and scalings."""
    model = llama()
    return model, adapter_of(model, LLAMA_LEAVES, request.param)


@pytest.fixture
def gpt2_case() -> tuple[GPT2LMHeadModel, Adapter]:
    """A tiny GPT-2, whose linear layers are stored transposed, and an adapter of it."""
    model = gpt2()
    return model, adapter_of(model, GPT2_LEAVES, AdapterConfig(rank=4, alpha=8, targets=["c_attn", "c_fc"]), transposed=True)


@pytest.fixture
def plain_adapter() -> Adapter:
    """An adapter of a tiny Llama."""
    return adapter_of(llama(), LLAMA_LEAVES, CONFIGS["plain"])


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a tiny Llama from a seed."""
    return llama
