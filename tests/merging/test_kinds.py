"""Merging and combining where layers are convolutions and embeddings: laws 5 and 7."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, Adapter, attach, combine, merge
from lorabank.errors import AdapterFileError, MergeError
from lorabank.formats.adapter import AdapterLayer
from tests.bank.tiny import add, ids, llama, make, outputs, state_bytes, two


def adapters(kind: str = "pictures") -> tuple[Adapter, Adapter]:
    bank = two(kind)[1]
    return bank.adapter("a"), bank.adapter("b")


def beside(adapter: Adapter, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Outputs of base and adapter apart."""
    model = make("pictures").to(dtype)
    attach(model).load("a", adapter, force=True)
    return outputs(model, x).detach()


@pytest.mark.parametrize("kind", ["pictures", "decomposed pictures"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_law5_merged_equals_unmerged_and_comes_back_bit_for_bit(form: torch.memory_format, kind: str) -> None:
    adapter, _ = adapters(kind)
    model, x = make("pictures"), ids(3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=form)
    before = state_bytes(model)
    said: list[str] = []
    handle = merge(model, adapter, inputs=x, say=said.append)
    torch.testing.assert_close(outputs(model, x).detach(), beside(adapter, x), rtol=1e-4, atol=1e-5)
    assert handle.logits is not None
    assert handle.logits.difference < 1e-4 < handle.logits.change
    assert set(handle.report.layers) == set(adapter.layers)
    assert handle.report.lost_share < 1e-5
    handle.unmerge()
    assert state_bytes(model) == before


def test_what_is_lost_in_bf16_is_said() -> None:
    adapter, _ = adapters()
    small = replace(adapter, layers={path: replace(layer, B=layer.B * 2e-3) for path, layer in adapter.layers.items()})
    with pytest.warns(UserWarning, match="of the adapter's change was lost to rounding in bfloat16"):
        report = merge(make("pictures").bfloat16(), small, say=None, force=True).report
    assert all(0.3 < layer.share <= 1.5 for path, layer in report.layers.items() if path != "positions"), report.layers


@pytest.mark.parametrize("path", ["embed", "along", "blocks.0", "blocks.1", "blocks.2", "head"])
def test_a_layer_that_computes_something_else_is_found_by_the_check(path: str) -> None:
    model = make("pictures")
    layer = model.get_submodule(path)
    layer.register_forward_hook(lambda module, args, y: y * 0.5)
    adapter, _ = adapters()
    with pytest.raises(MergeError, match=f"the check of '{path}' failed"):
        merge(model, replace(adapter, layers={path: adapter.layers[path]}), say=None, force=True)


@pytest.mark.parametrize("kind", ["decomposed llama", "decomposed gpt2"])
def test_a_decomposed_adapter_is_merged_whole_and_not_combined(kind: str) -> None:
    adapter, _ = adapters(kind)
    model, x = make(kind), ids(2)
    bank = attach(make(kind))
    bank.load("a", adapter)
    expected = outputs(bank.model, x).detach()
    merge(model, adapter, inputs={"input_ids": x}, say=None)
    torch.testing.assert_close(outputs(model, x).detach(), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(MergeError, match=r"a decomposed adapter \(DoRA\) is merged whole"):
        merge(make(kind), adapter, strength=0.5)
    with pytest.raises(MergeError, match=r"adapter 0 is decomposed \(DoRA; layer '.*'\): what it does to a weight depends on"):
        combine([(adapter, 1.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_gain_beside_a_large_bias_passes_the_check(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    with torch.no_grad():
        model[0].get_parameter("bias").fill_(50.0)
    bank = attach(model)
    add(bank, "a", rank=2, targets="0", use_dora=True)
    with torch.no_grad():
        next(p for key, p in bank.named_parameters("a") if key.endswith(".magnitude")).mul_(100)
    adapter = bank.adapter("a")
    bank.detach()
    merge(model, adapter, say=None)


def test_magnitudes_that_are_no_numbers_or_too_many_are_named() -> None:
    adapter, _ = adapters("decomposed llama")
    path, layer = next(iter(adapter.layers.items()))
    assert layer.magnitude is not None
    with pytest.raises(AdapterFileError, match="holds NaN or infinity"):
        merge(make("llama"), replace(adapter, layers={path: replace(layer, magnitude=layer.magnitude * float("nan"))}))
    plain = replace(adapter, layers={path: replace(layer, magnitude=None)})
    with pytest.raises(AdapterFileError, match="says use_dora and none of its layers has a magnitude"):
        attach(make("llama")).load("a", plain, force=True)
    with pytest.raises(AdapterFileError, match=r"expected a magnitude for each of 16 outputs, got \(17,\)"):
        replace(adapter, layers={path: replace(layer, magnitude=torch.ones(17))})


def test_a_tied_embedding_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    bank = attach(model)
    add(bank, "a", targets=["all-embedding"])
    adapter = bank.adapter("a")
    bank.detach()
    with pytest.raises(MergeError, match=r"model\.embed_tokens\.weight is tied to lm_head\.weight: merging would change both"):
        merge(model, adapter)


def test_a_kernel_of_another_size_is_refused() -> None:
    adapter, _ = adapters()
    wrong = replace(adapter.layers["blocks.2"], A=torch.ones(3, 3, 2, 2))
    with pytest.raises(MergeError, match=r"blocks\.2: made for a kernel of 2 × 2, the model's layer has 1 × 1"):
        merge(make("pictures"), replace(adapter, layers={"blocks.2": wrong}), force=True)


def test_only_linear_layers_were_ever_quantised_in_training() -> None:
    adapter, _ = adapters()
    told = replace(adapter, metadata={"base_storage": "nf4"})
    report = merge(make("pictures"), told, say=None, force=True).report
    assert {path for path, layer in report.layers.items() if layer.moved} == {"head"}


def test_a_file_that_brings_another_base_weight_is_not_merged() -> None:
    adapter, _ = adapters()
    weight = make("pictures").get_parameter("embed.weight").detach()
    merge(make("pictures"), replace(adapter, base_weights={"embed": weight}), say=None, force=True)
    with pytest.raises(MergeError, match="embed: the file brings the base's own weight, and this model has another"):
        merge(make("pictures"), replace(adapter, base_weights={"embed": weight + 1}), force=True)


def test_law7_exact_combination_is_linear_in_the_weights() -> None:
    one, other = adapters()
    x = ids(2)
    both = combine([(one, 0.7), (other, -0.4)])
    for path, layer in both.layers.items():
        expected = 0.7 * one.layers[path].delta() - 0.4 * other.layers[path].delta()
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-4, atol=1e-6)
        assert (layer.groups, layer.looks_up) == (one.layers[path].groups, one.layers[path].looks_up)
    model = make("pictures")
    bank = attach(model)
    bank.load("a", one)
    bank.load("b", other)
    with bank.route({"a": 0.7, "b": -0.4}):
        mixture = outputs(model, x).detach()
    torch.testing.assert_close(beside(both, x), mixture, rtol=1e-4, atol=1e-5)
    nothing = combine([(one, 0.0)])
    torch.testing.assert_close(beside(nothing, x), outputs(make("pictures"), x).detach())


def test_kinds_that_differ_are_not_combined() -> None:
    one, other = adapters()
    layer = one.layers["embed"]
    turned = replace(one, layers={"embed": AdapterLayer(layer.A, layer.B, 1.0)}, fingerprint=None)
    with pytest.raises(MergeError, match="'embed' isn't of one kind in all adapters"):
        combine([(replace(other, fingerprint=None), 1.0), (turned, 1.0)])


def test_an_attached_model_is_merged_under_its_adapters() -> None:
    model, bank = two("pictures")
    x, adapter = ids(2), bank.adapter("a")
    with bank.route("a"):
        expected = outputs(model, x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = merge(model, adapter, say=None, force=True)
    with bank.route(BASE):
        torch.testing.assert_close(outputs(model, x).detach(), expected, rtol=1e-4, atol=1e-5)
    handle.unmerge()
