"""The adapters' changes of any frozen map (maps.py) in one autograd node, added to what the base layer computed.

It saves the input and the narrow products, visits only each segment's own samples, and gives no gradient to anything frozen. Its
plain twin is `reference.add_mapped`. Shapes: U units × N samples of each; a unit is a row of the batch, or all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.ops import Plan, check_route, restored, without_autocast
from lorabank.kernels.segments import Segment, take_units


def samples_of(x: Tensor, units: int) -> Tensor:
    """x (U · N, …) as (U, N, …)."""
    return x.reshape(units, -1, *x.shape[1:])


def segment_input(x_UN: Tensor, segment: Segment, layer_map: LowRankMap) -> tuple[Tensor, Tensor | None]:
    """(the segment's samples (units · N, …) as the narrow product takes them, what dropout multiplied them by)."""
    x = take_units(x_UN, segment.rows)
    if x.is_floating_point():
        x = x.to(segment.A_RI.dtype)
    mask = None if segment.dropout is None else layer_map.dropout(segment.dropout, x)
    if mask is None:
        return x.flatten(0, 1), None
    mask = mask.to(x.dtype)
    return (x * mask).flatten(0, 1), mask.flatten(0, 1)


def weighed(shrunk: Tensor, segment: Segment) -> Tensor:
    """Each unit's narrow product times the slot's weight for it."""
    if segment.weights_U is None:
        return shrunk
    weights_U = segment.weights_U.to(shrunk.device, shrunk.dtype)
    each = weights_U.repeat_interleave(len(shrunk) // max(1, len(weights_U)))
    return shrunk * each.view(-1, *(1,) * (shrunk.ndim - 1))


class _AddMapped(torch.autograd.Function):
    """y + Σ segments."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layer_map: LowRankMap, plan: Plan, *tensors: Tensor) -> Tensor:
        out = y.clone()
        out_UN, x_UN = samples_of(out, plan.units), samples_of(x, plan.units)
        shrunk: list[Tensor] = []
        with without_autocast(x):
            for segment in plan.segments:
                mine, _ = segment_input(x_UN, segment, layer_map)
                narrow = weighed(layer_map.shrink(mine, segment.A_RI), segment)
                _add_rows(out_UN, segment, layer_map.expand(narrow, segment.B_RO).mul_(segment.scaling))
                shrunk.append(narrow)
        ctx.plan, ctx.map = plan, layer_map
        ctx.save_for_backward(x, plan.route, *shrunk, *tensors)
        return out_UN.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        plan, layer_map = ctx.plan, ctx.map
        x, route, *saved = ctx.saved_tensors
        check_route(plan, route)
        shrunk, tensors = saved[: len(plan.segments)], saved[len(plan.segments) :]
        plan = replace(plan, segments=restored(plan.segments, tensors))
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dy_UN, x_UN = samples_of(dy, plan.units), samples_of(x, plan.units)
        gradients: list[Tensor | None] = []
        with without_autocast(x):
            for i, (segment, narrow) in enumerate(zip(plan.segments, shrunk, strict=True)):
                dy_mine = take_units(dy_UN, segment.rows).to(segment.A_RI.dtype).flatten(0, 1).mul(segment.scaling)
                d_narrow, dB = layer_map.expand_backward(dy_mine, narrow, segment.B_RO, needs[2 * i + 1])
                mine, mask = segment_input(x_UN, segment, layer_map)
                wanted = (needs_x, needs[2 * i])
                dx_mine, dA = layer_map.shrink_backward(weighed(d_narrow, segment), mine, segment.A_RI, wanted)
                if dx is not None and dx_mine is not None:
                    _add_rows(samples_of(dx, plan.units), segment, dx_mine if mask is None else dx_mine.mul_(mask))
                gradients += [dA, dB]
        return dy, dx, None, None, *gradients


def _add_rows(out_UN: Tensor, segment: Segment, change: Tensor) -> None:
    """out[rows] += change, in place, rounded once into out's dtype."""
    rows = take_units(out_UN, segment.rows)
    total = (rows.to(change.dtype) + change.view(rows.shape)).to(out_UN.dtype)
    if isinstance(segment.rows, slice):
        rows.copy_(total)
    else:
        out_UN.index_copy_(0, segment.rows, total)


def add_mapped(y: Tensor, x: Tensor, layer_map: LowRankMap, plan: Plan) -> Tensor:
    """y plus every segment's change, for a y that the base layer computed of x."""
    tensors: Sequence[Tensor] = [tensor for segment in plan.segments for tensor in (segment.A_RI, segment.B_RO)]
    return _AddMapped.apply(y, x, layer_map, plan, *tensors)
