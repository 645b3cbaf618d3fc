from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lorabank import attach, merge
from lorabank.errors import AdapterFileError, FingerprintError, MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.merging.combine import combine
from lorabank.merging.methods import COMBINERS
from lorabank.merging.outputs import adapter_beside
from tests.bank.tiny import TorchEncoder, add, ids, llama, outputs

MakeAdapter = Callable[..., Adapter]
MakeLlama = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).reshape(2, 12) % 64


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {path: layer.delta().double() for path, layer in adapter.layers.items()}


@pytest.fixture
def three(make_llama: MakeLlama, make_adapter: MakeAdapter) -> list[Adapter]:
    """Three adapters of one base with different ranks and targets."""
    model = make_llama()
    return [
        make_adapter(model, ("q_proj", "v_proj"), rank=2, seed=1),
        make_adapter(model, ("q_proj", "down_proj"), rank=5, seed=2),
        make_adapter(model, ("q_proj",), rank=64, seed=3),
    ]


def weighted_sum(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def assert_deltas(found: Adapter, expected: dict[str, Tensor]) -> None:
    assert set(found.layers) == set(expected)
    for path, delta in deltas(found).items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[0.7, 0.3, 1.0], [1.0, -1.0, 0.5], [0.0, 2.0, 0.0], [-3.0, 0.0, 1e-3], [0.0, 0.0, 0.0]])
def test_law7_exact_combination_is_linear(three: list[Adapter], weights: list[float]) -> None:
    assert_deltas(combine(list(zip(three, weights, strict=True))), weighted_sum(three, weights))


def test_law7_exact_combination_has_no_cross_terms(three: list[Adapter]) -> None:
    a, b, c = three
    both = deltas(combine([(a, 0.7), (b, 0.3)]))
    alone_a, alone_b = deltas(combine([(a, 0.7)])), deltas(combine([(b, 0.3)]))
    for path, delta in both.items():
        parts = [alone[path] for alone in (alone_a, alone_b) if path in alone]
        torch.testing.assert_close(delta, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-6)
    nested = combine([(combine([(a, 0.7), (b, 0.3)]), 2.0), (c, -1.0)])
    assert_deltas(nested, weighted_sum(three, [1.4, 0.6, -1.0]))


def test_law7_an_adapter_less_itself_is_zero(three: list[Adapter]) -> None:
    for delta in deltas(combine([(three[0], 1.0), (three[0], -1.0)])).values():
        assert delta.abs().max() < 1e-6


def test_the_combined_logits_are_those_of_both_side_by_side(three: list[Adapter], make_llama: MakeLlama) -> None:
    model = make_llama()
    combined = combine([(three[0], 0.7), (three[1], -0.4)])
    with torch.no_grad():
        with adapter_beside(model, three[0], strength=0.7), adapter_beside(model, three[1], strength=-0.4):
            expected = model(IDS).logits
        with adapter_beside(model, combined):
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ranks_add_and_unused_terms_cost_nothing(three: list[Adapter]) -> None:
    combined = combine(list(zip(three, [1.0, 0.0, 2.0], strict=True)))
    ranks = {path: layer.rank for path, layer in combined.layers.items() if path.startswith("model.layers.0")}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 66,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.0.mlp.down_proj": 1,  # weight zero: kept, with a change of exactly zero
    }
    assert {layer.scaling for layer in combined.layers.values()} == {1.0}


@pytest.mark.parametrize("method", COMBINERS)
def test_not_a_number_is_refused_by_name(three: list[Adapter], method: str) -> None:
    path, layer = next(iter(three[0].layers.items()))
    for bad in (replace(layer, A=layer.A * float("nan")), replace(layer, scaling=float("inf"))):
        broken = replace(three[0], layers={**three[0].layers, path: bad})
        with pytest.raises(MergeError, match=f"adapter 1 holds NaN or infinity in layer '{path}'"):
            combine([(three[1], 1.0), (broken, 1.0)], method=method)


@pytest.mark.parametrize("method", COMBINERS)
@pytest.mark.parametrize("weight", [1e39, -1e39, 1e300, {"q_proj": 1e39, "*": 1.0}])
def test_a_result_that_is_not_finite_is_refused_by_name(three: list[Adapter], method: str, weight: Any) -> None:
    with pytest.raises(
        MergeError, match=r"weight -?1e\+\d+ of adapter 1 .*layer 'model\.layers\.0\..*q_proj' too large for torch.float32"
    ):
        combine([(three[0], 1.0), (three[1], weight)], method=method)


@pytest.mark.parametrize("method", COMBINERS)
def test_the_largest_weights_that_are_taken_give_finite_results(three: list[Adapter], method: str) -> None:
    assert all(delta.isfinite().all() for delta in deltas(combine([(one, 1e29) for one in three], method=method)).values())


def test_a_zero_weight_keeps_not_a_number_out(three: list[Adapter]) -> None:
    path, layer = next(iter(three[0].layers.items()))
    broken = replace(three[0], layers={path: AdapterLayer(layer.A, layer.B * float("nan"), 1.0)})
    assert all(delta.isfinite().all() for delta in deltas(combine([(broken, 0.0), (three[1], 1.0)])).values())
    assert all(delta.isfinite().all() for delta in deltas(combine([(broken, 0)])).values())


@pytest.mark.parametrize("method", COMBINERS)
def test_every_method_gives_an_adapter_that_saves_and_loads(three: list[Adapter], method: str, tmp_path: Path) -> None:
    combined = combine(list(zip(three, [0.7, -0.3, 0.1], strict=True)), method=method)
    assert (combined.base_model, combined.task_type, combined.fingerprint) == ("tiny", "CAUSAL_LM", three[0].fingerprint)
    loaded = Adapter.load(combined.save(tmp_path / "c"))
    assert loaded.config == combined.config
    assert {path: layer.scaling for path, layer in loaded.layers.items()} == dict.fromkeys(combined.layers, 1.0)
    assert_deltas(loaded, deltas(combined))
    assert set(combined.config.targets) == set(combined.layers)


def test_sixteen_bit_adapters_combine_in_float32(three: list[Adapter]) -> None:
    halves = [adapter.to(dtype=torch.bfloat16) for adapter in three]
    combined = combine([(halves[0], 0.7), (halves[1], 0.3)])
    assert {layer.B.dtype for layer in combined.layers.values()} == {torch.float32}
    assert_deltas(combined, weighted_sum([half.to(dtype=torch.float32) for half in halves[:2]], [0.7, 0.3]))


def test_the_inputs_are_left_as_they_are(three: list[Adapter]) -> None:
    before = {path: (layer.A.clone(), layer.B.clone()) for path, layer in three[0].layers.items()}
    combined = combine([(three[0], 1.0)])
    for layer in combined.layers.values():
        layer.A.zero_()
        layer.B.zero_()
    for path, (A, B) in before.items():
        assert torch.equal(three[0].layers[path].A, A)
        assert torch.equal(three[0].layers[path].B, B)


def test_different_bases_are_refused(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    one, other = make_adapter(make_llama(0)), make_adapter(make_llama(1))
    with pytest.raises(FingerprintError, match=r"adapter 0 and adapter 2 were trained on different bases"):
        combine([(one, 0.5), (one, 0.1), (other, 0.5)])
    combine([(one, 0.5), (replace(other, fingerprint=None), 0.5)])


def test_shapes_that_differ_are_named(three: list[Adapter]) -> None:
    other = replace(three[0], layers={"model.layers.0.self_attn.q_proj": AdapterLayer(torch.ones(2, 9), torch.ones(9, 2), 1.0)})
    with pytest.raises(MergeError, match=r"q_proj' is \(32, 32\) \(out, in\) in adapter 0 and \(9, 9\) in adapter 1"):
        combine([(three[0], 1.0), (other, 1.0)])


def test_bad_arguments(three: list[Adapter]) -> None:
    with pytest.raises(MergeError, match=r"unknown method 'exat' \(did you mean 'exact'\?\)"):
        combine([(three[0], 1.0)], method="exat")
    with pytest.raises(MergeError, match="no adapters"):
        combine([])
    with pytest.raises(MergeError, match="has no layers"):
        combine([(replace(three[0], layers={}), 1.0)])
    for weight in (float("nan"), float("inf"), "0.5", True, None):
        with pytest.raises(MergeError, match="weight of adapter 0"):
            combine([(three[0], weight)])  # type: ignore[list-item]


def tied() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True).eval()


@pytest.mark.parametrize("method", list(COMBINERS))
def test_what_was_trained_at_both_ends_of_a_tied_weight_stays_so_and_merges(method: str) -> None:
    model = tied()
    bank = attach(model)
    add(bank, "a", targets=["q", "embed_tokens"], ensure_weight_tying=True)
    add(bank, "b", targets=["v", "embed_tokens"], rank=2, ensure_weight_tying=True)
    both = combine([(bank.adapter("a"), 0.7), (bank.adapter("b"), -0.4)], method)
    assert both.config.ensure_weight_tying
    bank.load("both", both)
    with bank.route("both"):
        expected = outputs(model, ids(2))
    if method == "exact":
        with bank.route({"a": 0.7, "b": -0.4}):
            torch.testing.assert_close(outputs(model, ids(2)), expected, rtol=1e-4, atol=1e-5)
    bank.detach()
    merge(model, both, say=None)
    torch.testing.assert_close(outputs(model, ids(2)), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_weight_whose_ends_get_other_weights_is_two_changes() -> None:
    bank = attach(tied())
    add(bank, "a", targets=["embed_tokens"], ensure_weight_tying=True)
    assert not combine([(bank.adapter("a"), {"lm_head": 0.5, "*": 1.0})]).config.ensure_weight_tying


def test_a_bias_of_lora_b_isnt_given_to_what_cant_have_one() -> None:
    """An attention's projections and embeddings: PEFT's form then can't hold the sum, a merge can."""
    torch.manual_seed(0)
    model = TorchEncoder().eval()
    with torch.no_grad():
        bank = attach(model)
        add(bank, "low", targets=["linear1"], lora_bias=True)
        add(bank, "attention", targets=["self_attn"])
        both = combine([(bank.adapter("low"), 0.6), (bank.adapter("attention"), 0.4)])
        with bank.route({"low": 0.6, "attention": 0.4}):
            expected = outputs(model, ids(2))
        with pytest.raises(AdapterFileError, match=r"in_proj': PEFT's form can't hold it.*Merge the adapter into its base"):
            both.save("never")
        bank.detach()
        merge(model, both, say=None)
        torch.testing.assert_close(outputs(model, ids(2)), expected, rtol=1e-4, atol=1e-5)


def test_token_rows_and_a_change_of_their_table_arent_one_adapter() -> None:
    bank = attach(tied())
    add(bank, "rows", targets=["q"], trainable_token_indices=[3, 5])
    add(bank, "table", targets=["embed_tokens"])
    with pytest.raises(MergeError, match=r"'model\.embed_tokens' has trained token rows in adapter 0 and A and B in adapter 1"):
        combine([(bank.adapter("rows"), 1.0), (bank.adapter("table"), 0.0)])
