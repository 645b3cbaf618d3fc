"""The fast path of the LoRA product on any device that torch knows: base product and adapters in one autograd node.

It saves x and the narrow xA, writes the change into y in place, and gives no gradient to the frozen weight.
Its plain twin is reference.py. Shapes as there: U units × T tokens × I inputs, O outputs, R ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.errors import RoutingError
from lorabank.kernels.base import BaseProduct
from lorabank.kernels.even import even_runs, expand_run, run_gradients
from lorabank.kernels.native import lora as native
from lorabank.kernels.precision import outer, rounded
from lorabank.kernels.segments import Segment, as_units, dropout_mask, take_units


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What backward is guarded by: that neither the route nor the bank has changed since the forward pass."""

    route: Tensor
    """int64 scalar that identifies the route. It travels with the saved tensors, so a recomputation under another route shows."""
    route_id: int
    layer: str
    """Path of the layer, for messages."""
    structure: int
    """The bank's structure count when this call was made."""
    structure_now: Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Plan(Guard):
    """One call's routing for one layer: segments without their tensors' autograd history, and what guards backward."""

    segments: tuple[Segment, ...]
    units: int


def _weigh(xa_NR: Tensor, segment: Segment) -> Tensor:
    """Scales each unit's rows by the slot's weight for it, in place."""
    if segment.weights_U is not None:
        weights_U = segment.weights_U.to(xa_NR.device, xa_NR.dtype)
        xa_NR.mul_(weights_U.repeat_interleave(len(xa_NR) // max(1, len(weights_U)))[:, None])
    return xa_NR


def _input_rows(x_UTI: Tensor, segment: Segment) -> tuple[Tensor, Tensor | None]:
    """The segment's inputs in A's dtype, (units · T, I), dropout applied, and the dropout mask."""
    x = take_units(x_UTI, segment.rows).to(segment.A_RI.dtype)
    mask = None
    if segment.dropout is not None:
        mask = dropout_mask(segment.dropout, x.shape[1], x.shape[2]).to(x.dtype).view(-1, x.shape[-1])
        return x.reshape(-1, x.shape[-1]) * mask, mask
    return x.reshape(-1, x.shape[-1]), mask


def _add_product(
    out_UTO: Tensor, segment: Segment, left: Tensor, right: Tensor, alpha: float, mask: Tensor | None = None
) -> None:
    """out[rows] += alpha · (left @ right) [⊙ mask], in place, rounded once into out's dtype."""
    if isinstance(segment.rows, slice) and mask is None and out_UTO.dtype == left.dtype:
        rows = out_UTO[segment.rows]
        rows.view(-1, rows.shape[-1]).addmm_(left, right, alpha=alpha)
        return
    product = (left @ right).mul_(alpha)
    if mask is not None:
        product.mul_(mask)
    rows = take_units(out_UTO, segment.rows)
    total = (rows.to(product.dtype) + product.view(rows.shape)).to(out_UTO.dtype)
    if isinstance(segment.rows, slice):
        rows.copy_(total)
    else:
        out_UTO.index_copy_(0, segment.rows, total)


def _add_to_outputs(out_UTO: Tensor, segment: Segment, left: Tensor, alpha: float) -> None:
    """out[rows, the segment's outputs] += alpha · (left @ B), in place, rounded once into out's dtype."""
    assert segment.outputs is not None
    rows = take_units(out_UTO, segment.rows)
    part = segment.outputs.of(rows)
    product = (left @ segment.B_RO).mul_(alpha).view(part.shape)
    part.copy_((part.to(product.dtype) + product).to(part.dtype))
    if not isinstance(segment.rows, slice):
        out_UTO.index_copy_(0, segment.rows, rows)


def _expand_into(y: Tensor, x: Tensor, plan: Plan) -> tuple[list[Tensor], native.Places | None]:
    """Adds every segment's change to y in place; returns each segment's xA, (N, R).

    Where lora.c serves, xA is one vector of them all instead, with the places of the segments in it.
    """
    if native.suits(x, y, plan.segments):
        places = native.Places.of(plan.units, plan.segments, x)
        return [native.expand_into(y, x, places, plan.segments)], places
    y_UTO, x_UTI = y.view(plan.units, -1, y.shape[-1]), as_units(x, plan.units)
    shrunk: list[Tensor] = []
    for start, stop in even_runs(plan.segments, x, y):
        if stop - start > 1:
            shrunk += expand_run(y_UTO, x_UTI, plan.segments[start:stop])
            continue
        segment = rounded(plan.segments[start], x)
        rows, _ = _input_rows(x_UTI, segment)
        xa = _weigh(rows @ segment.A_RI.t(), segment)
        if segment.outputs is not None:
            _add_to_outputs(y_UTO, segment, xa, segment.scaling)
        else:
            _add_product(y_UTO, segment, xa, segment.B_RO, segment.scaling)
        shrunk.append(xa)
    return shrunk, None


def _adapter_gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    places: native.Places | None,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Adds the adapters' part to dx in place; returns dA and dB of every segment, in the order A₁ B₁ A₂ B₂ …

    `saved`: what `_expand_into` gave (xA, and the places), then A and B of every segment.
    """
    count = len(saved) - 2 * len(plan.segments)
    shrunk, tensors = saved[:count], saved[count:]
    if places is not None:
        return native.gradients(dx, dy, x, places, tensors[::2], tensors[1::2], shrunk[0], needs)
    plan = replace(plan, segments=restored(plan.segments, tensors))
    dy_UTO, x_UTI = as_units(dy, plan.units), as_units(x, plan.units)
    dx_UTI = None if dx is None else dx.view(plan.units, -1, dx.shape[-1])
    gradients: list[Tensor | None] = []
    for start, stop in even_runs(plan.segments, x, dy):
        part = needs[2 * start : 2 * stop]
        if stop - start > 1:
            gradients += run_gradients(dx_UTI, dy_UTO, x_UTI, plan.segments[start:stop], shrunk[start:stop], part)
        else:
            segment = rounded(plan.segments[start], x)
            gradients += _segment_gradients(dx_UTI, dy_UTO, x_UTI, segment, shrunk[start], part)
    return gradients


def _segment_gradients(
    dx_UTI: Tensor | None, dy_UTO: Tensor, x_UTI: Tensor, segment: Segment, xa: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    dy_rows = take_units(dy_UTO, segment.rows)
    if segment.outputs is not None:
        dy_rows = segment.outputs.of(dy_rows)
    dy_NO = dy_rows.to(segment.A_RI.dtype).reshape(-1, segment.B_RO.shape[1])
    dxa = _weigh((dy_NO @ segment.B_RO.t()).mul_(segment.scaling), segment)
    rows, mask = _input_rows(x_UTI, segment) if needs[0] or segment.dropout is not None else (None, None)
    if dx_UTI is not None:
        _add_product(dx_UTI, segment, dxa, segment.A_RI, 1.0, mask)
    return [
        outer(dxa.t(), rows) if needs[0] and rows is not None else None,
        outer(xa.t(), dy_NO).mul_(segment.scaling) if needs[1] else None,
    ]


def check_route(plan: Guard, route: Tensor) -> None:
    """Raise RoutingError when the route or the bank changed since the forward pass."""
    if int(route) != plan.route_id:
        raise RoutingError(
            f"layer {plan.layer!r}: activation checkpointing recomputed this layer under another route than its forward saw. "
            "Pass context_fn=bank.checkpoint_context to the checkpointing function, or choose the route with bank.use(name)."
        )
    if plan.structure_now() != plan.structure:
        raise RoutingError(
            f"layer {plan.layer!r}: adapters were added or removed between this forward pass and its backward. "
            "Finish backward() first, then change the bank."
        )


def restored(segments: Sequence[Segment], tensors: Sequence[Tensor]) -> tuple[Segment, ...]:
    """The segments with the saved A and B in them."""
    return tuple(replace(s, A_RI=tensors[2 * i], B_RO=tensors[2 * i + 1]) for i, s in enumerate(segments))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Adapters compute in their own dtype, whatever autocast makes of the base."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class _LoRALinear(torch.autograd.Function):
    """y = W x + b + Σ segments, with the frozen product inside, so that y and dx are each written once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Sequence[Tensor], bias: Tensor | None, product: BaseProduct, plan: Plan, *tensors: Tensor
    ) -> Tensor:
        y = product.forward(x, base, bias)
        with without_autocast(x):
            shrunk, ctx.places = _expand_into(y, x, plan)
        ctx.plan, ctx.product, ctx.x_dtype, ctx.stored = plan, product, x.dtype, len(base)
        ctx.save_for_backward(x, plan.route, *base, *shrunk, *tensors)
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # no view, which a custom node's result is: models write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        x, route, *saved = ctx.saved_tensors
        base, saved = saved[: ctx.stored], saved[ctx.stored :]
        check_route(ctx.plan, route)
        dx = None
        with without_autocast(x):
            if ctx.needs_input_grad[0]:
                dx = ctx.product.input_grad(dy, base).to(ctx.x_dtype).contiguous()
            gradients = _adapter_gradients(dx, dy, x, ctx.plan, ctx.places, saved, ctx.needs_input_grad[5:])
        return dx, None, None, None, None, *gradients


class _AddLoRA(torch.autograd.Function):
    """y + Σ segments for a base layer that must be called as it is (it carries hooks, or its weight is trained)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, plan: Plan, *tensors: Tensor) -> Tensor:
        out = y.clone(memory_format=torch.contiguous_format)
        with without_autocast(x):
            shrunk, ctx.places = _expand_into(out, x, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, plan.route, *shrunk, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        x, route, *saved = ctx.saved_tensors
        check_route(ctx.plan, route)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        with without_autocast(x):
            gradients = _adapter_gradients(dx, dy, x, ctx.plan, ctx.places, saved, ctx.needs_input_grad[3:])
        return dy, dx, None, *gradients


def _tensors(plan: Plan) -> list[Tensor]:
    return [tensor for segment in plan.segments for tensor in (segment.A_RI, segment.B_RO)]


def lora_linear(x: Tensor, base: Sequence[Tensor], bias: Tensor | None, product: BaseProduct, plan: Plan) -> Tensor:
    """The frozen product and every segment's change, (…, O). `base` (the stored weight) and bias get no gradient."""
    return _LoRALinear.apply(x, base, bias, product, plan, *_tensors(plan))


def add_lora(y: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """y plus every segment's change, (…, O), for a y that was computed elsewhere."""
    return _AddLoRA.apply(y, x, plan, *_tensors(plan))
