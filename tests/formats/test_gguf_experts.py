"""Stacked experts as GGUF: gate, up and down of each expert, in adapter files and in merged ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import lorabank as lb
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.gguf_adapter import write_adapter_gguf
from lorabank.formats.gguf_base import read_base
from lorabank.merging.gguf import merge_gguf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "studies" / "llama_cpp"))
import tiny_models  # pyright: ignore[reportMissingImports]  (a script of the study)

KINDS = ["qwen3_moe", "mixtral"]


def made(kind: str, file: Path) -> tuple[Any, Adapter]:
    """(the model, an adapter of all its linear layers), the model also as `file`."""
    model = tiny_models.mixture(file, kind)
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=4, alpha=8, rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 3}))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.normal_(std=0.3)
    adapter = bank.adapter("a")
    bank.detach()
    return model, adapter


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_computes_is_each_experts_change(kind: str, tmp_path: Path) -> None:
    _, adapter = made(kind, tmp_path / "base.gguf")
    written = write_adapter_gguf(adapter, read_base(tmp_path / "base.gguf"), tmp_path / "a.gguf")
    found = tensors(written.file)
    width = 96
    for block in range(tiny_models.BLOCKS):
        deltas = {}
        for part in ("gate", "up", "down"):
            A, B = (found[f"blk.{block}.ffn_{part}_exps.weight.lora_{role}"] for role in "ab")
            assert A.shape[:2] == (tiny_models.EXPERTS, 2 if part == "down" else 4)
            deltas[part] = written.alpha / B.shape[2] * torch.bmm(B, A)  # scale = alpha / rank in build_lora_mm_id
        for expert in range(tiny_models.EXPERTS):
            owner = f"model.layers.{block}.mlp.experts"
            both = adapter.layers[f"{owner}.gate_up_proj.{expert}"].delta()
            torch.testing.assert_close(deltas["gate"][expert], both[:width], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(deltas["up"][expert], both[width:], rtol=1e-5, atol=1e-6)
            down = adapter.layers[f"{owner}.down_proj.{expert}"].delta()
            torch.testing.assert_close(deltas["down"][expert], down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_experts_are_those_of_a_merge_in_memory(kind: str, tmp_path: Path) -> None:
    model, adapter = made(kind, tmp_path / "base.gguf")
    done = merge_gguf(tmp_path / "base.gguf", adapter, tmp_path / "m.gguf", dtype="f32")
    assert done.lost_share < 1e-5
    lb.merge(model, adapter, say=None)
    found = tensors(tmp_path / "m.gguf")
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, 1)
    for name, expected in (("gate", gate), ("up", up), ("down", experts.down_proj.detach())):
        torch.testing.assert_close(found[f"blk.1.ffn_{name}_exps.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_folder_gives_the_same_file(tmp_path: Path) -> None:
    model, adapter = made("qwen3_moe", tmp_path / "base.gguf")
    model.save_pretrained(tmp_path / "base")
    for base, name in (("base.gguf", "a.gguf"), ("base", "b.gguf")):
        write_adapter_gguf(adapter, read_base(tmp_path / base), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    _, adapter = made("qwen3_moe", tmp_path / "base.gguf")
    base = replace(read_base(tmp_path / "base.gguf"), experts=8, shapes={}, complete=False)
    with pytest.raises(AdapterFileError, match=r"changes 4 experts of .*has 8 experts there: it was trained on another model"):
        write_adapter_gguf(adapter, base, tmp_path / "a.gguf")
    with pytest.raises(AdapterFileError, match=r"has none there\. Is it the adapter's base"):
        write_adapter_gguf(adapter, replace(base, experts=0), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_stack_of_another_kind_is_refused(tmp_path: Path) -> None:
    _, adapter = made("qwen3_moe", tmp_path / "base.gguf")
    layers = {
        f"model.layers.0.mlp.experts.w13.{i}": AdapterLayer(torch.ones(1, 64), torch.ones(64, 1), 1.0, stack=2) for i in (0, 1)
    }
    with pytest.raises(AdapterFileError, match="none of gate_up_proj, up_proj, down_proj"):
        write_adapter_gguf(replace(adapter, layers=layers), read_base(tmp_path / "base.gguf"), tmp_path / "a.gguf")
