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
from lorabank.kernels.ops import Plan, check_route, without_autocast
from lorabank.kernels.segments import Outputs, Segment, take_units


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


def _in_one(segment: Segment, layer_map: LowRankMap) -> bool:
    return layer_map.in_one(*segment.B_RO.shape)


def _change(x: Tensor, segment: Segment, layer_map: LowRankMap) -> tuple[Tensor, Tensor]:
    """(the narrow product, of which backward needs to know; what the segment adds but for its scaling)."""
    if _in_one(segment, layer_map):
        return x.new_empty(0), weighed(layer_map.whole(x, segment.B_RO.t() @ segment.A_RI), segment)
    narrow = weighed(layer_map.shrink(x, segment.A_RI), segment)
    return narrow, layer_map.expand(narrow, segment.B_RO)


def _again(x: Tensor, narrow: Tensor, segment: Segment, layer_map: LowRankMap) -> Tensor:
    """The change once more, in backward."""
    return _change(x, segment, layer_map)[1] if _in_one(segment, layer_map) else layer_map.expand(narrow, segment.B_RO)


def _change_backward(
    dy: Tensor, x: Tensor, narrow: Tensor, segment: Segment, layer_map: LowRankMap, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), those of them that `needs` names."""
    needs_x, needs_A, needs_B = needs
    A_RI, B_RO = segment.A_RI, segment.B_RO
    if _in_one(segment, layer_map):
        dx, d_delta_OI = layer_map.whole_backward(weighed(dy, segment), x, B_RO.t() @ A_RI, (needs_x, needs_A or needs_B))
        if d_delta_OI is None:
            return dx, None, None
        return dx, B_RO @ d_delta_OI if needs_A else None, A_RI @ d_delta_OI.t() if needs_B else None
    d_narrow, dB = layer_map.expand_backward(dy, narrow, B_RO, needs_B)
    dx, dA = layer_map.shrink_backward(weighed(d_narrow, segment), x, A_RI, (needs_x, needs_A))
    return dx, dA, dB


class _AddMapped(torch.autograd.Function):
    """y + Σ segments. A decomposed one takes part of y too: gain · (y − bias + change) + bias instead of y + change."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, layer_map: LowRankMap, plan: Plan, bias_O: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        out = y.clone()
        out_UN, x_UN, y_UN = (samples_of(value, plan.units) for value in (out, x, y))
        shrunk: list[Tensor] = []
        with without_autocast(x):
            for segment in plan.segments:
                mine, _ = segment_input(x_UN, segment, layer_map)
                narrow, change = _change(mine, segment, layer_map)
                change = change.mul_(segment.scaling)
                if segment.decomposition is not None:
                    gain = layer_map.outputs(segment.decomposition.gain_O, change)
                    change = (
                        weighed(_without_bias(y_UN, segment, layer_map, bias_O), segment).mul_(gain - 1).add_(change.mul_(gain))
                    )
                _add_rows(out_UN, segment, change, segment.outputs)
                shrunk.append(narrow)
        decomposed = any(segment.decomposition is not None for segment in plan.segments)
        ctx.plan, ctx.map = plan, layer_map
        ctx.save_for_backward(x, plan.route, y if decomposed else None, bias_O, *shrunk, *tensors)
        return out  # not a view, which nothing could be done to in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        plan, layer_map = ctx.plan, ctx.map
        x, route, y, bias_O, *saved = ctx.saved_tensors
        check_route(plan, route)
        shrunk, tensors = saved[: len(plan.segments)], saved[len(plan.segments) :]
        plan = replace(plan, segments=_restored(plan.segments, tensors))
        needs_y, needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], iter(ctx.needs_input_grad[5:])
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dy_UN, x_UN = samples_of(dy, plan.units), samples_of(x, plan.units)
        to_y, d_bias = dy, None
        gradients: list[Tensor | None] = []
        with without_autocast(x):
            for segment, narrow in zip(plan.segments, shrunk, strict=True):
                dy_mine = _outputs_of(dy_UN, segment).to(segment.A_RI.dtype).flatten(0, 1)
                mine, mask = segment_input(x_UN, segment, layer_map)
                needs_A, needs_B = next(needs), next(needs)
                d_magnitude: list[Tensor | None] = []
                if segment.decomposition is not None:
                    assert y is not None
                    gain = layer_map.outputs(segment.decomposition.gain_O, dy_mine)
                    if next(needs):
                        direction = weighed(_without_bias(samples_of(y, plan.units), segment, layer_map, bias_O), segment)
                        direction.add_(_again(mine, narrow, segment, layer_map), alpha=segment.scaling)
                        d_magnitude = [layer_map.over_places(direction.mul_(dy_mine)) / segment.decomposition.norm_O]
                    else:
                        d_magnitude = [None]
                    through_y = weighed(dy_mine * (gain - 1), segment) if needs_y or ctx.needs_input_grad[4] else None
                    if through_y is not None and ctx.needs_input_grad[4]:
                        own = _among_all(layer_map.over_places(through_y), segment, bias_O)
                        d_bias = -own if d_bias is None else d_bias - own  # it is in y, and no part of what is decomposed
                    if through_y is not None and needs_y:
                        to_y = dy.clone(memory_format=torch.contiguous_format) if to_y is dy else to_y
                        _add_rows(samples_of(to_y, plan.units), segment, through_y, segment.outputs)
                    dy_mine = dy_mine * gain
                dy_mine = dy_mine.mul(segment.scaling)
                dx_mine, dA, dB = _change_backward(dy_mine, mine, narrow, segment, layer_map, (needs_x, needs_A, needs_B))
                if dx is not None and dx_mine is not None:
                    _add_rows(samples_of(dx, plan.units), segment, dx_mine if mask is None else dx_mine.mul_(mask))
                gradients += [dA, dB, *d_magnitude]
        return to_y, dx, None, None, None if d_bias is None else d_bias.to(bias_O.dtype), *gradients


def _outputs_of(y_UN: Tensor, segment: Segment) -> Tensor:
    """The segment's samples (units, N, …), of a slice its own outputs of them."""
    mine = take_units(y_UN, segment.rows)
    return mine if segment.outputs is None else segment.outputs.of(mine).flatten(-2)


def _among_all(vector: Tensor, segment: Segment, like_O: Tensor) -> Tensor:
    """A number for each of the segment's outputs as one for each of the layer's, zero for the others."""
    if segment.outputs is None:
        return vector
    wide = vector.new_zeros(like_O.shape)
    part = segment.outputs.of(wide)
    part.copy_(vector.view(part.shape))
    return wide


def _without_bias(y_UN: Tensor, segment: Segment, layer_map: LowRankMap, bias_O: Tensor | None) -> Tensor:
    """W x of the segment's samples, (units · N, …), a copy in A's dtype."""
    base = _outputs_of(y_UN, segment).flatten(0, 1).to(segment.A_RI.dtype, copy=True)
    if bias_O is None:
        return base
    bias = bias_O if segment.outputs is None else segment.outputs.of(bias_O).flatten()
    return base.sub_(layer_map.outputs(bias.to(base.dtype), base))


def _tensors(segment: Segment) -> list[Tensor]:
    """Those that may have gradients."""
    more = [] if segment.decomposition is None else [segment.decomposition.magnitude_O]
    return [segment.A_RI, segment.B_RO, *more]


def _restored(segments: Sequence[Segment], tensors: Sequence[Tensor]) -> tuple[Segment, ...]:
    """The segments with the saved tensors in them."""
    given, made = iter(tensors), list[Segment]()
    for segment in segments:
        A, B, parts = next(given), next(given), segment.decomposition
        if parts is not None:
            parts = replace(parts, magnitude_O=next(given))
        made.append(replace(segment, A_RI=A, B_RO=B, decomposition=parts))
    return tuple(made)


def _add_rows(out_UN: Tensor, segment: Segment, change: Tensor, outputs: Outputs | None = None) -> None:
    """out[rows] += change, in place, rounded once into out's dtype. `outputs`: those that the change is of, None for all."""
    rows = take_units(out_UN, segment.rows)
    part = rows if outputs is None else outputs.of(rows)
    total = (part.to(change.dtype) + change.view(part.shape)).to(out_UN.dtype)
    if isinstance(segment.rows, slice):
        part.copy_(total)
    elif outputs is None:
        out_UN.index_copy_(0, segment.rows, total)
    else:
        part.copy_(total)
        out_UN.index_copy_(0, segment.rows, rows)


def add_mapped(y: Tensor, x: Tensor, layer_map: LowRankMap, plan: Plan, bias_O: Tensor | None = None) -> Tensor:
    """y plus every segment's change, for a y that the base layer computed of x. `bias_O`: in y, for decomposed segments."""
    tensors = [tensor for segment in plan.segments for tensor in _tensors(segment)]
    return _AddMapped.apply(y, x, layer_map, plan, bias_O, *tensors)
