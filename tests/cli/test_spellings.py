"""One way of saying things in every command: dtypes, the base, numbers below zero, names of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lorabank as lb
from lorabank.cli import main
from lorabank.cli.export import gguf_dtype
from lorabank.config.convert import dtype_name
from lorabank.formats.adapter import Adapter
from lorabank.formats.fingerprint import Fingerprint


def stored(folder: Path) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("text", "ours", "gguf"),
    [
        ("bf16", "bf16", "bf16"),
        ("torch.bfloat16", "bf16", "bf16"),
        ("BFloat16", "bf16", "bf16"),
        ("float16", "fp16", "f16"),
        ("half", "fp16", "f16"),
        ("fp32", "fp32", "f32"),
        ("torch.float32", "fp32", "f32"),
        ("f32", "fp32", "f32"),
        ("q8_0", "q8_0", "q8_0"),
        ("nonsense", "nonsense", "nonsense"),
    ],
)
def test_dtypes(text: str, ours: str, gguf: str) -> None:
    assert (dtype_name(text), gguf_dtype(text)) == (ours, gguf)


@pytest.mark.parametrize("flag", ["--model", "--base"])
@pytest.mark.parametrize("dtype", ["torch.float32", "fp32", "float32"])
def test_merge_takes_them(base_folder: Path, adapter_folder: Path, tmp_path: Path, flag: str, dtype: str) -> None:
    words = ["merge", str(adapter_folder), flag, str(base_folder), "--dtype", dtype, "--by-shard"]
    assert main([*words, "--output", str(tmp_path / "merged")]) == 0
    assert stored(tmp_path / "merged") == {"F32"}


def test_an_unknown_dtype_is_refused(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter_folder), "--output", str(tmp_path / "m"), "--dtype", "float17"]) == 2
    assert "invalid choice: 'float17'" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--by-shard"]], ids=["in memory", "by shard"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_merge_keeps_the_bases_storage_either_way(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, way: list[str], kind: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=getattr(torch, kind))
    model.save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).write_bytes((base_folder / file).read_bytes())
    words = ["merge", str(adapter_folder), "--base", str(tmp_path / "base"), "--output", str(tmp_path / "merged")]
    assert main([*words, *way]) == 0
    assert stored(tmp_path / "merged") == {{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[kind]}


@pytest.mark.parametrize("weight", ["-0.5", "-.5", "-5e-1", "-1e3"])
def test_a_weight_below_zero_needs_no_sign_of_equality(adapter_folder: Path, tmp_path: Path, weight: str) -> None:
    assert main(["combine", str(adapter_folder), "-w", weight, "--output", str(tmp_path / "out")]) == 0
    made, first = Adapter.load(tmp_path / "out"), Adapter.load(adapter_folder)
    path = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(made.layers[path].delta(), float(weight) * first.layers[path].delta())


def test_weights_by_layer_below_zero(adapter_folder: Path, tmp_path: Path) -> None:
    words = ["combine", str(adapter_folder), "--weights", "q_proj=-0.5,*=-1", "--output", str(tmp_path / "out")]
    assert main(words) == 0


def test_messages_of_combine_name_the_adapters(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(adapter_folder)
    path, layer = next(iter(adapter.layers.items()))
    broken = replace(layer, B=torch.full_like(layer.B, torch.nan))
    replace(adapter, layers={**adapter.layers, path: broken}).save(tmp_path / "broken")
    (tmp_path / "broken" / "lorabank.json").unlink()
    wide = replace(layer, B=torch.zeros(9, layer.rank))
    replace(adapter, layers={**adapter.layers, path: wide}).save(tmp_path / "wide")
    words = ["combine", f"{adapter_folder}:1", f"{tmp_path / 'wide'}:1", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"in adapter '{adapter_folder}'" in told
    assert f"in adapter '{tmp_path / 'wide'}'" in told
    with pytest.raises(lb.LorabankError, match=r"in adapter 0 and \(9, 16\) in adapter 1"):
        lb.combine([(adapter, 1), (Adapter.load(tmp_path / "wide"), 1)])


def test_other_bases_by_name_are_warned_of_where_no_fingerprint_tells(adapter_folder: Path) -> None:
    adapter = Adapter.load(adapter_folder)
    assert adapter.fingerprint is None
    here, there = replace(adapter, base_model="/models/Qwen3-0.6B"), replace(adapter, base_model="Qwen/qwen3-0.6b")
    lb.combine([(here, 1), (there, 1)])  # one name in two places: a warning would be an error
    other = replace(adapter, base_model="meta/llama")
    with pytest.warns(UserWarning, match=r"adapter 0 names the base '/models/Qwen3-0.6B', adapter 1 'meta/llama'"):
        lb.combine([(here, 1), (other, 1)])


def test_a_gguf_adapters_base_folder_is_checked(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    adapter = replace(Adapter.load(adapter_folder), fingerprint=Fingerprint.of(model))
    adapter.save(tmp_path / "known")
    words = ["export", str(tmp_path / "known"), "--to", "gguf"]
    assert main([*words, "--model", str(base_folder), "--dtype", "float16", "--output", str(tmp_path / "a.gguf")]) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    assert main([*words, "--base", str(tmp_path / "other"), "--output", str(tmp_path / "b.gguf")]) == 2
    told = capsys.readouterr().err
    assert "was trained on another base" in told
    assert "--force" in told
    assert not (tmp_path / "b.gguf").exists()
    assert main([*words, "--base", str(tmp_path / "other"), "--force", "--output", str(tmp_path / "b.gguf")]) == 0


def test_a_file_of_the_folder_is_as_good_as_the_folder(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter_folder), "--json"]) == 0
    whole = capsys.readouterr().out
    assert main(["inspect", str(adapter_folder / "adapter_config.json"), "--json"]) == 0
    assert capsys.readouterr().out == whole
    assert main(["inspect", str(adapter_folder / "lorabank.json")]) == 2
    assert f"a JSON file, which holds no tensors. Name the folder: {adapter_folder}" in capsys.readouterr().err


def test_an_adapter_for_a_base_is_told(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(adapter_folder), "--to", "vllm", "--base", str(adapter_folder), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is an adapter, not a model. Name the base's folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_folder_without_its_weight(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Adapter.load(adapter_folder).save(tmp_path / "run" / "one")
    words = ["combine", f"{tmp_path / 'run'}:one", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"names an adapter of a folder and no weight: {tmp_path / 'run'}:one:1" in capsys.readouterr().err


def test_parts_that_cancel_leave_no_error(adapter_folder: Path) -> None:
    adapter = Adapter.load(adapter_folder)
    done = lb.combine_and_measure([(adapter, 0.3), (adapter, -0.3)])
    assert done.report.error == 0
    small = lb.combine_and_measure([(adapter, 1.0)], "svd", rank=1)
    assert small.report.error > 0.01  # what is more than rounding is still told
