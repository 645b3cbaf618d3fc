"""Runs whose adapters start from data, from the base weight, or from the weights before quantisation."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lorabank as lb
from lorabank.errors import ConfigError, DataError
from lorabank.formats.adapter import Adapter
from tests.training.children import train_in_child
from tests.training.tiny import assert_same_run, tiny_rows


def test_killed_and_resumed(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(base_folder),
        "data": {"train": str(rows_file), "val_split": 6},
        "output": "out",
        "batch_size": 4,
        "rank": 4,
        "learning_rate": 5e-3,
        "max_steps": 6,
        "adapters": {"spectral": {"init": "pissa", "dropout": 0.2}, "data": {"init": "eva"}, "fast": {"init": "pissa_niter_2"}},
        "eval": {"every": 0, "samples": 0},
        "save": {"every": 3, "keep": 2},
        "threads": 1,
        "seed": 1,
    }
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert train_in_child(tmp_path / "whole", settings) == 0
    assert train_in_child(tmp_path / "killed", settings, moment=("step", 5)) == -signal.SIGKILL
    assert train_in_child(tmp_path / "killed", settings, resume=True) == 0
    assert_same_run(tmp_path / "killed" / "out", tmp_path / "whole" / "out")
    spectral = Adapter.load(tmp_path / "whole" / "out" / "spectral")
    assert {(layer.rank, layer.frozen_rank) for layer in spectral.layers.values()} == {(8, 4)}
    data = Adapter.load(tmp_path / "whole" / "out" / "data")
    assert sum(layer.rank for layer in data.layers.values()) == 4 * len(data.layers)


def test_loftq_reads_the_unquantised_model_again(base_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="base_dtype fp8: no fp8 products here")
        result = lb.train(
            model=str(base_folder),
            data=tiny_rows(),
            base_dtype="fp8",
            adapters={"plain": {}, "loftq": {"init": "loftq"}},
            rank=16,
            max_steps=1,
            learning_rate=1e-30,
            eval={"samples": 0},
        )
    started = result.trained["loftq"]
    assert all(bool(layer.B.any()) for layer in started.layers.values())
    assert not any(bool((layer.B.abs() > 1e-20).any()) for layer in result.trained["plain"].layers.values())


def test_what_a_run_cant_prepare_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    common: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "max_steps": 1}
    with pytest.raises(ConfigError, match=r"adapters.default.init: 'loftq' needs the model as it was before quantisation"):
        lb.train(data=tiny_rows(), init="loftq", **common)
    with pytest.raises(DataError, match=r"adapters.default.init: eva: layer .* needs more than 32 tokens that count"):
        lb.train(data=tiny_rows(2), init="eva", rank=16, val_split=0, **common)
