"""A frozen convolution and the adapters' changes of it in one autograd node, which writes y and dx once each.

Of a batch whose adapters stand in rows of their own, the products of all of them are batched: a convolution's narrow product is
a convolution for each adapter, but of a 1 × 1 one a matrix product of its places, as the widening product always is. On a GPU a
half-precision model's adapters are rounded to its dtype for these products (precision.py).

The plain twin is `reference.add_mapped`. Shapes: U units, n samples (a multiple of U), C channels, O outputs, R ranks, P places;
S segments of a run × M samples of each. "Places" are a tensor's numbers as (n, P, C) where channels come last in memory, else as
(n, C, P): views, both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabank.kernels.even import even_runs, stacked
from lorabank.kernels.maps import ConvMap, LowRankMap
from lorabank.kernels.ops import Plan, check_route, without_autocast
from lorabank.kernels.precision import outer, rounds
from lorabank.kernels.segments import Segment

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def suits(x: Tensor, base: nn.Module, layer_map: LowRankMap, plan: Plan) -> bool:
    """Whether `lora_conv` computes this call: a plain convolution, and adapters whose rows lie side by side."""
    weight = base._parameters.get("weight")
    return (
        isinstance(layer_map, ConvMap)
        and layer_map.groups == 1
        and not layer_map.pads
        and weight is not None
        and weight.shape[1] == layer_map.channels  # an A that reaches over groups has the map of a layer without
        and x.ndim == weight.ndim
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and all(_is_plain(segment) and _computes_in(x, segment) for segment in plan.segments)
    )


def _is_plain(segment: Segment) -> bool:
    more = segment.weights_U, segment.dropout, segment.decomposition, segment.outputs
    return isinstance(segment.rows, slice) and all(value is None for value in more)


def _computes_in(x: Tensor, segment: Segment) -> bool:
    return segment.A_RI.dtype == segment.B_RO.dtype and (rounds(x) or segment.A_RI.dtype == x.dtype)


@dataclass(frozen=True)
class _Run:
    """Segments that are alike, one behind the other, and where their samples are."""

    start: int
    stop: int
    """Of the segments."""
    samples: slice


def _runs(plan: Plan, x: Tensor) -> Iterator[_Run]:
    size = len(x) // plan.units
    for start, stop in even_runs(plan.segments, x, x):
        first, last = plan.segments[start].rows, plan.segments[stop - 1].rows
        assert isinstance(first, slice) and isinstance(last, slice)  # what `suits` lets through
        samples = slice(first.start * size, last.stop * size)
        if samples.stop > samples.start:
            yield _Run(start, stop, samples)


class _LoRAConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer_map: ConvMap, plan: Plan, *tensors: Tensor
    ) -> Tensor:
        last = _is_last(x) or _is_last(weight)  # as torch's own convolutions choose
        x = _ordered(x, last)
        with without_autocast(x):
            y = _ordered(layer_map.convolve(x, weight, bias), last)
            shrunk: list[Tensor] = []
            for run in _runs(plan, x):
                A_SRI, B_SRO = _stacks(tensors, run, plan, x.dtype)
                narrow = _shrink(x[run.samples], A_SRI, layer_map, last)
                _add_expanded(_places(y[run.samples], last), narrow, B_SRO, last)
                shrunk.append(narrow)
        ctx.plan, ctx.map, ctx.last = plan, layer_map, last
        ctx.save_for_backward(x, plan.route, weight, *shrunk, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, layer_map, last = ctx.plan, ctx.map, ctx.last
        x, route, weight, *saved = ctx.saved_tensors
        check_route(plan, route)
        shrunk, tensors = saved[: -2 * len(plan.segments)], saved[-2 * len(plan.segments) :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        gradients: list[Tensor | None] = [None] * len(tensors)
        with without_autocast(x):
            dy = _ordered(grad_outputs[0], last)
            dx = layer_map.input_grad(dy, x, weight) if needs_x else None
            dx = None if dx is None else _ordered(dx, last)
            for run, narrow in zip(_runs(plan, x), shrunk, strict=True):
                which = slice(2 * run.start, 2 * run.stop)
                A_SRI, B_SRO = _stacks(tensors, run, plan, x.dtype)
                dy_places = _places(dy[run.samples], last)
                if any(needs[which][1::2]):
                    scaling = plan.segments[run.start].scaling
                    dB = _outer(narrow, dy_places, len(B_SRO), last).mul_(scaling)
                    gradients[which.start + 1 : which.stop : 2] = dB.to(tensors[which.start + 1].dtype).unbind()
                d_narrow = _through(dy_places, B_SRO, last)
                mine = None if dx is None else dx[run.samples]
                dA = _shrink_backward(mine, d_narrow, x[run.samples], A_SRI, layer_map, last, any(needs[which][::2]))
                if dA is not None:
                    gradients[which.start : which.stop : 2] = dA.to(tensors[which.start].dtype).unbind()
        return dx, None, None, None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True))


def lora_conv(x: Tensor, base: nn.Module, layer_map: LowRankMap, plan: Plan) -> Tensor:
    """The frozen convolution of x (n, C, *S) and every segment's change of it, (n, O, *P), for a call that `suits`.

    The base's weight and bias get no gradient.
    """
    tensors = [tensor for segment in plan.segments for tensor in (segment.A_RI, segment.B_RO)]
    return _LoRAConv.apply(x, base._parameters["weight"], base._parameters.get("bias"), layer_map, plan, *tensors)


# ---- memory's order --------------------------------------------------------------------------------------------------


def _is_last(x: Tensor) -> bool:
    """Whether channels come last in memory; of a tensor of which that can be said both ways, they don't."""
    order = _LAST.get(x.ndim)
    return order is not None and x.is_contiguous(memory_format=order) and not x.is_contiguous()


def _ordered(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=_LAST[x.ndim]) if last else x.contiguous()


def _places(x: Tensor, last: bool) -> Tensor:
    """x (n, C, *S) as places, a view."""
    if last:
        return x.movedim(1, -1).view(len(x), prod(x.shape[2:]), x.shape[1])
    return x.view(len(x), x.shape[1], prod(x.shape[2:]))


def _image(places: Tensor, size: Sequence[int], last: bool) -> Tensor:
    """Places as (n, C, *size), a view."""
    return places.unflatten(1, size).movedim(-1, 1) if last else places.unflatten(2, size)


# ---- products --------------------------------------------------------------------------------------------------------


def _stacks(tensors: Sequence[Tensor], run: _Run, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (S, R, I) and scaling · B (S, R, O) of a run, in the dtype that is computed in."""
    mine = tensors[2 * run.start : 2 * run.stop]
    return stacked(mine[::2]).to(dtype), (stacked(mine[1::2]) * plan.segments[run.start].scaling).to(dtype)


def _through(places: Tensor, W_SRC: Tensor, last: bool) -> Tensor:
    """Σ over channels of places · W, a segment's own for each sample: places with R channels."""
    if last:
        return torch.bmm(places.reshape(len(W_SRC), -1, places.shape[-1]), W_SRC.transpose(1, 2)).view(*places.shape[:2], -1)
    return torch.bmm(_of_samples(W_SRC, len(places)), places)


def _add_expanded(places: Tensor, narrow: Tensor, W_SRC: Tensor, last: bool) -> None:
    """places += Σ over ranks of narrow · W, in place, rounded once."""
    if last:
        count, ranks, wide = W_SRC.shape
        places.view(count, -1, wide).baddbmm_(narrow.view(count, -1, ranks), W_SRC)
    else:
        places.baddbmm_(_of_samples(W_SRC, len(places)).transpose(1, 2), narrow)


def _of_samples(W_SRC: Tensor, samples: int) -> Tensor:
    """Each sample's own, (n, R, C)."""
    return W_SRC.repeat_interleave(samples // len(W_SRC), 0)


def _outer(narrow: Tensor, places: Tensor, segments: int, last: bool) -> Tensor:
    """Σ over a segment's places of narrow ⊗ places, fp32 at least, (S, R, C): a product of each sample, then their sum."""
    left, right = (narrow.transpose(1, 2), places) if last else (narrow, places.transpose(1, 2))
    each = outer(left, right)
    return each.view(segments, -1, *each.shape[1:]).sum(1)


def _shrink(x: Tensor, A_SRI: Tensor, layer_map: ConvMap, last: bool) -> Tensor:
    """The run's narrow product, as places."""
    if layer_map.pointwise:
        return _through(_places(x, last), A_SRI, last)
    each = zip(x.chunk(len(A_SRI)), A_SRI.unbind(), strict=True)
    made = [_places(_ordered(layer_map.shrink(own, A_RI), last), last) for own, A_RI in each]
    return made[0] if len(made) == 1 else torch.cat(made)


def _shrink_backward(
    dx: Tensor | None, d_narrow: Tensor, x: Tensor, A_SRI: Tensor, layer_map: ConvMap, last: bool, needs_A: bool
) -> Tensor | None:
    """Adds the run's part to dx in place; dA (S, R, I) where it is needed."""
    if layer_map.pointwise:
        if dx is not None:
            _add_expanded(_places(dx, last), d_narrow, A_SRI, last)
        return _outer(d_narrow, _places(x, last), len(A_SRI), last) if needs_A else None
    d_image = _image(d_narrow, layer_map.size_of(x), last)
    found: list[Tensor] = []
    parts = [None] * len(A_SRI) if dx is None else dx.chunk(len(A_SRI))
    for own, part, d_own, A_RI in zip(x.chunk(len(A_SRI)), parts, d_image.chunk(len(A_SRI)), A_SRI.unbind(), strict=True):
        change, dA = layer_map.shrink_backward(d_own, own, A_RI, (part is not None, needs_A))
        if part is not None and change is not None:
            part.add_(change)
        if dA is not None:
            found.append(dA)
    return torch.stack(found) if found else None
