"""Every method of `COMBINERS`, and what a limited rank costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from transformers import LlamaForCausalLM

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.merging.combine import combine, combine_and_measure
from lorabank.merging.low_rank import OVERSAMPLED, factored_norm, stacked, truncate, truncate_factors
from lorabank.merging.methods import COMBINERS, PEFT_NAMES, TAKES
from tests.merging.test_kinds import adapters as of_pictures

MakeAdapter = Callable[..., Adapter]
MakeLlama = Callable[..., LlamaForCausalLM]
Q = "model.layers.0.self_attn.q_proj"
WHOLE: dict[str, dict[str, Any]] = {name: {"density": 1.0} if "density" in takes else {} for name, takes in TAKES.items()}
"""By method, options with which nothing is pruned."""
FULL: dict[str, dict[str, Any]] = {name: {**WHOLE[name], **({"rank": 64} if "rank" in TAKES[name] else {})} for name in TAKES}
"""By method, options with which nothing is truncated either."""
DRAWN = [name for name, takes in TAKES.items() if "seed" in takes]


@pytest.fixture
def three(make_llama: MakeLlama, make_adapter: MakeAdapter) -> list[Adapter]:
    """Three adapters of one base with different ranks and targets."""
    model = make_llama()
    return [
        make_adapter(model, ("q_proj", "v_proj"), rank=2, seed=1),
        make_adapter(model, ("q_proj", "down_proj"), rank=5, seed=2),
        make_adapter(model, ("q_proj",), rank=9, seed=3),
    ]


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {path: layer.delta().double() for path, layer in adapter.layers.items()}


def exact_sum(parts: list[tuple[Adapter, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", COMBINERS)
def test_one_adapter_with_weight_one_gives_itself_back(three: list[Adapter], method: str) -> None:
    """At its own rank, which is the rank that a method takes when it isn't told one."""
    for adapter in three:
        combined = combine_and_measure([(adapter, 1.0)], method, **WHOLE[method])
        assert_same(deltas(combined.adapter), deltas(adapter))
        assert {layer.rank for layer in combined.adapter.layers.values()} == {adapter.config.rank}
        assert combined.report.error < 1e-5


@pytest.mark.parametrize("method", [name for name in COMBINERS if "ties" not in name])
@pytest.mark.parametrize("weights", [[0.7, 0.3, 1.0], [1.0, -1.0, 0.5], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
def test_with_nothing_pruned_or_truncated_it_is_the_weighted_sum(three: list[Adapter], method: str, weights: list[float]) -> None:
    parts = list(zip(three, weights, strict=True))
    assert_same(deltas(combine(parts, method, **FULL[method])), exact_sum(parts))


@pytest.mark.parametrize("method", COMBINERS)
def test_layers_that_only_some_adapters_have_are_kept(three: list[Adapter], method: str) -> None:
    """v_proj is the first one's alone, down_proj the second's: there each stands for itself."""
    combined = combine(list(zip(three, [0.5, 2.0, 1.0], strict=True)), method, **FULL[method])
    assert set(combined.layers) == {path for adapter in three for path in adapter.layers}
    for adapter, weight, leaf in ((three[0], 0.5, "v_proj"), (three[1], 2.0, "down_proj")):
        for path, delta in deltas(adapter).items():
            if path.endswith(leaf):
                torch.testing.assert_close(deltas(combined)[path], weight * delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", COMBINERS)
def test_convolutions_and_embeddings_combine(method: str) -> None:
    one, other = of_pictures()
    combined = combine([(one, 1.0)], method, **WHOLE[method])
    assert_same(deltas(combined), deltas(one))
    mixed = combine([(one, 0.5), (other, -0.25)], method, **({"rank": 2} if method != "exact" else {}))
    for path, layer in mixed.layers.items():
        like = one.layers[path]
        assert (layer.A.shape[1:], layer.groups, layer.looks_up) == (like.A.shape[1:], like.groups, like.looks_up)
        assert layer.delta().shape == like.delta().shape and layer.delta().isfinite().all()
        assert method == "exact" or layer.rank <= 2


@pytest.mark.parametrize("method", COMBINERS)
def test_the_report_is_what_the_matrices_say(three: list[Adapter], method: str) -> None:
    parts: list[tuple[Adapter, float]] = [(three[0], 0.7), (three[1], -0.3), (three[2], 0.0)]
    said: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    combined = combine_and_measure(parts, method, busy=lambda *words: said.append(words))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers
    expected, found = exact_sum(parts), deltas(combined.adapter)
    report = combined.report
    for path, layer in report.layers.items():
        assert layer.exact == pytest.approx(float(expected[path].norm()), rel=1e-5)
        assert layer.difference == pytest.approx(float((found[path] - expected[path]).norm()), abs=1e-5)
    whole = math.hypot(*(float((found[path] - expected[path]).norm()) for path in expected))
    assert report.error == pytest.approx(whole / math.hypot(*(float(e.norm()) for e in expected.values())), abs=1e-5)
    assert report.layers[Q].ranks == (2, 5)
    assert report.ranks_before == (2, 7)
    assert (report.layers[Q].rank, report.layers[Q].truncated > 0) == ((7, False) if method == "exact" else (5, True))
    assert f"{method}: 6 layers, ranks in all 2 to 7 before" in str(report) and report.worst in str(report)
    assert float(combined.adapter.metadata["combine.error"]) == pytest.approx(report.error, rel=1e-2, abs=1e-6)
    assert combined.adapter.metadata["combine.method"] == method
    assert said[0] == ("combining", 0, 6) and said[-1] == ("combining", 6, 6)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_best_of_its_rank(three: list[Adapter], rank: int) -> None:
    parts = [(three[0], 1.0), (three[1], 1.0)]
    combined = combine_and_measure(parts, "svd", rank=rank)
    for path, delta in exact_sum(parts).items():
        spectrum = torch.linalg.svdvals(delta)
        rest = float(spectrum[rank:].norm())
        assert combined.report.layers[path].difference == pytest.approx(rest, abs=1e-5)
        assert combined.report.layers[path].truncated == pytest.approx(rest, abs=1e-5)
        assert combined.adapter.layers[path].rank == min(rank, len(spectrum[spectrum > 1e-5]))


def test_svd_holds_the_energy_that_is_asked_for_with_as_few_ranks_as_will_do(three: list[Adapter]) -> None:
    parts = [(three[1], 1.0), (three[2], 0.5)]
    combined = combine_and_measure(parts, "svd", energy=0.8)
    for path, delta in exact_sum(parts).items():
        held = torch.linalg.svdvals(delta).square().cumsum(0)
        expected = 1 + int((held < 0.8 * held[-1]).sum())
        assert combined.adapter.layers[path].rank == expected
        assert combined.report.layers[path].error <= math.sqrt(0.2) + 1e-6
    assert combine(parts, "svd", energy=1.0).layers[Q].rank == 14
    assert {layer.rank for layer in combine(parts, "svd", energy=0.8, rank=2).layers.values()} <= {1, 2}


@pytest.mark.parametrize("method", DRAWN)
def test_draws_are_those_of_the_seed(three: list[Adapter], method: str) -> None:
    def made(seed: int | None, order: int = 1) -> dict[str, Tensor]:
        turned = [replace(adapter, layers=dict(list(adapter.layers.items())[::order])) for adapter in three]
        return deltas(combine([(adapter, 0.5) for adapter in turned], method, density=0.5, rank=64, seed=seed))

    first = made(3)
    for again in (made(3), made(3, order=-1)):
        assert all(torch.equal(first[path], again[path]) for path in first)
    assert all(torch.equal(made(0)[path], found) for path, found in made(None).items())
    other = made(4)
    assert not any(torch.equal(first[path], other[path]) for path in first)


def test_dare_keeps_its_share_scaled_up(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_llama(), ("q_proj",), rank=4)
    found, delta = deltas(combine([(adapter, 1.0)], "dare", density=0.25, rank=64))[Q], deltas(adapter)[Q]
    kept = found.abs() > 1e-4 * delta.abs().max()
    assert 0.2 < kept.double().mean() < 0.3
    torch.testing.assert_close(found[kept], 4 * delta[kept], rtol=1e-3, atol=1e-4)
    different = combine([(adapter, 1.0), (adapter, 1.0)], "dare", density=0.25, rank=64)
    assert float((deltas(different)[Q].abs() > 1e-4).double().mean()) > 0.4  # the two draw apart: 1 − 0.75²


def test_magnitude_prune_keeps_the_largest(three: list[Adapter]) -> None:
    found, delta = deltas(combine([(three[2], 2.0)], "magnitude_prune", density=0.1, rank=64))[Q], deltas(three[2])[Q]
    largest = delta.abs() >= delta.abs().flatten().topk(int(0.1 * delta.numel())).values[-1]
    torch.testing.assert_close(found, 2 * delta * largest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_ties_is_that_of_peft_where_weights_are_equal(three: list[Adapter], sign: Any, density: float) -> None:
    """PEFT's own function, on ΔW. With other weights ours counts them in the vote, and PEFT's doesn't."""
    matrices = [adapter.layers[Q].delta() for adapter in three]
    expected = merge_utils.ties(matrices, torch.full((3,), 0.8), density, sign)
    found = combine([(adapter, 0.8) for adapter in three], "ties", density=density, rank=64, majority_sign_method=sign)
    torch.testing.assert_close(found.layers[Q].delta(), expected, rtol=1e-3, atol=1e-4)


def test_a_negative_weight_votes_against(three: list[Adapter]) -> None:
    turned = replace(three[1], layers={path: replace(layer, B=-layer.B) for path, layer in three[1].layers.items()})
    one = combine([(three[0], 1.0), (three[1], -0.6)], "ties", density=0.5, rank=64)
    other = combine([(three[0], 1.0), (turned, 0.6)], "ties", density=0.5, rank=64)
    assert_same(deltas(one), deltas(other))


def test_a_large_pruned_matrix_is_truncated_almost_as_well_as_can_be() -> None:
    """The randomised decomposition against the whole one, on the kind of matrix that it gets: pruned, of a long flat tail."""
    torch.manual_seed(0)
    low = torch.randn(400, 12) @ torch.randn(12, 600)
    matrix = low * (low.abs() > low.abs().flatten().kthvalue(int(0.8 * low.numel())).values)
    rank = 16
    assert rank + OVERSAMPLED <= 100  # a quarter of 400: it is the randomised one
    found, best = truncate(matrix, rank=rank, energy=None), truncate(matrix, rank=400, energy=None)
    optimum = float(torch.linalg.svdvals(matrix.double())[rank:].norm())
    assert float((matrix - found.B @ found.A).double().norm()) == pytest.approx(found.dropped, rel=1e-4)
    assert optimum * (1 - 1e-5) < found.dropped < 1.002 * optimum
    assert best.dropped < 1e-5 * float(matrix.norm())


def test_factors_are_truncated_without_their_product() -> None:
    torch.manual_seed(0)
    A, B = stacked([(torch.randn(3, 50), torch.randn(40, 3), 2.0), (torch.randn(60, 50), torch.randn(40, 60), -1.0)])
    assert factored_norm(A, B) == pytest.approx(float((B @ A).norm()), rel=1e-12)
    assert factored_norm(torch.cat([A, A]), torch.cat([B, -B], dim=1)) < 1e-10
    found, whole = truncate_factors(A, B, rank=7, energy=None), truncate(B @ A, rank=7, energy=None)
    torch.testing.assert_close(found.B @ found.A, whole.B @ whole.A)
    assert found.dropped == pytest.approx(whole.dropped, rel=1e-9)


def test_options_that_a_method_does_not_take_are_refused(three: list[Adapter]) -> None:
    parts = [(three[0], 1.0)]
    with pytest.raises(MergeError, match=r"method 'exact' takes no rank; svd, ties, dare, dare_ties, magnitude_prune do"):
        combine(parts, rank=4)
    with pytest.raises(MergeError, match="method 'magnitude_prune' takes no seed; dare, dare_ties do"):
        combine(parts, "magnitude_prune", seed=1)
    for name, values in {"rank": (0, 1.5, True), "energy": (0, 1.1, float("nan")), "density": (0.0, -1, 2, "x")}.items():
        for value in values:
            with pytest.raises(MergeError, match=f"{name} should be"):
                combine(parts, "ties", **{name: value})
    with pytest.raises(MergeError, match="majority_sign_method should be total or frequency, got 'mean'"):
        combine(parts, "ties", majority_sign_method="mean")


def test_pefts_names_are_understood_and_its_linear_is_not_taken_for_a_sum(three: list[Adapter]) -> None:
    parts = [(three[0], 0.5), (three[1], 0.5)]
    for theirs, ours in PEFT_NAMES.items():
        assert combine(parts, theirs).metadata["combine.method"] == ours
    with pytest.raises(MergeError, match="PEFT's 'linear' adds the A and the B of adapters, which gives cross terms"):
        combine(parts, "linear")


def test_the_table_says_what_each_method_takes() -> None:
    assert set(TAKES) == set(COMBINERS)
    assert all(COMBINERS[name].__doc__ for name in COMBINERS)
