"""Merging where the base is quantised, or was in training: written and measured, or stated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorabank import attach, quantize_base
from lorabank.bank.kinds import layer_kind
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.kernels import four_bit, fp8
from lorabank.merging.combine import combine
from lorabank.merging.merge import merge
from lorabank.merging.quantized import requantized, rounded
from tests.bank.tiny import outputs

IDS = torch.arange(24).reshape(2, 12) % 64


def in_fp8(base: nn.Module, make_adapter: Callable[..., Adapter], size: float, *, emulate: bool = False) -> Adapter:
    """Quantises `base`; an adapter of the layers that it quantised."""
    adapter = make_adapter(base, size=size)
    done = quantize_base(base, "fp8", emulate=emulate, say=lambda line: None).layers
    return replace(adapter, layers={path: layer for path, layer in adapter.layers.items() if path in done})


def size(value: torch.Tensor) -> float:
    return float(value.norm())


def stored_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}


def weights_of(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Each layer's weight (out, in) as it stands for, in fp32."""
    found = {}
    for path in adapter.layers:
        layer = model.get_submodule(path)
        kind = layer_kind(layer)
        assert kind is not None
        found[path] = kind.weight_oi(layer._parameters, torch.float32).clone()
    return found


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
def test_law5_a_merge_into_fp8_is_measured_and_comes_back_bit_for_bit(
    base: nn.Module, make_adapter: Callable[..., Adapter], emulate: bool
) -> None:
    adapter = in_fp8(base, make_adapter, 0.05, emulate=emulate)
    bytes_before, before = stored_bytes(base), weights_of(base, adapter)
    said: list[str] = []
    handle = merge(base, adapter, inputs={"input_ids": IDS}, say=said.append)
    after, report = weights_of(base, adapter), handle.report
    assert report.dtypes == ("fp8",)
    for path, layer in adapter.layers.items():
        wanted = before[path] + layer.delta()
        torch.testing.assert_close(after[path], rounded(wanted, "fp8"), rtol=0, atol=0)
        loss = report.layers[path]
        assert loss.lost == pytest.approx(size(after[path] - wanted), rel=1e-4)
        assert loss.delta == pytest.approx(size(layer.delta()), rel=1e-4)
        assert loss.lost_in_bf16 == pytest.approx(size(wanted.bfloat16().float() - wanted), rel=1e-4)
    assert 0.005 < report.rounding_error < 0.2 and report.lost_share_in_bf16 is not None
    assert report.lost_share_in_bf16 < 0.2 * report.lost_share
    assert "layers (fp8)" in said[0] and "; in bf16 it would be " in said[0]
    assert f"what is stored is off by ‖lost‖/‖W‖ = {100 * report.rounding_error:.1f} %" in said[0]
    assert handle.logits is not None and 0 < handle.logits.difference < handle.logits.change
    handle.unmerge()
    assert stored_bytes(base) == bytes_before


def test_a_change_below_the_resolution_is_warned_of_with_numbers(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    adapter = in_fp8(base, make_adapter, 1e-4)
    total = len(adapter.layers)
    with pytest.warns(
        UserWarning,
        match=rf"merge: (all|\d+%) of the adapter's change was lost to rounding in fp8: it is small beside the weights "
        rf"\(‖Δ‖/‖W‖ = [\d.e-]+\) and below what they resolve in {total} of {total} layers\. In bf16 it would be "
        r"\d+%\. Merge into",
    ):
        report = merge(base, adapter, say=None).report
    assert set(report.unresolved) == set(adapter.layers)


def test_a_layer_without_a_change_keeps_its_bytes(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    adapter = in_fp8(base, make_adapter, 0.0)
    before = stored_bytes(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge(base, adapter, say=None).report
    assert stored_bytes(base) == before and report.lost_share == 0 and report.unresolved == ()


def test_what_wrote_over_a_quantised_merge_is_named(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    adapter = in_fp8(base, make_adapter, 1.0)
    handle = merge(base, adapter, say=None)
    path = next(iter(adapter.layers))
    scale = base.get_submodule(path).get_parameter("weight_scale")
    kept = scale.detach().clone()
    scale.data[0] *= 2
    with pytest.raises(MergeError, match=rf"{path}\.weight \(tensor 2 of its fp8 form\) was written to since this merge"):
        handle.unmerge()
    scale.data.copy_(kept)
    handle.unmerge()


def test_a_quantised_layer_that_computes_something_else_is_found_and_put_back(
    base: nn.Module, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = in_fp8(base, make_adapter, 1.0)
    path = list(adapter.layers)[-1]
    base.get_submodule(path).register_forward_hook(lambda module, args, y: y * 0.5)
    before = stored_bytes(base)
    with pytest.raises(MergeError, match=f"the check of '{path}' failed: its outputs moved by"):
        merge(base, adapter, say=None)
    assert stored_bytes(base) == before


@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
def test_a_decomposed_adapter_is_merged_into_fp8_as_it_runs_beside_it(
    make_llama: Callable[..., nn.Module], make_adapter: Callable[..., Adapter]
) -> None:
    base = make_llama()
    plain = make_adapter(base, ("q_proj", "o_proj"), size=0.05)
    layers = {
        path: replace(layer, magnitude=1.5 * base.get_parameter(f"{path}.weight").detach().norm(dim=1))
        for path, layer in plain.layers.items()
    }
    adapter = replace(plain, layers=layers, config=replace(plain.config, use_dora=True))
    quantize_base(base, "fp8", say=lambda line: None)
    bank = attach(base)
    bank.load("a", adapter, force=True)
    beside = outputs(base, IDS).detach()
    bank.detach()
    handle = merge(base, adapter, inputs={"input_ids": IDS}, say=None)
    assert handle.logits is not None and 1e-4 < handle.logits.difference < 0.5 * handle.logits.change
    merged = outputs(base, IDS).detach()
    assert float((merged - beside).abs().max()) == pytest.approx(handle.logits.difference, rel=1e-3)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_four_bits_are_written_in_the_form_that_they_came_in(storage: str, nested: bool) -> None:
    """On the tensors alone, which need no bitsandbytes."""
    torch.manual_seed(0)
    weight, shape = torch.randn(48, 80), (48, 80)
    base = four_bit.quantize(weight, storage)
    if nested:
        code = torch.linspace(-1, 1, 256)
        offset = base[1].mean()
        inner = (base[1] - offset).abs().amax()[None]
        nearest = ((base[1] - offset)[:, None] / inner - code).abs().argmin(1).to(torch.uint8)
        base = [base[0], nearest, inner, code, offset]

    def stands_for(tensors: list[Tensor]) -> Tensor:
        return four_bit.dequantize_plain(tensors, storage, shape, torch.float32)

    held = stands_for(base)
    same = requantized(storage, base, held)
    torch.testing.assert_close(stands_for(same), held, rtol=1e-5, atol=1e-6)
    if storage == "nf4":  # fp4 has two zeros
        assert torch.equal(same[0], base[0])
    wanted = held + 0.5 * torch.randn(shape)
    new = requantized(storage, base, wanted)
    assert [(t.shape, t.dtype) for t in new] == [(t.shape, t.dtype) for t in base]
    fresh = stands_for(four_bit.quantize(wanted, storage))
    assert size(stands_for(new) - wanted) < (1.1 if nested else 1 + 1e-6) * size(fresh - wanted)
    assert 0.05 < size(stands_for(new) - wanted) / size(wanted) < 0.2


@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
def test_law5_a_merge_into_nf4(make_adapter: Callable[..., Adapter]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()  # rows of whole blocks: bitsandbytes' product on a CPU needs that
    adapter = make_adapter(base, size=0.05)
    quantize_base(base, "nf4")
    before = weights_of(base, adapter)
    with torch.no_grad():
        logits: Tensor = base(IDS).logits
    handle = merge(base, adapter, inputs={"input_ids": IDS}, say=None)
    after, report = weights_of(base, adapter), handle.report
    assert report.dtypes == ("nf4",) and handle.logits is not None
    for path, layer in adapter.layers.items():
        wanted = before[path] + layer.delta()
        assert report.layers[path].lost == pytest.approx(size(after[path] - wanted), rel=1e-3)
        assert size(after[path] - rounded(wanted, "nf4")) < 0.05 * size(wanted)  # its factors are rounded too
    handle.unmerge()
    assert all(torch.equal(value, before[path]) for path, value in weights_of(base, adapter).items())
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, logits)


@pytest.mark.parametrize("storage", ["fp8", "nf4", "fp4"])
def test_a_merge_says_how_far_the_base_is_from_the_one_in_training(
    base: nn.Module, make_adapter: Callable[..., Adapter], storage: str
) -> None:
    adapter = replace(make_adapter(base), metadata={"base_storage": storage})
    weights = {path: base.get_submodule(path).get_parameter("weight").detach().clone() for path in adapter.layers}
    if not isinstance(base.get_submodule(next(iter(weights))), nn.Linear):
        weights = {path: weight.t() for path, weight in weights.items()}
    said: list[str] = []
    report = merge(base, adapter, say=said.append).report
    lost = {path: size(weight - rounded(weight, storage)) for path, weight in weights.items()}
    for path, loss in report.layers.items():
        assert loss.moved == pytest.approx(lost[path], rel=1e-4)
    expected = sum(value**2 for value in lost.values()) ** 0.5 / sum(size(w) ** 2 for w in weights.values()) ** 0.5
    assert report.trained_in == storage and report.base_error == pytest.approx(expected, rel=1e-4)
    assert (
        {"fp8": 0.02, "nf4": 0.07, "fp4": 0.09}[storage] < report.base_error < {"fp8": 0.035, "nf4": 0.11, "fp4": 0.16}[storage]
    )
    assert f"trained on a {storage} base: these weights differ from it by ‖W − Wq‖/‖W‖ = {100 * expected:.1f} %" in said[0]


def test_the_storage_of_the_base_outlives_combining_and_a_bank(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    one, other = (replace(make_adapter(base), metadata={"base_storage": "fp8"}) for _ in range(2))
    assert merge(base, combine([(one, 0.5), (other, 0.5)]), say=None).report.trained_in == "fp8"
    with pytest.warns(UserWarning, match="stored in different ways .fp8, unquantised, nf4."):
        mixed = combine([(one, 1.0), (replace(one, metadata={}), 1.0), (replace(one, metadata={"base_storage": "nf4"}), 1.0)])
    assert mixed.metadata["base_storage"] == "nf4"
    bank = attach(base)
    with pytest.warns(UserWarning, match="trained over a base in fp8"):
        bank.load("one", one, force=True)
    assert bank.adapter("one").metadata["base_storage"] == "fp8"
    bank.detach()


def test_a_merge_over_a_plain_base_says_nothing_of_it(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    said: list[str] = []
    report = merge(base, make_adapter(base), say=said.append).report
    assert report.trained_in is None and report.base_error == 0 and "trained on" not in said[0]


def test_rounding_is_what_the_storages_do() -> None:
    weight = torch.randn(32, 48)
    assert torch.equal(rounded(weight, "fp8"), fp8.dequantize_rows(*fp8.quantize_weight(weight)[:2], torch.float32))
    packed = four_bit.quantize(weight, "nf4")
    assert torch.equal(rounded(weight, "nf4"), four_bit.dequantize_plain(packed, "nf4", (32, 48), torch.float32))
