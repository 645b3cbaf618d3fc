"""The adapters' changes of stacked linear maps. A pair is a token and one of its experts; a slot has an A and a B an expert.

One autograd node adds all slots' changes to what the frozen product gave. A slot's pairs of all experts go through one grouped
product (grouped.py): no expert's ΔW is ever made. It saves x and the narrow products. The plain twin is `reference.add_stacked`.
Shapes: P pairs in the order of their experts, M of them a slot's; E experts, I inputs, O outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels.grouped import outer, product
from lorabank.kernels.ops import Guard, check_route, without_autocast
from lorabank.kernels.segments import DropoutDraw, dropout_mask


@dataclass(frozen=True, kw_only=True)
class StackedSegment:
    """The pairs of one slot, and that slot's tensors."""

    pairs_M: Tensor
    """int64: which of the P pairs."""
    ends_E: Tensor
    """int32: of these, the one behind each expert's last."""
    A_ERI: Tensor
    B_ERO: Tensor
    scaling: float
    weights_M: Tensor | None = None
    """Weight of this slot for each pair; None for 1."""
    dropout: DropoutDraw | None = None
    """A unit of it is a pair."""


@dataclass(frozen=True, kw_only=True)
class StackedPlan(Guard):
    """One call's segments, and what guards backward."""

    segments: tuple[StackedSegment, ...]


@dataclass(frozen=True, kw_only=True)
class StackTables:
    """Where a stack keeps its slots' experts, by their number of V."""

    ranks_V2: Tensor
    scaling_V: Tensor
    """fp32, divided by what dropout keeps where there is some."""
    odds_V2: Tensor
    """What dropout is drawn from, as kernels take it."""
    numbers_V: Tensor
    """int64: each one's slot number in a batch's tables."""
    places_S: Tensor
    """int64: of each slot number its place among these slots, −1 for none, and one −1 more behind them."""
    width: int
    ranges: Sequence[tuple[int, int]]
    """Of each slot: its rows in the buffers."""


def _input(x_PI: Tensor, segment: StackedSegment) -> tuple[Tensor, Tensor | None]:
    """(the segment's rows in A's dtype, dropout applied; what that multiplied them by)."""
    x = x_PI.index_select(0, segment.pairs_M).to(segment.A_ERI.dtype)
    if segment.dropout is None:
        return x, None
    mask = dropout_mask(segment.dropout, 1, x.shape[1])[:, 0].to(x.dtype)
    return x * mask, mask


def _weighed(narrow_MR: Tensor, segment: StackedSegment) -> Tensor:
    if segment.weights_M is not None:
        narrow_MR.mul_(segment.weights_M.to(narrow_MR.dtype)[:, None])
    return narrow_MR


def _add(out_PF: Tensor, segment: StackedSegment, change_MF: Tensor) -> None:
    """out[pairs] += change, rounded once."""
    total = (out_PF.index_select(0, segment.pairs_M).to(change_MF.dtype) + change_MF).to(out_PF.dtype)
    out_PF.index_copy_(0, segment.pairs_M, total)


class _AddStacked(torch.autograd.Function):
    """y + Σ segments."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, plan: StackedPlan, *tensors: Tensor) -> Tensor:
        out, narrow = y.clone(), []
        with without_autocast(x):
            for segment in plan.segments:
                rows, _ = _input(x, segment)
                shrunk = _weighed(product(rows, segment.A_ERI.transpose(1, 2), segment.ends_E), segment)
                _add(out, segment, product(shrunk, segment.B_ERO, segment.ends_E).mul_(segment.scaling))
                narrow.append(shrunk)
        ctx.plan = plan
        ctx.save_for_backward(x, plan.route, *narrow, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        plan: StackedPlan = ctx.plan
        x, route, *saved = ctx.saved_tensors
        check_route(plan, route)
        narrow, tensors = saved[: len(plan.segments)], saved[len(plan.segments) :]
        needs = ctx.needs_input_grad
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[1] else None
        gradients: list[Tensor | None] = []
        with without_autocast(x):
            for i, segment in enumerate(plan.segments):
                segment = replace(segment, A_ERI=tensors[2 * i], B_ERO=tensors[2 * i + 1])
                gradients += _segment_gradients(dx, dy, x, segment, narrow[i], needs[3 + 2 * i : 5 + 2 * i])
        return dy, dx, None, *gradients


def _segment_gradients(
    dx_PI: Tensor | None, dy_PO: Tensor, x_PI: Tensor, segment: StackedSegment, narrow_MR: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    dy_MO = dy_PO.index_select(0, segment.pairs_M).to(segment.B_ERO.dtype)
    d_narrow = _weighed(product(dy_MO, segment.B_ERO.transpose(1, 2), segment.ends_E).mul_(segment.scaling), segment)
    rows, mask = _input(x_PI, segment) if needs[0] or segment.dropout is not None else (None, None)
    if dx_PI is not None:
        change = product(d_narrow, segment.A_ERI, segment.ends_E)
        _add(dx_PI, segment, change if mask is None else change.mul_(mask))
    return [
        outer(d_narrow, rows, segment.ends_E) if needs[0] and rows is not None else None,
        outer(narrow_MR, dy_MO, segment.ends_E).mul_(segment.scaling) if needs[1] else None,
    ]


def add_stacked(y_PO: Tensor, x_PI: Tensor, plan: StackedPlan) -> Tensor:
    """y plus every segment's change of it, (P, O). Pairs without a slot are not written."""
    tensors = [tensor for segment in plan.segments for tensor in (segment.A_ERI, segment.B_ERO)]
    return _AddStacked.apply(y_PO, x_PI, plan, *tensors)
