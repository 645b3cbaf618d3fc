"""Layers that an adapter's targets mean and that it has nothing for are named: as it is loaded, and as it is merged."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorabank import Adapter, AdapterConfig, attach, merge, merge_folder
from lorabank.bank.missing import missing_layers
from lorabank.formats.adapter import AdapterLayer
from tests.bank.tiny import MODELS, add, gpt2, llama, mixtral, two

LOST = "model.layers.1.self_attn.v_proj"


def test_a_file_of_pefts_that_lost_a_layer(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if LOST not in key}, path)
    adapter = Adapter.load(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    uses = (
        lambda: attach(llama()).load("a", adapter),
        lambda: merge(llama(), adapter, say=None),
        lambda: merge_folder(tmp_path / "base", adapter, tmp_path / "merged", say=None),
    )
    for use in uses:
        with pytest.warns(UserWarning, match=rf"mean 1 more layers of this model than it has A and B for \('{LOST}'\)\. They"):
            use()


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_missing_of_what_a_bank_made(kind: str) -> None:
    model, bank = two(kind)
    assert not missing_layers(model, replace(bank.adapter("a"), fingerprint=None))


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({"targets": ["q", "v"]}, "transformer.h.0.attn.c_attn.v"),
        ({"targets": "all-linear", "layers": [1]}, "transformer.h.1.mlp.c_fc"),
        ({"targets": "all-linear", "exclude": ["c_fc"]}, "transformer.h.1.mlp.c_proj"),
        ({"targets": ["wte", "q"]}, "transformer.wte"),
    ],
)
def test_one_that_was_taken_out_is_named(config: dict[str, Any], lost: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied|.*weight of")
        bank = attach(gpt2())
        add(bank, "a", **config)
    adapter = replace(bank.adapter("a"), fingerprint=None)
    assert not missing_layers(gpt2(), adapter)
    layers: dict[str, AdapterLayer] = {path: layer for path, layer in adapter.layers.items() if path != lost}
    assert missing_layers(gpt2(), replace(adapter, layers=layers)) == [lost]


def test_what_is_trained_in_full_or_beside_the_base_isnt_missed() -> None:
    bank = attach(llama(), keep_trainable="k_proj")
    bank.add("a", AdapterConfig(rank=2, targets=["attention", "mlp"], modules_to_save=["down_proj"]))
    adapter = replace(bank.adapter("a"), fingerprint=None)
    assert not missing_layers(llama(), adapter, kept=bank.kept)
    assert len(missing_layers(llama(), adapter)) == 2
    assert not missing_layers(llama(), bank.adapter("a"))  # a fingerprint tells that it is whole


def test_a_stack_of_experts() -> None:
    bank = attach(mixtral())
    add(bank, "a", targets=["experts"])
    adapter = replace(bank.adapter("a"), fingerprint=None)
    layers = {path: layer for path, layer in adapter.layers.items() if ".down_proj." not in path}
    assert missing_layers(mixtral(), replace(adapter, layers=layers)) == ["model.layers.0.mlp.experts.down_proj"]
