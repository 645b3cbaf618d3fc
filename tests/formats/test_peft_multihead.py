"""PEFT's files of `nn.MultiheadAttention`, both ways: the same outputs in PEFT and here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorabank as lb
from lorabank.errors import AdapterFileError
from lorabank.formats import diffusers, kohya
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.readers import obstacles
from tests.bank.tiny import TorchEncoder, add, fill, ids

IN, OUT = "encoder.layers.0.self_attn.in_proj", "encoder.layers.0.self_attn.out_proj"
CONFIGS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention alone": {"targets": ["attention"]},
    "by the module": {"targets": ["self_attn", "linear1"], "rank_pattern": {"linear1": 5}, "use_rslora": True},
    "in_proj alone": {"targets": ["in_proj"]},
    "out_proj alone": {"targets": ["layers.1.self_attn.out_proj", "head"]},
    "other ranks": {"rank_pattern": {"out_proj": 5, "layers.1.self_attn.in_proj": 1}, "alpha_pattern": {"in_proj": 9}},
}
FILES = ("adapter_config.json", "adapter_model.safetensors", "lorabank.json")


@pytest.fixture(autouse=True)
def no_fast_path() -> Iterator[None]:
    """torch's encoder layers read a weight past PEFT's wrapper otherwise, in evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def _model() -> Any:
    torch.manual_seed(0)
    return TorchEncoder().eval()


def _in_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(_model(), str(folder)).eval()


def _through(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x).detach()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ours_in_peft_and_theirs_here(config: dict[str, Any], tmp_path: Path) -> None:
    model, x = _model(), ids(3)
    bank = lb.attach(model)
    add(bank, "a", **config)
    expected = _through(model, x)
    taken = bank.adapter("a")
    taken.save(tmp_path / "ours")
    assert not torch.allclose(_through(_model(), x), expected, atol=1e-3)
    theirs = _in_peft(tmp_path / "ours")
    torch.testing.assert_close(_through(theirs, x), expected, rtol=1e-4, atol=1e-5)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = lb.Adapter.load(tmp_path / "theirs")
    assert back.layers.keys() == taken.layers.keys()
    for path, layer in taken.layers.items():
        assert (back.layers[path].rank, back.layers[path].attention) == (layer.rank, layer.attention)
        torch.testing.assert_close(back.layers[path].delta(), layer.delta())
    other = _model()
    lb.attach(other).load("b", back)
    torch.testing.assert_close(_through(other, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_save_load_save_gives_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    bank = lb.attach(_model())
    add(bank, "a", dropout=0.1, **config)
    bank.adapter("a").save(tmp_path / "one")
    lb.Adapter.load(tmp_path / "one").save(tmp_path / "two")
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert lb.Adapter.load(tmp_path / "two").config == bank.config("a")


def test_an_untrained_adapter_keeps_its_ranks(tmp_path: Path) -> None:
    bank = lb.attach(_model())
    bank.add("a", lb.AdapterConfig(rank=3))
    bank.adapter("a").save(tmp_path)
    assert {layer.rank for layer in lb.Adapter.load(tmp_path).layers.values()} == {3}


def _trained_in_peft(folder: Path, **config: Any) -> Tensor:
    """What a PEFT model gives whose adapter does something; its file is in `folder`."""
    model = peft.get_peft_model(_model(), peft.LoraConfig(lora_alpha=5, **config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2, generator=generator)
    expected = _through(model, ids(3))
    model.save_pretrained(str(folder))
    return expected


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3, "target_modules": ["self_attn"]},
        {"r": 3, "target_modules": ["self_attn", "linear2"], "rank_pattern": {"layers.0.self_attn": 2}, "use_rslora": True},
        {"r": 2, "target_modules": r".*\.1\.self_attn", "alpha_pattern": {"self_attn": 7}},
    ],
)
def test_theirs_here_and_back(config: dict[str, Any], tmp_path: Path) -> None:
    expected = _trained_in_peft(tmp_path / "theirs", **config)
    adapter, model = lb.Adapter.load(tmp_path / "theirs"), _model()
    bank = lb.attach(model)
    bank.load("b", adapter)
    torch.testing.assert_close(_through(model, ids(3)), expected, rtol=1e-4, atol=1e-5)
    bank.adapter("b").save(tmp_path / "ours")
    torch.testing.assert_close(_through(_in_peft(tmp_path / "ours"), ids(3)), expected, rtol=1e-4, atol=1e-5)
    mine, other = load_file(tmp_path / "ours/adapter_model.safetensors"), load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)

    bank.add("c", adapter.config)  # its patterns name what they named there
    fresh = bank.adapter("c")
    for path, layer in adapter.layers.items():
        assert (fresh.layers[path].rank, fresh.layers[path].scaling) == (layer.rank, layer.scaling)
    assert fresh.layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize(("version", "times"), [(None, 2), ("0.17.1", 2), ("0.21.2", 2), ("0.22.0", 1), ("1.0.0.dev0", 1)])
def test_a_change_that_their_version_adds_twice_is_read_as_it_computes(version: str | None, times: int, tmp_path: Path) -> None:
    """PEFT 0.21 adds out_proj's twice; that it does is what the tests above find, with this one's factor."""
    bank = lb.attach(_model())
    add(bank, "a")
    bank.adapter("a").save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_version": version}))
    (tmp_path / "lorabank.json").unlink()
    stored = load_file(tmp_path / "adapter_model.safetensors")
    loaded = lb.Adapter.load(tmp_path)
    assert torch.equal(loaded.layers[OUT].B, times * stored[_INNER.format("B")])
    assert torch.equal(loaded.layers[IN].B, stored[_B])


class _Reads(nn.Module):
    """Attention to something else, with rows behind the tokens, at the top of a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        hidden = torch.tensor([[False, False, False, True], [False] * 4])
        return self.attn(x, memory, memory, key_padding_mask=hidden, need_weights=False)[0].detach()


def test_cross_attention_with_a_short_path(tmp_path: Path) -> None:
    model, x, memory = _Reads(), torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    bank = lb.attach(model)
    add(bank, "a", rank_pattern={"out_proj": 2})
    expected = model(x, memory)
    bank.adapter("a").save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(_Reads(), str(tmp_path))
    torch.testing.assert_close(theirs(x, memory), expected, rtol=1e-4, atol=1e-5)


def test_their_files_names(tmp_path: Path) -> None:
    """What is written is what PEFT's own state dict has, of an adapter that was injected into a plain module."""
    bank = lb.attach(_model())
    add(bank, "a", targets=["self_attn"])
    bank.adapter("a").save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["self_attn"]), _model())
    theirs = peft.get_peft_model_state_dict(injected)
    mine = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in mine} == set(theirs)
    assert {tuple(value.shape) for value in mine.values()} == {tuple(value.shape) for value in theirs.values()}


def test_key_and_value_of_their_own_features_are_saved_and_read_here(tmp_path: Path) -> None:
    """PEFT refuses such a module, so the file has the names of its projections."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=6, vdim=10)})
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=2))
    fill(bank, "a")
    taken = bank.adapter("a")
    taken.save(tmp_path / "one")
    back = lb.Adapter.load(tmp_path / "one")
    assert list(back.layers) == ["attn.k_proj", "attn.out_proj", "attn.q_proj", "attn.v_proj"]
    assert all(torch.equal(back.layers[path].B, layer.B) for path, layer in taken.layers.items())
    bank.load("b", back)
    back.save(tmp_path / "two")
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_who_else_can_not_read_it() -> None:
    bank = lb.attach(_model())
    add(bank, "a", targets=["layers.0.self_attn"])
    for reader in ("vllm", "gguf", "merged gguf", "older peft"):
        (found,) = obstacles(bank.adapter("a"), reader)
        assert "nn.MultiheadAttention" in found.what
        assert found.layers == (IN, OUT)


@pytest.mark.parametrize("unheld", [kohya.unheld, diffusers.unheld])
def test_image_models_forms_refuse_it_by_name(unheld: Callable[[Adapter], dict[str, str]]) -> None:
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"  # a name that both forms know
    layer = AdapterLayer(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    plain = Adapter(config=lb.AdapterConfig(rank=2), layers={path: layer})
    assert unheld(plain) == {}
    (why,) = unheld(replace(plain, layers={path: replace(layer, attention=True)})).values()
    assert why == "it is nn.MultiheadAttention's, which nobody reads in that form"


def _edit(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})
    (folder / "lorabank.json").unlink()


_A, _B = (f"base_model.model.encoder.layers.0.self_attn.lora_{role}.weight" for role in "AB")
_INNER = "base_model.model.encoder.layers.0.self_attn.base_layer.out_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({_A: None, _B: None}, r"layers.0.self_attn' has out_proj's matrices and no .*lora_A.weight.*incomplete"),
        ({_B: None}, r"in_proj.* has .*lora_A.* and no lora_B: the file is incomplete"),
        ({_B: torch.ones(32, 3)}, r"the in_proj of attention .*B \(32, 3\); expected \(3, 16\) and \(48, 3\)"),
        ({_INNER.format("B"): torch.ones(48, 3)}, r"the out_proj of attention .*B \(48, 3\); expected .* and \(16, 3\)"),
        ({_A: torch.ones(2, 16), _B: torch.ones(48, 2)}, r"the in_proj .*A \(2, 16\).*with the rank that the configuration"),
        ({_A: torch.full((3, 16), torch.nan)}, "holds NaN"),
        (
            {_A.removeprefix("base_model.model."): torch.ones(3, 16)},
            r"self_attn\.lora_A\.weight' stands there a second time: two adapters in a file\. Fetch",
        ),
    ],
)
def test_files_that_dont_fit_are_refused(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    bank = lb.attach(_model())
    add(bank, "a")
    bank.adapter("a").save(tmp_path)
    _edit(tmp_path, changes)
    with pytest.raises(AdapterFileError, match=message):
        lb.Adapter.load(tmp_path)


def test_a_file_that_takes_the_module_for_a_layer_says_what_its_layers_are(tmp_path: Path) -> None:
    bank = lb.attach(_model())
    add(bank, "a")
    bank.adapter("a").save(tmp_path)
    _edit(tmp_path, {_INNER.format("A"): None, _INNER.format("B"): None})
    with pytest.raises(AdapterFileError, match=r"self_attn: is an nn.MultiheadAttention, whose layers are in_proj, out_proj"):
        bank.load("b", lb.Adapter.load(tmp_path))
    assert bank.names == ("a",)


def test_a_wrong_shape_or_a_magnitude_is_named_and_nothing_is_loaded() -> None:
    bank = lb.attach(_model())
    add(bank, "a")
    taken = bank.adapter("a")
    for change, message in (
        ({"B": torch.ones(32, 3)}, r"in_proj: made for 16 → 32 features, the model's layer has 16 → 48"),
        ({"magnitude": torch.ones(48)}, r"in_proj: is decomposed \(DoRA\), which nn.MultiheadAttention's projections can't be"),
    ):
        wrong = replace(taken, layers={**taken.layers, IN: replace(taken.layers[IN], **change)})
        with pytest.raises(AdapterFileError, match=message):
            bank.load("b", wrong)
        assert bank.names == ("a",)


def test_a_linear_layer_called_in_proj_is_written_as_one(tmp_path: Path) -> None:
    """Mamba's mixers have two such layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = lb.attach(nn.ModuleDict({"mixer": nn.ModuleDict({"in_proj": nn.Linear(4, 12), "out_proj": nn.Linear(4, 4)})}))
        add(bank, "a", rank=2)
        bank.adapter("a").save(tmp_path)
    names = {name.split(".lora")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"base_model.model.mixer.in_proj", "base_model.model.mixer.out_proj"}
    assert not any(layer.attention for layer in lb.Adapter.load(tmp_path).layers.values())
