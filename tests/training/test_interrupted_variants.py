"""Law 6 for adapters that are more than A and B of whole layers: killed and resumed, the run ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from lorabank import Adapter
from tests.training.children import train_in_child
from tests.training.tiny import assert_same_run, tiny_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "slices": {"rank": 4, "targets": ["q", "v", "gate_up_proj.up"], "rank_pattern": {"v": 3}, "dropout": 0.1},
    "plain": {"rank": 2},
}
"""Adapters of one run, over a model whose projections are fused."""


@pytest.fixture(scope="module")
def fused_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = Phi3Config(
        vocab_size=258, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=256, **ends, **sizes
    )
    folder = tmp_path_factory.mktemp("phi3")
    Phi3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_killed_and_resumed(fused_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(fused_folder),
        "data": {"train": str(rows_file)},
        "output": "out",
        "batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 7,
        "adapters": VARIANTS,
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
    assert {path.rpartition(".")[2]: layer.rank for path, layer in layers.items()} == {"q": 4, "v": 3, "up": 4}
