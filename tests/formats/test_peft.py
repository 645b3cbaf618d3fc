"""PEFT's form both ways, against the real library: equal logits one way, equal changes the other."""

from __future__ import annotations

import copy
import json
import resource
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError, OutputError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.peft import load_peft, save_peft

IDS = torch.arange(24).reshape(2, 12) % 64


def logits_with_deltas(model: nn.Module, adapter: Adapter) -> Tensor:
    """Logits of a copy of `model` whose weights carry the adapter's changes: what loading the adapter must compute."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            weight = model.get_submodule(path).get_parameter("weight")
            weight += layer.delta() if isinstance(model.get_submodule(path), nn.Linear) else layer.delta().t()
        return model(IDS).logits


def logits_in_peft(model: nn.Module, folder: Path) -> Tensor:
    """Logits after PEFT loaded the folder; a key that PEFT misses or doesn't expect is a warning, and so an error here."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in loaded.named_modules()
        if "lora_A" in dict(module.named_children())
    }
    assert adapted == set(load_peft(folder).layers), "PEFT adapted other layers than ours"
    with torch.no_grad():
        return loaded(IDS).logits


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def assert_same_layers(a: Adapter, b: Adapter) -> None:
    assert set(a.layers) == set(b.layers)
    for path, layer in a.layers.items():
        assert torch.equal(layer.A, b.layers[path].A), path
        assert torch.equal(layer.B, b.layers[path].B), path
        assert layer.scaling == b.layers[path].scaling, path


def test_our_llama_file_computes_the_same_in_peft(llama_case: tuple[LlamaForCausalLM, Adapter], tmp_path: Path) -> None:
    model, adapter = llama_case
    found = logits_in_peft(model, adapter.save(tmp_path / "a"))
    expected = logits_with_deltas(model, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (expected - model(IDS).logits).abs().max() > 0.01  # the adapter does something


def test_our_gpt2_file_computes_the_same_in_peft(gpt2_case: tuple[GPT2LMHeadModel, Adapter], tmp_path: Path) -> None:
    model, adapter = gpt2_case
    found = logits_in_peft(model, adapter.save(tmp_path / "a"))  # a wrong fan_in_fan_out would be a warning, so an error
    torch.testing.assert_close(found, logits_with_deltas(model, adapter), rtol=1e-4, atol=1e-5)


def test_short_paths_do_not_reach_deeper_modules_in_peft(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    layer = AdapterLayer(torch.randn(2, 4), torch.randn(4, 2), 2.0)
    adapter = Adapter(config=AdapterConfig(rank=2, alpha=4, targets=["0"]), layers={"0": layer})
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), save_peft(adapter, tmp_path / "a"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model[1](model[0](x) + x @ layer.delta().t()))
    assert [name for name, module in loaded.named_modules() if name.endswith("lora_A")] == ["base_model.model.0.lora_A"]


PEFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "regex": {"r": 4, "lora_alpha": 9, "target_modules": r".*\.1\..*(q|k)_proj", "lora_dropout": 0.1},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"up_proj": 5, r"0.self_attn.*": 7},
    },
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "init_lora_weights": "gaussian",
    },
    "some layers": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "exclude_modules": ["k_proj"],
    },
}


def peft_model(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if ".lora_B." in name:
                value.normal_()
    return wrapped


def deltas_in_peft(wrapped: PeftModel, transposed: bool = False) -> dict[str, Tensor]:
    found = {}
    for name, module in wrapped.named_modules():
        if "lora_A" in dict(module.named_children()):
            delta = module.get_delta_weight("default").detach()
            found[name.removeprefix("base_model.model.")] = delta.t() if transposed else delta
    return found


@pytest.mark.parametrize("settings", PEFT_CASES.values(), ids=PEFT_CASES.keys())
def test_pefts_llama_file_has_the_same_changes_here(make_llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_llama()
    wrapped = peft_model(model, **settings)
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    expected = deltas_in_peft(wrapped)
    assert set(adapter.layers) == set(expected)
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta(), expected[path])
    assert adapter.task_type == "CAUSAL_LM"
    with torch.no_grad():
        torch.testing.assert_close(logits_with_deltas(model, adapter), wrapped(IDS).logits, rtol=1e-4, atol=1e-5)
    again = adapter.save(tmp_path / "ours")
    torch.testing.assert_close(logits_in_peft(model, again), wrapped(IDS).logits, rtol=1e-4, atol=1e-5)


def test_pefts_gpt2_file_has_the_same_changes_here(gpt2_case: tuple[GPT2LMHeadModel, Adapter], tmp_path: Path) -> None:
    model, _ = gpt2_case
    wrapped = peft_model(model, r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    for path, expected in deltas_in_peft(wrapped, transposed=True).items():
        torch.testing.assert_close(adapter.layers[path].delta(), expected)
    torch.testing.assert_close(logits_in_peft(model, adapter.save(tmp_path / "ours")), wrapped(IDS).logits, rtol=1e-4, atol=1e-5)


def test_law6_save_load_save_gives_identical_bytes(llama_case: tuple[LlamaForCausalLM, Adapter], tmp_path: Path) -> None:
    _, adapter = llama_case
    first = adapter.save(tmp_path / "1")
    loaded = Adapter.load(first)
    assert_same_layers(adapter, loaded)
    assert loaded.config == adapter.config
    assert loaded.fingerprint == adapter.fingerprint
    assert (loaded.base_model, loaded.task_type, loaded.metadata) == (adapter.base_model, adapter.task_type, adapter.metadata)
    second = loaded.save(tmp_path / "2")
    for name in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_law6_a_file_of_peft_keeps_its_bytes_from_the_first_save_on(make_llama: Any, tmp_path: Path) -> None:
    peft_model(make_llama(), **PEFT_CASES["patterns"]).save_pretrained(tmp_path / "0")
    first = Adapter.load(tmp_path / "0").save(tmp_path / "1")
    second = Adapter.load(first).save(tmp_path / "2")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_saving_twice_and_in_another_order_gives_identical_bytes(plain_adapter: Adapter, tmp_path: Path) -> None:
    shuffled = replace(plain_adapter, layers=dict(reversed(plain_adapter.layers.items())))
    first, second = plain_adapter.save(tmp_path / "1"), shuffled.save(tmp_path / "2")
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    assert (first / "adapter_config.json").read_bytes() == (second / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(plain_adapter: Adapter, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = plain_adapter.to(dtype=dtype)
    assert_same_layers(adapter, Adapter.load(adapter.save(tmp_path / "a")))


def test_the_config_file_has_the_form_of_pefts(plain_adapter: Adapter, tmp_path: Path) -> None:
    text = (plain_adapter.save(tmp_path / "a") / "adapter_config.json").read_text()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    assert (data["r"], data["lora_alpha"], data["inference_mode"], data["peft_type"]) == (4, 8, True, "LORA")
    assert '"lora_alpha": 8,' in text  # whole numbers stay whole
    assert "use_rslora" not in data
    assert "use_dora" not in data
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith("base_model.model.") for name in file.keys())  # noqa: SIM118, it is no dict


def test_an_edited_config_wins_over_our_own_file(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    edit(folder / "adapter_config.json", lora_alpha=16)
    with pytest.warns(UserWarning, match="lora_alpha changed"):
        adapter = load_peft(folder)
    assert adapter.config.alpha == 16
    assert {layer.scaling for layer in adapter.layers.values()} == {4.0}
    assert adapter.fingerprint == plain_adapter.fingerprint


def test_our_own_file_is_not_needed(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    (folder / "lorabank.json").unlink()
    adapter = load_peft(folder)
    assert_same_layers(plain_adapter, adapter)
    assert adapter.fingerprint is None
    assert (adapter.config.rank, adapter.config.alpha) == (4, 8)


def test_a_scaling_that_peft_cannot_say_is_refused(plain_adapter: Adapter, tmp_path: Path) -> None:
    path, layer = next(iter(plain_adapter.layers.items()))
    broken = replace(plain_adapter, layers={path: AdapterLayer(layer.A, layer.B, -1.0)})
    with pytest.raises(AdapterFileError, match="scaling > 0"):
        broken.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(AdapterFileError, match="no layers"):
        replace(plain_adapter, layers={}).save(tmp_path / "a")


@pytest.mark.parametrize("scaling", [0.1, 1 / 3, 2.0, 7.3e-5, 0.30000000000000004])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_any_scaling_comes_back_exactly_enough(scaling: float, use_rslora: bool, tmp_path: Path) -> None:
    layers = {f"a.b.{rank}": AdapterLayer(torch.ones(rank, 3), torch.ones(2, rank), scaling) for rank in (1, 3, 7, 64)}
    adapter = Adapter(config=AdapterConfig(use_rslora=use_rslora), layers=layers, fingerprint=Fingerprint.of(nn.Linear(2, 2)))
    folder = adapter.save(tmp_path / "a")
    loaded = load_peft(folder)
    assert loaded.config == adapter.config
    for path, layer in loaded.layers.items():
        assert layer.scaling == pytest.approx(layers[path].scaling, rel=4e-16)
    for path in (second := loaded.save(tmp_path / "b")).iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert second.is_dir()


def test_no_warning_on_a_plain_round_trip(plain_adapter: Adapter, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adapter.load(plain_adapter.save(tmp_path / "a"))


def test_an_adapter_that_no_longer_fits_on_the_disk_leaves_the_old_one(plain_adapter: Adapter, tmp_path: Path) -> None:
    folder = plain_adapter.save(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    larger = replace(
        plain_adapter,
        layers={path: AdapterLayer(layer.A + 1, layer.B, layer.scaling) for path, layer in plain_adapter.layers.items()},
    )
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a write past 2,000 bytes fails, as on a disk with no more room
    try:
        with pytest.raises(OutputError, match="Nothing was replaced"):
            larger.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
