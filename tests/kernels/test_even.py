"""Batched products over runs of alike segments equal the plain definition, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabank.bank.storage import RankStore
from lorabank.kernels import ops, reference
from lorabank.kernels.base import BASE_PRODUCTS
from lorabank.kernels.even import even_runs, stacked
from lorabank.kernels.segments import Segment

pytestmark = pytest.mark.usefixtures("products")
UNITS, TOKENS, FAN_IN, FAN_OUT = 9, 3, 5, 7


def leaves(ranks: list[int], *, shared: bool) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each slot: ranges of one store, or tensors of their own."""
    store = RankStore(FAN_IN, FAN_OUT, torch.device("cpu"))
    found = []
    for i, rank in enumerate(ranks):
        slot = store.allocate(str(i), rank) if shared else RankStore(FAN_IN, FAN_OUT, torch.device("cpu")).allocate("x", rank)
        found.append((slot.A_RI, slot.B_RO))
    for pair in found:
        for leaf in pair:
            leaf.data.normal_()
    return found


def segments_of(
    pairs: list[tuple[nn.Parameter, nn.Parameter]], bounds: list[tuple[int, int]], scalings: list[float]
) -> tuple[Segment, ...]:
    return tuple(
        Segment(rows=slice(*where), A_RI=a, B_RO=b, scaling=scaling)
        for (a, b), where, scaling in zip(pairs, bounds, scalings, strict=True)
    )


def run(function: object, x: torch.Tensor, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> list[torch.Tensor]:
    """Output, gradient of x, gradients of every leaf."""
    x = x.clone().requires_grad_(True)
    y = function(x)  # type: ignore[operator]
    flat = [leaf for pair in pairs for leaf in pair]
    return [y, *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(), [x, *flat])]


@pytest.mark.parametrize("shared", [True, False], ids=["one store", "tensors apart"])
@pytest.mark.parametrize(
    ("ranks", "bounds", "scalings", "runs"),
    [
        ([2, 2, 2], [(0, 3), (3, 6), (6, 9)], [2.0, 2.0, 2.0], [(0, 3)]),
        ([2, 2, 4, 4], [(0, 2), (2, 4), (4, 6), (6, 8)], [2.0, 2.0, 1.0, 1.0], [(0, 2), (2, 4)]),
        ([2, 2, 2], [(0, 2), (3, 5), (5, 7)], [2.0, 2.0, 2.0], [(0, 1), (1, 3)]),
        ([2, 2, 2], [(0, 2), (2, 5), (5, 8)], [2.0, 2.0, 0.5], [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=["all alike", "two ranks", "a base row between", "other lengths and scalings"],
)
def test_runs_equal_the_reference(
    shared: bool, ranks: list[int], bounds: list[tuple[int, int]], scalings: list[float], runs: object
) -> None:
    torch.manual_seed(0)
    pairs = leaves(ranks, shared=shared)
    segments = segments_of(pairs, bounds, scalings)
    x, weight = torch.randn(UNITS, TOKENS, FAN_IN), torch.randn(FAN_OUT, FAN_IN)
    assert even_runs(segments, x, x) == runs
    plan = ops.Plan(
        segments=segments, units=UNITS, route=torch.tensor(1), route_id=1, layer="here", structure=0, structure_now=lambda: 0
    )
    fast = run(lambda x: ops.lora_linear(x, [weight], None, BASE_PRODUCTS["linear"], plan), x, pairs)
    plain = run(lambda x: reference.lora_linear(x, weight, None, segments, UNITS), x, pairs)
    for mine, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_tensors_of_one_store_are_stacked_without_a_copy() -> None:
    pairs = leaves([2, 2], shared=True)
    joined = stacked([a for a, _ in pairs])
    assert joined.data_ptr() == pairs[0][0].data_ptr()
    assert torch.equal(joined, torch.stack([a for a, _ in pairs]))


def test_a_bf16_input_takes_the_plain_path() -> None:
    segments = segments_of(leaves([2, 2], shared=True), [(0, 2), (2, 4)], [1.0, 1.0])
    x = torch.randn(4, 3, FAN_IN, dtype=torch.bfloat16)
    assert even_runs(segments, x, x) == [(0, 1), (1, 2)]


def test_nan_in_one_slot_of_a_run_reaches_no_other() -> None:
    torch.manual_seed(0)
    pairs = leaves([2, 2, 2], shared=True)
    segments = segments_of(pairs, [(0, 3), (3, 6), (6, 9)], [2.0, 2.0, 2.0])
    pairs[1][1].data.fill_(float("nan"))
    plan = ops.Plan(
        segments=segments, units=UNITS, route=torch.tensor(1), route_id=1, layer="here", structure=0, structure_now=lambda: 0
    )
    x, weight = torch.randn(UNITS, TOKENS, FAN_IN), torch.randn(FAN_OUT, FAN_IN)
    y, dx, *gradients = run(lambda x: ops.lora_linear(x, [weight], None, BASE_PRODUCTS["linear"], plan), x, pairs)
    assert y[3:6].isnan().all() and y[:3].isfinite().all() and y[6:].isfinite().all()
    assert dx[:3].isfinite().all() and dx[6:].isfinite().all()
    assert all(gradients[i].isfinite().all() for i in (0, 1, 4, 5))
