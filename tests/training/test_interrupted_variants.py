"""Law 6 for adapters that are more than A and B of whole layers: killed and resumed, the run ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from lorabank import Adapter
from tests.training.children import train_in_child
from tests.training.tiny import assert_same_run, tiny_tokenizer

ENDS = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
FUSED: dict[str, dict[str, Any]] = {
    "slices": {"rank": 4, "targets": ["q", "v", "gate_up_proj.up"], "rank_pattern": {"v": 3}, "dropout": 0.1},
    "plain": {"rank": 2},
    "decomposed": {"rank": 3, "targets": ["q", "v", "gate_up_proj.up", "embed_tokens"], "use_dora": True, "dropout": 0.1},
    "low": {"rank": 2, "targets": ["k", "gate_up_proj.gate"], "lora_bias": True, "weight_decay": 0.1},
    "pissa": {"rank": 4, "init": "pissa", "dropout": 0.1, "modules_to_save": ["model.norm"]},
    "approximate": {"rank": 4, "init": "pissa_niter_2", "lora_bias": True, "trainable_token_indices": [5, 70, 71]},
    "olora": {"rank": 3, "init": "olora", "loraplus_ratio": 4},
    "eva": {"rank": 2, "init": "eva", "targets": ["o_proj", "down_proj"]},
    "orthogonal": {"rank": 4, "init": "orthogonal", "lora_bias": True, "dropout": 0.1},
    "sliced-pissa": {"rank": 4, "init": "pissa", "targets": ["q", "v"], "rank_pattern": {"v": 3}, "dropout": 0.1},
    "sliced-eva": {"rank": 2, "init": "eva", "targets": ["q", "gate_up_proj.up"]},
    "headed": {"rank": 2, "modules_to_save": ["lm_head"], "gradient_accumulation": 2, "weight_decay": 0.1},
    "rows": {"rank": 2, "trainable_token_indices": [40, 5], "modules_to_save": ["lm_head"], "targets": ["q", "v"]},
}
"""Adapters of one run, over a model whose projections are fused."""
BIASED: dict[str, dict[str, Any]] = {
    "both": {"rank": 2, "bias": "lora_only", "lora_bias": True, "dropout": 0.1},
    "slices": {"rank": 4, "targets": ["q", "v"], "bias": "lora_only", "weight_decay": 0.1},
    "all": {"rank": 2, "bias": "all", "trainable_token_indices": [5, 70]},
    "pissa": {"rank": 4, "init": "pissa", "dropout": 0.1, "bias": "lora_only", "gradient_accumulation": 2},
    "dora": {"rank": 2, "use_dora": True, "bias": "lora_only", "exclude": ["mlp"]},
}
"""The same over a model with biases, whose head is its embedding."""
QUANTISED: dict[str, dict[str, Any]] = {
    "slices": {"rank": 4, "targets": ["q", "v"], "init": "loftq", "weight_decay": 0.1},
    "loftq": {"rank": 4, "init": "loftq", "dropout": 0.1, "gradient_accumulation": 2},
    "pissa": {"rank": 2, "init": "pissa", "loraplus_ratio": 4},
}
"""The same over a base in fp8."""


RUNS = {"fused": FUSED, "biased": BIASED, "quantised": QUANTISED}


def _base(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "biased":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, **ENDS)
        )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3ForCausalLM(
        Phi3Config(vocab_size=258, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=256, **ENDS, **sizes)
    )


@pytest.mark.parametrize("family", list(RUNS))
def test_killed_and_resumed(family: str, rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    _base(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = {
        "model": str(folder),
        "data": {"train": str(rows_file)},
        "output": "out",
        "batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 7,
        "adapters": RUNS[family],
        "base_dtype": "fp8" if family == "quantised" else "auto",
        "save": {"every": 3, "keep": 1},
        "threads": 1,
        "seed": 1,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert train_in_child(whole, settings) == 0
    assert train_in_child(cut, settings, moment=("step", 5)) != 0
    assert train_in_child(cut, settings, resume=True) == 0
    assert_same_run(whole / "out", cut / "out")
    layers = Adapter.load(cut / "out" / "slices").layers
    if family == "fused":
        for name in ("decomposed", "low"):
            parts = {path.rpartition(".")[2]: layer for path, layer in Adapter.load(cut / "out" / name).layers.items()}
            assert all((part.lora_bias if name == "low" else part.magnitude) is not None for part in parts.values())
            assert parts.keys() == ({"k", "gate"} if name == "low" else {"q", "v", "up", "embed_tokens"})
    ranks = {"fused": {"q": 4, "v": 3, "up": 4}, "biased": {"q": 4, "v": 4}, "quantised": {"q": 4, "v": 4}}
    assert {path.rpartition(".")[2]: layer.rank for path, layer in layers.items()} == ranks[family]
