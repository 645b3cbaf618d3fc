"""A gated MLP whose weights carry borders (bordered.py) as two custom ops: down(act(gate(x)) · up(x)).

`lorabank::lora_mlp_open` is gate and up, `lorabank::lora_mlp_close` the rest; where a block is computed again in backward, only
the first is. Nobody calls them: `grouping.py` puts them in the place of such layers in a compiled block. `bases`: layer by layer
the tensors of the `bordered` storage: W, the wide weight that W is a view of, its shadow, poison (P, blocks). gate and up share a
shadow, whose first half is that of the layer whose border is before its weight. h isn't kept but made again in backward. To a
compiler the ops are opaque: their products write into views, which it would copy. Their twin: the three layers one after the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels.gpu import gated_mlp, lora, products, siblings
from lorabank.kernels.gpu.bordered import Group
from lorabank.kernels.gpu.op import flat_rows, opaque_op
from lorabank.kernels.gpu.sums import Later
from lorabank.kernels.tables import RouteTables

EACH = 4
"""Tensors of a bordered weight."""


def _open(
    x: Tensor, bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor],
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, swapped: bool,
) -> list[Tensor]:  # fmt: skip
    """[gate, up, s·xAᵀ of gate and of up]. Lists are gate's and up's; `swapped`: up's border is the one before its weight."""
    tables, sides = RouteTables(order, tiles, chunks, spans), _sides(swapped)
    left, right = _of(bases[1::EACH], sides)
    group = _pair(bases, ranks, scalings, width, sides)
    wide, narrow = group.widen(flat_rows(x), tables)
    return [*_of([wide[:, : -group.share] @ left.t(), wide[:, group.share :] @ right.t()], sides), *_of(narrow, sides)]


def _open_backward(
    dgate: Tensor, dup: Tensor, x: Tensor, bases: list[Tensor], As: list[Tensor], ranks: list[Tensor], scalings: list[Tensor],
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, swapped: bool, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of gate and of up]; dx is empty where it isn't needed."""
    tables, x_NI, sides = RouteTables(order, tiles, chunks, spans), flat_rows(x), _sides(swapped)
    (left, right), group = _of(bases[1::EACH], sides), _pair(bases, ranks, scalings, width, sides)
    dleft, dright = _of([dgate.contiguous(), dup.contiguous()], sides)
    pad = group.share
    wide = torch.empty((len(x_NI), x_NI.shape[1] + 2 * pad), dtype=x.dtype, device=x.device)
    wide[:, -pad:].zero_()
    products.multiply(dleft, left, wide[:, :-pad])
    products.multiply(dright, right, wide[:, pad:], onto=True)
    dx_NI, narrow = group.finish(wide, tables)
    dAs = siblings.outer(_of(narrow, sides), x_NI, As, tables, ranks)
    return [dx_NI.view(x.shape) if needs_dx else x.new_empty(0), *dAs]


def _close(
    onto: Tensor | None, gate: Tensor, up: Tensor, xas: list[Tensor], base: list[Tensor], Bs: list[Tensor], A: Tensor, B: Tensor,
    ranks: list[Tensor], scaling: Tensor, order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
    activation: str, again: bool,
) -> list[Tensor]:  # fmt: skip
    """[y (N, I), s·hAᵀ of down]. `xas`, `Bs` are gate's and up's, for backward.

    `onto`: a residual (N, I) that y is added to. `again`: the block will be computed again, without this op: nothing of it is
    kept.
    """
    tables = RouteTables(order, tiles, chunks, spans)
    y_wide = products.multiply(gated_mlp.activate(gate, up, activation), base[1].t())
    y_NO, (xa,) = _alone(base, ranks[2], scaling, width).finish(y_wide, tables, None if onto is None else flat_rows(onto))
    return [y_NO, gate.new_empty(0) if again else xa]


def _close_backward(
    dy: Tensor, gate: Tensor, up: Tensor, xas: list[Tensor], xa: Tensor, base: list[Tensor], Bs: list[Tensor], A: Tensor,
    B: Tensor, ranks: list[Tensor], scaling: Tensor, order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
    activation: str, again: bool,
) -> list[Tensor]:  # fmt: skip
    """[dgate, dup, dB of gate and of up, dA and dB of down]."""
    tables = RouteTables(order, tiles, chunks, spans)
    dy_NO = flat_rows(dy.to(gate.dtype))
    if again:
        xa = lora.shrink(gated_mlp.activate(gate, up, activation), A, tables, ranks[2], scaling, width)
    dy_wide, last = _alone(base, ranks[2], scaling, width).widen(dy_NO, tables)
    later = Later()
    dB = lora.outer(xa, dy_NO, B, tables, ranks[2], later=later)
    dh_NF = dy_wide @ base[1]
    dgate, dup, (*dBs, dA) = gated_mlp.middle(dh_NF, gate, up, [*xas, *last], [*Bs, A], tables, ranks, activation, later)
    later.fold(tables)
    return [dgate, dup, *dBs, dA, dB]


def _pair(
    bases: Sequence[Tensor], ranks: Sequence[Tensor], scalings: Sequence[Tensor], width: int, sides: tuple[int, int]
) -> Group:
    """gate and up by side: a border before x and one behind it."""
    pad = bases[1].shape[1] - bases[0].shape[1]
    ranks, scalings, poison = _of(ranks, sides), _of(scalings, sides), _of(bases[3::EACH], sides)
    return Group(shadow=bases[2], ranks=ranks, scalings=scalings, poison=poison, width=width, pads=2 * pad, share=pad, left=pad)


def _alone(base: Sequence[Tensor], ranks: Tensor, scaling: Tensor, width: int) -> Group:
    """down, whose border is below its weight."""
    pad = base[1].shape[0] - base[0].shape[0]
    return Group(shadow=base[2], ranks=[ranks], scalings=[scaling], poison=[base[3]], width=width, pads=pad, share=pad)


def _sides(swapped: bool) -> tuple[int, int]:
    """Of gate (0) and up (1) the one whose border is before its weight, then the one whose border is behind it."""
    return (1, 0) if swapped else (0, 1)


def _of(values: Sequence[Tensor], sides: tuple[int, int]) -> list[Tensor]:
    """Gate's and up's values by side, or values by side as gate's and up's."""
    return [values[sides[0]], values[sides[1]]]


lora_mlp_open = opaque_op("lorabank::lora_mlp_open", _open)
lora_mlp_open_backward = opaque_op("lorabank::lora_mlp_open_backward", _open_backward)
lora_mlp_close = opaque_op("lorabank::lora_mlp_close", _close)
lora_mlp_close_backward = opaque_op("lorabank::lora_mlp_close_backward", _close_backward)


def _fake_open(x, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, swapped):  # type: ignore[no-untyped-def]
    tokens = order.shape[0]
    return [*(x.new_empty(tokens, B.shape[1]) for B in Bs), *(x.new_empty(tokens, width) for _ in Bs)]


def _fake_open_backward(  # type: ignore[no-untyped-def]
    dgate, dup, x, bases, As, ranks, scalings, order, tiles, chunks, spans, width, swapped, needs_dx
):
    return [x.new_empty(x.shape) if needs_dx else x.new_empty(0), *map(torch.empty_like, As)]


def _fake_close(  # type: ignore[no-untyped-def]
    onto, gate, up, xas, base, Bs, A, B, ranks, scaling, order, tiles, chunks, spans, width, activation, again
):
    return [gate.new_empty(gate.shape[0], B.shape[1]), gate.new_empty(0) if again else gate.new_empty(order.shape[0], width)]


def _fake_close_backward(  # type: ignore[no-untyped-def]
    dy, gate, up, xas, xa, base, Bs, A, B, ranks, scaling, order, tiles, chunks, spans, width, activation, again
):
    return [torch.empty_like(tensor) for tensor in (gate, up, *Bs, A, B)]


def _setup_open(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, As, _, ranks, scalings, order, tiles, chunks, spans, width, swapped = inputs
    ctx.save_for_backward(x, order, tiles, chunks, spans, *As, *ranks, *scalings, *bases)
    ctx.width, ctx.swapped = width, swapped


def _open_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    needs_dx, As, ranks, scalings, bases = ctx.needs_input_grad[0], rest[:2], rest[2:4], rest[4:6], rest[6:]
    dgate, dup = grads[0], grads[1]
    assert dgate is not None
    assert dup is not None
    dx, *dAs = lora_mlp_open_backward(
        dgate, dup, x, bases, As, ranks, scalings, order, tiles, chunks, spans, ctx.width, ctx.swapped, needs_dx
    )
    nothing = [None, None]
    return dx if needs_dx else None, [None] * len(bases), dAs, nothing, nothing, nothing, *[None] * 6


def _setup_close(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    onto, gate, up, xas, base, Bs, A, B, ranks, scaling, order, tiles, chunks, spans, width, activation, again = inputs
    xa = scaling if again else output[1]  # anything, then: an empty result would have to be made again, too
    ctx.save_for_backward(gate, up, xa, A, B, scaling, order, tiles, chunks, spans, *xas, *base, *Bs, *ranks)
    ctx.width, ctx.activation, ctx.again, ctx.onto = width, activation, again, onto is not None


def _close_gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    gate, up, xa, A, B, scaling, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    xas, base, Bs, ranks = rest[:2], rest[2 : 2 + EACH], rest[2 + EACH : 4 + EACH], rest[4 + EACH :]
    dgate, dup, dB_gate, dB_up, dA, dB = lora_mlp_close_backward(
        grads[0], gate, up, xas, xa, base, Bs, A, B, ranks, scaling, order, tiles, chunks, spans, ctx.width, ctx.activation,
        ctx.again,
    )  # fmt: skip
    onto = grads[0] if ctx.onto else None
    return onto, dgate, dup, [None, None], [None] * EACH, [dB_gate, dB_up], dA, dB, [None] * 3, *[None] * 8


for _op, _fake in (
    (lora_mlp_open, _fake_open),
    (lora_mlp_open_backward, _fake_open_backward),
    (lora_mlp_close, _fake_close),
    (lora_mlp_close_backward, _fake_close_backward),
):
    _op.register_fake(_fake)
lora_mlp_open.register_autograd(_open_gradient, setup_context=_setup_open)
lora_mlp_close.register_autograd(_close_gradient, setup_context=_setup_close)
