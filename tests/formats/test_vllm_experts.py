"""Stacked experts for vLLM: the names of each family, every part of every expert, the same change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lorabank as lb
from lorabank.cli import main
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter
from lorabank.formats.readers import obstacles
from lorabank.formats.vllm import vllm_adapter

EXPERTS, INNER = 4, 48
NAMES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.{}.{}",
    "qwen3_moe": "model.layers.0.mlp.experts.{}.{}",
    "qwen2_moe": "model.layers.0.mlp.experts.{}.{}",
    "olmoe": "model.layers.0.mlp.experts.{}.{}",
    "minimax_m2": "model.layers.0.block_sparse_moe.experts.{}.{}",
    "glm4_moe": "model.layers.0.mlp.experts.{}.{}",
}
COUNTS = {"mixtral": "num_local_experts", "minimax_m2": "num_local_experts", "gpt_oss": "num_local_experts"}
"""What a family calls its number of experts; the others `num_experts`."""


def made(kind: str, **config: Any) -> tuple[Any, Adapter]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    own = {"intermediate_size": INNER, "moe_intermediate_size": INNER, "num_experts_per_tok": 2, "pad_token_id": 0}
    own |= {COUNTS.get(kind, "num_experts"): EXPERTS, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "glm4_moe":
        own |= {"n_routed_experts": EXPERTS, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **own)).eval()
    bank = lb.attach(model)
    targets = config.pop("targets", ["experts", "q"])
    bank.add("a", lb.AdapterConfig(**{"rank": 4, "alpha": 6, "targets": targets, **config}))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_(std=0.3)
    adapter = bank.adapter("a")
    return bank.detach(), adapter


@pytest.mark.parametrize("kind", NAMES)
def test_each_part_of_each_expert_has_its_name_and_its_change(kind: str) -> None:
    _, adapter = made(kind, rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 3})
    exported = vllm_adapter(adapter, model_type=kind)
    short = "block_sparse_moe" in NAMES[kind]
    gate, up, down = ("w1", "w3", "w2") if short else ("gate_proj", "up_proj", "down_proj")
    for expert in range(EXPERTS):
        both = adapter.layers[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"].delta()
        wanted = {gate: both[:INNER], up: both[INNER:]}
        wanted[down] = adapter.layers[f"model.layers.0.mlp.experts.down_proj.{expert}"].delta()
        for name, delta in wanted.items():
            layer = exported.layers[NAMES[kind].format(expert, name)]
            assert (layer.rank, layer.scaling, layer.stack) == (8, 1.0, 0)
            torch.testing.assert_close(layer.delta(), delta, rtol=1e-5, atol=1e-6)
    assert len(exported.layers) == 1 + 3 * EXPERTS


LEFT_ALONE = [("experts.down_proj", ("gate_proj", "up_proj")), ("experts.gate_up_proj", ("down_proj",))]


@pytest.mark.parametrize(("target", "zero"), LEFT_ALONE)
def test_parts_that_are_left_alone_are_there_with_zeros(target: str, zero: tuple[str, ...]) -> None:
    """vLLM asserts that none is missing."""
    model, adapter = made("qwen3_moe", targets=[target])
    exported = vllm_adapter(adapter, model_type="qwen3_moe")
    assert len(exported.layers) == 3 * EXPERTS
    experts = model.model.layers[0].mlp.experts
    for path, layer in exported.layers.items():
        name = path.rpartition(".")[2]
        assert (layer.delta().count_nonzero() == 0) == (name in zero)
        shape = experts.down_proj[0].shape if name == "down_proj" else experts.gate_up_proj[0].chunk(2)[0].shape
        assert layer.delta().shape == shape


@pytest.mark.parametrize("target", ["experts", "experts.down_proj", "experts.gate_up_proj"])
def test_gpt_oss_keeps_its_stacks_both_of_them(target: str, tmp_path: Path) -> None:
    """vLLM reads PEFT's form of these, and asserts that a block has gate with up and down."""
    model, adapter = made("gpt_oss", targets=[target], rank_pattern={"down_proj": 2} if target == "experts" else {})
    exported = Adapter.load(vllm_adapter(adapter, model_type="gpt_oss").save(tmp_path / "out"))
    assert {(layer.rank, layer.scaling, layer.stack) for layer in exported.layers.values()} == {(8, 1.0, EXPERTS)}
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        for expert in range(EXPERTS):
            path = f"model.layers.0.mlp.experts.{name}.{expert}"
            delta = exported.layers[path].delta()
            assert delta.T.shape == getattr(experts, name)[expert].shape
            wanted = adapter.layers[path].delta() if path in adapter.layers else torch.zeros_like(delta)
            torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-6)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.model.layers.0.mlp.") for name in names} == {
        f"experts{inner}.lora_{role}.weight" for inner in ("", ".base_layer") for role in "AB"
    }


def test_the_command_takes_the_names_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = made("mixtral")
    model.save_pretrained(tmp_path / "base")
    adapter.save(tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--to", "vllm", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "name it with --base FOLDER" in capsys.readouterr().err
    assert main([*words, "--base", str(tmp_path / "base")]) == 0
    assert "note: vLLM runs adapters of experts on a GPU only" in capsys.readouterr().out
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.0.block_sparse_moe.experts.3.w2.lora_A.weight"].shape == (8, INNER)


def test_other_families_and_folders_as_they_are_are_refused() -> None:
    _, adapter = made("qwen3_moe")
    with pytest.raises(AdapterFileError, match=r"'qwen3_mo' model are called in vLLM isn't known here .did you mean 'qwen3_moe'"):
        vllm_adapter(adapter, model_type="qwen3_mo")
    assert any("one by one" in item.what for item in obstacles(adapter, "vllm"))
    assert obstacles(vllm_adapter(adapter, model_type="qwen3_moe"), "vllm") == []
