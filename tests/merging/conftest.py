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

MakeAdapter = Callable[..., Adapter]


def llama(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=tied, **sizes)).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny base: one with nn.Linear, one whose weights are stored transposed (c_proj of attention is square)."""
    return llama() if request.param == "llama" else gpt2()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a tiny Llama from a seed."""
    return llama


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """Builds a random adapter of a model, its B not zero."""

    def make(
        model: nn.Module,
        leaves: tuple[str, ...] = ("q_proj", "down_proj", "c_attn", "c_proj"),
        *,
        rank: int = 4,
        seed: int = 7,
        size: float = 0.1,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        layers: dict[str, AdapterLayer] = {}
        for path, module in model.named_modules():
            if path.endswith(leaves):
                shape = module.get_parameter("weight").shape
                fan_out, fan_in = shape if isinstance(module, nn.Linear) else shape[::-1]
                A = torch.randn(rank, fan_in, generator=generator) / math.sqrt(fan_in)
                layers[path] = AdapterLayer(A, size * torch.randn(fan_out, rank, generator=generator), 2.0)
        config = AdapterConfig(rank=rank, alpha=2.0 * rank, targets=leaves)
        return Adapter(config=config, layers=layers, fingerprint=Fingerprint.of(model), base_model="tiny", task_type="CAUSAL_LM")

    return make
