"""A gated MLP whose weights carry borders (bordered.py) as one custom op, `lorabank::lora_mlp`: down(act(gate(x)) · up(x)).

Nobody calls it: `grouping.py` puts it in the place of such layers in a compiled block. Lists have one entry for each of gate,
up and down. `bases`: layer by layer the tensors of the `bordered` storage: W, the wide weight that W is a
view of, poison (P, blocks).
Results: y, gate's and up's outputs, and the three s·xAᵀ; h isn't kept but made again in backward. To a compiler the op is
opaque: its products write into views, which it would copy. Its twin: the three layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels.gpu import bordered, lora, siblings
from lorabank.kernels.gpu.op import custom_op
from lorabank.kernels.tables import RouteTables

EACH = 3
"""Tensors of a bordered weight."""


def _forward(
    x: Tensor, bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor],
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, activation: str,
) -> list[Tensor]:  # fmt: skip
    tables, x_NI = RouteTables(order, tiles, chunks, spans), x.reshape(-1, x.shape[-1]).contiguous()
    weights, poison, pad, sides = bases[1::EACH], bases[2::EACH], bases[1].shape[1] - bases[0].shape[1], _sides(bases)
    wide, narrow = bordered.widen(
        x_NI, _of(As, sides), tables, _of(ranks, sides), _of(scalings, sides), _of(poison, sides), pad, width
    )
    left_NF, right_NF = wide[:, :-pad] @ weights[sides[0]].t(), wide[:, pad:] @ weights[sides[1]].t()
    gate_NF, up_NF = _of([left_NF, right_NF], sides)
    y_wide = bordered.activate(gate_NF, up_NF, activation) @ weights[2].t()
    y_NO, last = bordered.finish(y_wide, Bs[2:], tables, ranks[2:], scalings[2:], poison[2:], pad, width)
    return [y_NO.view(*x.shape[:-1], y_NO.shape[-1]), gate_NF, up_NF, *_of(narrow, sides), *last]


def _backward(
    dy: Tensor, x: Tensor, outputs: list[Tensor], xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor],
    ranks: list[Tensor], scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
    activation: str, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI, dy_NO = (part.reshape(-1, part.shape[-1]).contiguous() for part in (x, dy.to(x.dtype)))
    weights, poison, pad, sides = bases[1::EACH], bases[2::EACH], bases[1].shape[1] - bases[0].shape[1], _sides(bases)
    dy_wide, last = bordered.widen(dy_NO, Bs[2:], tables, ranks[2:], scalings[2:], poison[2:], pad, width)
    dB_down = lora.outer(xas[2], dy_NO, Bs[2], tables, ranks[2])
    dh_NF = dy_wide @ weights[2]
    likes = [Bs[0], Bs[1], As[2]]
    dgate_NF, dup_NF, grads = bordered.middle(dh_NF, *outputs, [*xas[:2], *last], likes, tables, ranks, activation)
    left_NF, right_NF = _of([dgate_NF, dup_NF], sides)
    dx_wide = torch.empty((len(x_NI), x_NI.shape[1] + 2 * pad), dtype=x.dtype, device=x.device)
    dx_wide[:, -pad:].zero_()
    torch.mm(left_NF, weights[sides[0]], out=dx_wide[:, :-pad])
    torch.addmm(dx_wide[:, pad:], right_NF, weights[sides[1]], out=dx_wide[:, pad:])
    dx_NI, narrow = bordered.finish(
        dx_wide, _of(As, sides), tables, _of(ranks, sides), _of(scalings, sides), _of(poison, sides), pad, width
    )
    dAs = siblings.outer(_of(narrow, sides), x_NI, As[:2], tables, ranks[:2])
    dx = dx_NI.view(x.shape) if needs_dx else x.new_empty(0)
    return [dx, *dAs, grads[2], grads[0], grads[1], dB_down]


def _sides(bases: Sequence[Tensor]) -> tuple[int, int]:
    """Of gate (0) and up (1) the one whose border is before its weight, then the one whose border is behind it."""
    return (1, 0) if bases[0].data_ptr() == bases[1].data_ptr() else (0, 1)


def _of(values: Sequence[Tensor], sides: tuple[int, int]) -> list[Tensor]:
    """Gate's and up's values by side, or values by side as gate's and up's."""
    return [values[sides[0]], values[sides[1]]]


_transparent_forward = custom_op("lorabank::lora_mlp_forward_steps", _forward)
_transparent_backward = custom_op("lorabank::lora_mlp_backward_steps", _backward)


def _run_forward(
    x: Tensor, bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor],
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, activation: str,
) -> list[Tensor]:  # fmt: skip
    # through an op that starts kernels as they are: outside of one, torch would note each start for a compiler
    return _transparent_forward(x, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation)


def _run_backward(
    dy: Tensor, x: Tensor, outputs: list[Tensor], xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor],
    ranks: list[Tensor], scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
    activation: str, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    return _transparent_backward(
        dy, x, outputs, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation, needs_dx
    )


lora_mlp = torch.library.custom_op("lorabank::lora_mlp", _run_forward, mutates_args=())
lora_mlp_backward = torch.library.custom_op("lorabank::lora_mlp_backward", _run_backward, mutates_args=())


def _fake_forward(x, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation):  # type: ignore[no-untyped-def]
    tokens = order.shape[0]
    outputs = [x.new_empty(tokens, B.shape[1]) for B in Bs[:2]]
    return [x.new_empty(*x.shape[:-1], Bs[2].shape[1]), *outputs, *(x.new_empty(tokens, width) for _ in Bs)]


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, x, outputs, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation, needs_dx
):
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return [dx, *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation = inputs
    ctx.save_for_backward(x, order, tiles, chunks, spans, *output[1:], *As, *Bs, *ranks, *scalings, *bases)
    ctx.width, ctx.activation = width, activation


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, gate, up, *rest = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    xas, As, Bs, ranks, scalings = (rest[i * 3 : (i + 1) * 3] for i in range(5))
    bases = rest[15:]
    dx, *more = lora_mlp_backward(
        grads[0], x, [gate, up], xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.width, ctx.activation,
        needs_dx,
    )  # fmt: skip
    nothing = [None] * 3
    return dx if needs_dx else None, [None] * len(bases), more[:3], more[3:], nothing, nothing, *[None] * 6


lora_mlp.register_fake(_fake_forward)
lora_mlp_backward.register_fake(_fake_backward)
lora_mlp.register_autograd(_gradient, setup_context=_setup)
_transparent_forward.register_fake(_fake_forward)
_transparent_backward.register_fake(_fake_backward)
