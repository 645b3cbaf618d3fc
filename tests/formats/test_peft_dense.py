"""PEFT's convolutions in groups, whose A reaches from one group into another: they run, and are saved as they were."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorabank import BASE, AdapterConfig, attach, combine, merge
from lorabank.errors import AdapterFileError, MergeError
from lorabank.formats.adapter import Adapter
from lorabank.formats.components import as_component
from lorabank.formats.diffusers import load_diffusers, save_diffusers
from lorabank.formats.readers import obstacles

TARGETS = ["grouped", "depthwise", "plain"]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "grouped": nn.Conv2d(8, 12, (1, 3), stride=(1, 2), padding=(0, 1), groups=2, bias=False),
        "depthwise": nn.Conv2d(12, 12, 3, padding=1, groups=12),
        "plain": nn.Conv2d(12, 6, 1),
    }
    return _Chain(layers)


class _Chain(nn.Module):
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        yield


@pytest.fixture
def theirs() -> nn.Module:
    config = peft.LoraConfig(r=24, lora_alpha=6, target_modules=TARGETS, rank_pattern={"grouped": 4}, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model(), config).eval()


@pytest.fixture
def folder(theirs: Any, tmp_path: Path) -> Path:
    theirs.save_pretrained(str(tmp_path / "theirs"))
    return tmp_path / "theirs"


X = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(2))


def test_it_computes_what_peft_computes_beside_the_base(theirs: nn.Module, folder: Path) -> None:
    adapter = Adapter.load(folder)
    assert [adapter.layers[path].dense for path in TARGETS] == [True, True, False]
    bank = attach(model())
    bank.load("a", adapter)
    with torch.no_grad():
        with bank.route("a"):
            torch.testing.assert_close(bank.model(X), theirs(X), rtol=1e-4, atol=1e-5)
        with bank.route(["a"] * 3):
            torch.testing.assert_close(bank.model(X), theirs(X), rtol=1e-4, atol=1e-5)


def test_rows_of_the_base_are_untouched(folder: Path) -> None:
    bank, plain = attach(model()), model()
    bank.load("a", Adapter.load(folder))
    with torch.no_grad(), bank.route([BASE, "a", BASE]):
        mixed = bank.model(X)
    expected = plain(X).detach()
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]])
    assert not torch.allclose(mixed[1], expected[1], atol=1e-3)


def test_gradients_are_pefts(theirs: Any, folder: Path) -> None:
    bank = attach(model())
    bank.load("a", Adapter.load(folder))
    for _, parameter in theirs.named_parameters():
        parameter.requires_grad_(True)
    theirs(X).square().sum().backward()
    with bank.route("a"):
        bank.model(X).square().sum().backward()
    found = {name: p.grad for name, p in bank.named_parameters("a")}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for path in ("grouped", "depthwise"):
        A = wanted[f"base_model.model.{path}.lora_A.default.weight"]
        torch.testing.assert_close(found[f"{path}.A"].view_as(A), A, rtol=1e-4, atol=1e-5)
        B = wanted[f"base_model.model.{path}.lora_B.default.weight"].flatten(1)
        groups = 2 if path == "grouped" else 12
        own = [block[:, i * B.shape[1] :][:, : B.shape[1]] for i, block in enumerate(found[f"{path}.B"].t().chunk(groups))]
        torch.testing.assert_close(torch.cat(own), B, rtol=1e-4, atol=1e-5)


def test_it_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    bank = attach(model())
    bank.load("a", Adapter.load(folder))
    saved = bank.adapter("a").save(tmp_path / "ours")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = peft.PeftModel.from_pretrained(model(), str(saved)).eval()
    with torch.no_grad(), bank.route("a"):
        torch.testing.assert_close(bank.model(X), again(X), rtol=1e-4, atol=1e-5)


def test_trained_here_it_still_has_a_file_that_peft_reads(folder: Path, tmp_path: Path) -> None:
    bank = attach(model())
    bank.load("a", Adapter.load(folder))
    with torch.no_grad():
        for name, leaf in bank.named_parameters("a"):
            if name.endswith(".B"):
                leaf += 0.01  # outputs that read ranks of other groups
    saved = bank.adapter("a").save(tmp_path / "trained")
    again = peft.PeftModel.from_pretrained(model(), str(saved)).eval()
    with torch.no_grad(), bank.route("a"):
        torch.testing.assert_close(bank.model(X), again(X), rtol=1e-4, atol=1e-5)
    other = attach(model())
    other.load("a", Adapter.load(saved))
    with torch.no_grad(), bank.route("a"), other.route("a"):
        torch.testing.assert_close(bank.model(X), other.model(X), rtol=1e-4, atol=1e-5)


def test_merging_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder)
    with pytest.raises(MergeError, match=r"in groups, and its A reaches from one group.*Serve it beside the base"):
        merge(model(), adapter)
    assert [item.layers for item in obstacles(adapter, "merge")] == [("depthwise", "grouped")]


def test_both_forms_in_one_layer_are_refused_and_either_follows_the_other(folder: Path) -> None:
    bank = attach(model())
    bank.load("a", Adapter.load(folder))
    with pytest.raises(AdapterFileError, match=r"'grouped' is a convolution in groups\. A of a sees all channels"):
        bank.add("b", AdapterConfig(rank=2, targets=["grouped"]))
    assert list(bank.names) == ["a"]
    bank.remove("a")
    bank.add("b", AdapterConfig(rank=2, targets=["grouped"]))
    with pytest.raises(AdapterFileError, match="A of b sees those of a group"):
        bank.load("a", Adapter.load(folder))
    bank.remove("b")
    bank.load("a", Adapter.load(folder))
    assert bank.detach()(X).shape == model()(X).shape


def test_it_is_combined_with_its_like(folder: Path) -> None:
    adapter = Adapter.load(folder)
    half = combine([(adapter, 0.25), (adapter, 0.75)])
    bank = attach(model())
    bank.load("whole", adapter)
    bank.load("half", half)
    with torch.no_grad():
        with bank.route("whole"):
            expected = bank.model(X)
        with bank.route("half"):
            torch.testing.assert_close(bank.model(X), expected, rtol=1e-4, atol=1e-5)


def test_diffusers_form_holds_it(folder: Path, tmp_path: Path) -> None:
    adapter = as_component(Adapter.load(folder), "unet")
    again = load_diffusers(save_diffusers(adapter, tmp_path / "style"))
    for path, layer in adapter.layers.items():
        assert torch.equal(again.layers[path].A, layer.A)
        assert torch.equal(again.layers[path].B, layer.B)
        assert again.layers[path].dense == layer.dense
