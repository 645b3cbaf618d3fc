"""Products with stacked experts against the definition: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabank.errors import RoutingError
from lorabank.kernels import grouped, reference
from lorabank.kernels.segments import DropoutDraw
from lorabank.kernels.stacked import StackedPlan, StackedSegment, add_stacked

EXPERTS, PAIRS = 5, 23


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _experts(seed: int = 0) -> Tensor:
    """Of each pair, in order; the fourth expert has none."""
    drawn = torch.randint(EXPERTS, (PAIRS,), generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn == 3, 4, drawn).sort().values


def _segment(pairs: Tensor, size: tuple[int, int], rank: int, seed: int, **more: Any) -> StackedSegment:
    A = _random(EXPERTS, rank, size[0], seed=seed).requires_grad_()
    B = _random(EXPERTS, rank, size[1], seed=seed + 1).requires_grad_()
    ends = grouped.ends_of(_experts()[pairs], EXPERTS)
    return StackedSegment(pairs_M=pairs, ends_E=ends, A_ERI=A, B_ERO=B, scaling=0.7, **more)


def _cases(size: tuple[int, int]) -> list[StackedSegment]:
    first, second = torch.arange(0, PAIRS, 3), torch.arange(1, PAIRS, 3)
    draw = DropoutDraw(
        probability=0.4,
        seed=9,
        step=3,
        examples_U=torch.arange(len(second)) // 2,
        places_UT=torch.arange(len(second))[:, None] % 2,
    )
    return [
        _segment(first, size, 4, seed=1),
        _segment(second, size, 3, seed=3, dropout=draw),
        _segment(torch.arange(PAIRS), size, 8, seed=5, weights_M=_random(PAIRS, seed=7)),
    ]


def _plan(segments: list[StackedSegment], **changes: Any) -> StackedPlan:
    made = StackedPlan(
        segments=tuple(segments), route=torch.tensor(1), route_id=1, layer="experts", structure=0, structure_now=lambda: 0
    )
    return replace(made, **changes)


def _results(
    run: Callable[[Tensor, Tensor, list[StackedSegment]], Tensor], size: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    segments = _cases(size)
    y, x = (_random(PAIRS, size[i], seed=20 + i, dtype=dtype).requires_grad_() for i in (1, 0))
    out = run(y, x, segments)
    leaves = [y, x, *(leaf for s in segments for leaf in (s.A_ERI, s.B_ERO))]
    return [out.detach(), *torch.autograd.grad(out, leaves, _random(*out.shape, seed=30, dtype=dtype))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("size", [(16, 8), (5, 7)], ids=["aligned", "odd"])
def test_the_grouped_product_is_the_definition(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    found = _results(lambda y, x, segments: add_stacked(y, x, _plan(segments)), size, dtype)
    expected = _results(lambda y, x, segments: reference.add_stacked(y, x, _experts(), segments), size, dtype)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert float((mine.float() - theirs.float()).abs().max()) <= tolerance * float(theirs.float().abs().max())


def test_an_expert_without_pairs_gets_a_gradient_of_zeros() -> None:
    (segment,) = _cases((16, 8))[:1]
    add_stacked(_random(PAIRS, 8), _random(PAIRS, 16), _plan([segment])).sum().backward()
    for leaf in (segment.A_ERI, segment.B_ERO):
        assert leaf.grad is not None
        assert not leaf.grad[3].any()
        assert leaf.grad[0].any()


def test_pairs_without_a_slot_and_other_slots_are_left_alone_by_what_is_no_number() -> None:
    sick, well, _ = _cases((16, 8))
    with torch.no_grad():
        sick.B_ERO.fill_(torch.nan)
    y, x = _random(PAIRS, 8), _random(PAIRS, 16)
    out = add_stacked(y, x, _plan([sick, well]))
    alone = add_stacked(y, x, _plan([well]))
    out[well.pairs_M].sum().backward()
    assert out[sick.pairs_M].isnan().all()
    others = torch.arange(PAIRS)[torch.isin(torch.arange(PAIRS), sick.pairs_M, invert=True)]
    assert torch.equal(out[others], alone[others])
    assert well.B_ERO.grad is not None
    assert well.B_ERO.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(16, 8), (5, 7)], ids=["aligned", "odd"])
def test_the_frozen_product_and_its_input_gradient(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight, experts = _random(EXPERTS, *size, seed=2, dtype=dtype), _experts()
    x = _random(PAIRS, size[0], seed=3, dtype=dtype).requires_grad_()
    found = grouped.frozen_product(x, weight, grouped.ends_of(experts, EXPERTS))
    expected = torch.stack([row @ weight[e] for row, e in zip(x, experts.tolist(), strict=True)])
    torch.testing.assert_close(found, expected)
    dy = _random(PAIRS, size[1], seed=4, dtype=dtype)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)))


def test_a_route_that_changed_before_backward_is_an_error() -> None:
    (segment,) = _cases((16, 8))[:1]
    for changes, message in (({"route": torch.tensor(2)}, "another route"), ({"structure_now": lambda: 1}, "added or removed")):
        out = add_stacked(_random(PAIRS, 8), _random(PAIRS, 16), _plan([segment], **changes))
        with pytest.raises(RoutingError, match=message):
            out.sum().backward()
