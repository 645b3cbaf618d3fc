"""Merging where the base is quantised, or was in training: refused with numbers, or stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorabank import attach, quantize_base
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.kernels import four_bit, fp8
from lorabank.merging.combine import combine
from lorabank.merging.merge import merge
from lorabank.merging.quantized import rounded


def size(value: torch.Tensor) -> float:
    return float(value.norm())


def test_a_quantised_base_is_refused_with_what_rounding_would_lose(base: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    adapter = make_adapter(base)
    quantize_base(base, "fp8", say=lambda line: None)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(
        MergeError,
        match=r"weight is stored in fp8: rounding there would lose (all|\d+%) of its ΔW \(‖Δ‖/‖W‖ = [\d.]+\), in bf16 \d+%\. "
        r"Load the base in fp32 or bf16, as it was before it was quantised, and merge into that",
    ):
        merge(base, adapter)
    assert all(torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)) for name, value in base.state_dict().items())


def test_a_4_bit_base_is_refused_too(make_llama: Callable[..., nn.Module], make_adapter: Callable[..., Adapter]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    base = make_llama()
    adapter = make_adapter(base)
    quantize_base(base, "nf4")
    with pytest.raises(MergeError, match=r"weight is stored in nf4: rounding there would lose .* of its ΔW"):
        merge(base, adapter)


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
