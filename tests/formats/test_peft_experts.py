"""PEFT's files of stacked experts (`target_parameters`), both ways: the same logits in PEFT and here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorabank as lb
from lorabank.errors import AdapterFileError, MergeError
from tests.bank.tiny import add, gpt_oss, ids, mixtral

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {},
    "experts alone": {"targets": ["experts"]},
    "one of two": {"targets": ["experts.down_proj", "q_proj"]},
    "other ranks": {"rank_pattern": {"gate_up_proj": 6, "k_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}
MAKERS: list[Callable[[], nn.Module]] = [mixtral, gpt_oss]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*target_parameters.*")
        warnings.filterwarnings(
            "ignore", message=r"The following \w+_pattern keys did not match"
        )  # of stacks, which PEFT forgets
        yield


def _model(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ours_in_peft_and_theirs_here(make: Callable[[], nn.Module], config: dict[str, Any], tmp_path: Path) -> None:
    model = _model(make)
    bank = lb.attach(model)
    add(bank, "a", **config)
    x = ids(3)
    expected = model(x).logits.detach()
    bank.adapter("a").save(tmp_path / "ours")
    base = _model(make)
    assert not torch.allclose(base(x).logits, expected, atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    other = _model(make)
    back = lb.attach(other)
    back.load("b", lb.Adapter.load(tmp_path / "theirs"))
    torch.testing.assert_close(other(x).logits.detach(), expected, rtol=1e-5, atol=1e-6)
    for path, layer in bank.adapter("a").layers.items():
        mine = back.adapter("b").layers[path]
        assert torch.equal(mine.A, layer.A)
        assert torch.equal(mine.B, layer.B)
        assert (mine.scaling, mine.stack) == (layer.scaling, layer.stack)


def test_save_load_save_gives_the_same_bytes(tmp_path: Path) -> None:
    bank = lb.attach(_model(mixtral))
    add(bank, "a", dropout=0.1)
    bank.adapter("a").save(tmp_path / "one")
    lb.Adapter.load(tmp_path / "one").save(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert lb.Adapter.load(tmp_path / "two").config.dropout == 0.1  # PEFT's file says 0: it refuses dropout beside stacks


def test_experts_of_other_ranks_and_scalings_and_some_without_any_are_one_stack_in_a_file(tmp_path: Path) -> None:
    model = _model(mixtral)
    bank = lb.attach(model)
    add(bank, "a", targets=["experts"])
    taken = bank.adapter("a")
    layers = dict(taken.layers)
    stack = "model.layers.0.mlp.experts.down_proj"
    layers[f"{stack}.0"] = replace(
        layers[f"{stack}.0"], A=layers[f"{stack}.0"].A[:1], B=layers[f"{stack}.0"].B[:, :1], scaling=0.5
    )
    del layers[f"{stack}.2"]
    changed = replace(taken, layers=layers)
    changed.save(tmp_path)
    loaded = lb.Adapter.load(tmp_path)
    for path, layer in layers.items():
        torch.testing.assert_close(loaded.layers[path].delta(), layer.delta())
    assert not loaded.layers[f"{stack}.2"].delta().any()
    x = ids(2)
    for name, adapter in (("b", changed), ("c", loaded)):
        said = (
            rf"'{name}': it has nothing for 1 of the 3 experts of '{stack}' \(2\)\. They stay the base's, in further training too"
        )
        with pytest.warns(UserWarning, match=said):
            bank.load(name, adapter)
    found = []
    for name in ("b", "c"):
        with bank.route(name):
            found.append(model(x).logits.detach())
    torch.testing.assert_close(*found)


def _edited(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / "lorabank.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "2 adapted parameters.*names down_proj"),
        ({"target_parameters": ["experts.w"]}, "2 adapted parameters"),
        ({"target_parameters": ["other.w"]}, "holds nothing for target_parameters 'other.w'"),
        ({"r": 5}, "with the rank that the configuration says"),
    ],
)
def test_files_that_dont_fit_their_configuration_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    bank = lb.attach(_model(mixtral))
    add(bank, "a", targets=["experts"])
    bank.adapter("a").save(tmp_path)
    _edited(tmp_path, **values)
    with pytest.raises(AdapterFileError, match=message):
        lb.Adapter.load(tmp_path)


@pytest.mark.parametrize("shape", [(), (9,), (9, 16, 1)])
def test_a_stack_without_two_dimensions_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    bank = lb.attach(_model(mixtral))
    add(bank, "a", targets=["experts"])
    bank.adapter("a").save(tmp_path)
    _edited(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = torch.ones(shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"the adapter of '.*experts\.down_proj' is \(.*; expected \(experts · 3, in\)"):
        lb.Adapter.load(tmp_path)


def test_an_adapter_of_more_experts_than_the_model_has_is_refused() -> None:
    bank = lb.attach(_model(mixtral))
    add(bank, "a")
    taken = bank.adapter("a")
    extra = {"model.layers.0.mlp.experts.down_proj.3": taken.layers["model.layers.0.mlp.experts.down_proj.0"]}
    with pytest.raises(AdapterFileError, match=r"down_proj.3: the model has no such layer"):
        bank.load("b", replace(taken, layers={**taken.layers, **extra}))
    assert bank.names == ("a",)


def test_a_router_that_peft_adapts_is_named_with_the_way_out(tmp_path: Path) -> None:
    """PEFT's all-linear means routers of mixtures too."""
    peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    adapter = lb.Adapter.load(tmp_path)
    bank = lb.attach(mixtral())
    with pytest.raises(
        AdapterFileError, match=r"mlp\.gate: can't be adapted yet: it is a Mixtral.*Router\. Merge it with the tool"
    ):
        bank.load("a", adapter)
    with pytest.raises(MergeError, match=r"mlp\.gate'; it is a Mixtral.*Router, which can't be merged into yet\. Merge it with"):
        lb.merge(mixtral(), adapter, say=None)
    assert bank.names == ()
