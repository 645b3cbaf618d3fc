"""A gated MLP over an fp8 base as two custom ops, down(act(gate(x)) · up(x)): LoRA costs no pass of its own over a wide tensor.

`lorabank::lora_gated_open` makes the frozen products gate and up and their narrow xAᵀ, `lorabank::lora_gated_close` the rest;
where a block is computed again in backward, only the first is. All gradients are `close`'s, since what the activation's backward
notes (each row's largest number) isn't a tensor that autograd would hand on: those of what `open` gave are none. Nobody calls the
ops: `grouping.py` puts them in the place of such layers in a compiled block. Lists are gate's, up's and down's; `bases`: all
tensors of the storages, layer by layer. h isn't kept but made again in backward. On a device without fp8 units products
dequantise, as in fp8.py, and nothing is rounded. Their twin: the three layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels import fp8
from lorabank.kernels.gpu import gated, lora, rounding, siblings
from lorabank.kernels.gpu.op import flat_rows, opaque_op
from lorabank.kernels.tables import RouteTables

EACH = 4
"""Tensors of an fp8 weight."""


def _open(
    x: Tensor, bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor],
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
) -> list[Tensor]:  # fmt: skip
    """[gate, up, s·xAᵀ of gate and of up], gate and up being the frozen products alone. Lists are gate's and up's."""
    x_NI, tables = flat_rows(x), RouteTables(order, tiles, chunks, spans)
    rows = _rounded(x_NI)
    products = [_product(rows, base[0], base[1], x.dtype) for base in _layers(bases)]
    return [*products, *siblings.shrink(x_NI, As, tables, ranks, scalings, width)]


def _close(
    onto: Tensor | None, x: Tensor, gate: Tensor, up: Tensor, xas: list[Tensor], bases: list[Tensor], As: list[Tensor],
    Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor,
    width: int, activation: str, again: bool,
) -> list[Tensor]:  # fmt: skip
    """[y (N, I), s·hAᵀ of down]. `x`, As and Bs of gate and up are for backward. `onto`: a residual (N, I) that y is added to.

    `again`: the block will be computed again, without this op: nothing of it is kept.
    """
    tables, down = RouteTables(order, tiles, chunks, spans), _layers(bases)[2]
    maxima = rounding.maxima_like(gate, 1) if fp8.runs_on(x.device) else None
    h_NF = gated.activate(gate, up, xas, Bs[:2], tables, ranks[:2], activation, maxima)
    (rows,), (xa,) = _rounded_and_shrunk([h_NF], maxima, As[2:], tables, ranks[2:], scalings[2:], width)
    y_NO = _product(rows, down[0], down[1], x.dtype)
    lora.expand_(y_NO, xa, Bs[2], tables, ranks[2], onto=None if onto is None else flat_rows(onto))
    return [y_NO, x.new_empty(0) if again else xa]


def _close_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, xas: list[Tensor], xa: Tensor, bases: list[Tensor], As: list[Tensor],
    Bs: list[Tensor], ranks: list[Tensor], scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor,
    width: int, activation: str, again: bool, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables, layers = RouteTables(order, tiles, chunks, spans), _layers(bases)
    x_NI, dy_NO = flat_rows(x), flat_rows(dy.to(x.dtype))
    dh_NF = _product(_rounded(dy_NO), layers[2][2], layers[2][3], x.dtype)
    if again:
        h_NF = gated.activate(gate, up, xas, Bs[:2], tables, ranks[:2], activation)
        xa = lora.shrink(h_NF, As[2], tables, ranks[2], scalings[2], width)
        del h_NF
    (dB_down,), (last,) = lora.outer_and_shrink([xa], [dy_NO], Bs[2:], tables, ranks[2:], scalings[2:])
    maxima = rounding.maxima_like(gate, 2) if fp8.runs_on(x.device) else None
    outers = 3 if maxima is None else gated.OUTERS
    *wide, (*dBs, dA_down) = gated.middle(
        dh_NF, gate, up, [*xas, last], [*Bs[:2], As[2]], tables, ranks, activation, maxima, outers
    )
    del dh_NF
    rest = Bs[:2], tables, ranks[:2], scalings[:2]
    if maxima is not None and outers == 1:
        rows, dBs, narrow = rounding.round_outer_and_shrink(wide, maxima, xas, *rest)
    else:
        rows, narrow = _rounded_and_shrunk(wide, maxima, *rest, width)
    del wide
    dAs = siblings.outer(narrow, x_NI, As[:2], tables, ranks[:2])
    gradients = [*dAs, dA_down, *dBs, dB_down]
    if not needs_dx:
        return [x.new_empty(0), *gradients]
    dx_NI, more = (_product(row, base[2], base[3], x.dtype) for row, base in zip(rows, layers[:2], strict=True))
    siblings.change(narrow, As[:2], tables, ranks[:2], out_NF=dx_NI, more=[more])
    return [dx_NI.view(x.shape), *gradients]


def _layers(bases: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [bases[i : i + EACH] for i in range(0, len(bases), EACH)]


def _rounded(x_NF: Tensor) -> rounding.Rounded | Tensor:
    """What a product takes."""
    return rounding.quantize(x_NF) if fp8.runs_on(x_NF.device) else x_NF


def _rounded_and_shrunk(
    x: Sequence[Tensor], maxima: Tensor | None, weights: Sequence[Tensor], tables: RouteTables, ranks: Sequence[Tensor],
    scalings: Sequence[Tensor], width: int,
) -> tuple[Sequence[rounding.Rounded | Tensor], list[Tensor]]:  # fmt: skip
    """(what products take of each x, its narrow product by a weight). `maxima`: none on a device without fp8 units."""
    if maxima is not None:
        return rounding.round_and_shrink(x, maxima, weights, tables, ranks, scalings, width)
    layers = zip(x, weights, ranks, scalings, strict=True)
    return x, [lora.shrink(wide, weight, tables, place, scaling, width) for wide, weight, place, scaling in layers]


def _product(rows: rounding.Rounded | Tensor, weight_FK: Tensor, scale_F: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(rows, Tensor):
        return rows @ fp8.dequantize_rows(weight_FK, scale_F, dtype).t()
    return fp8.multiply(*rows, weight_FK, scale_F).to(dtype)


lora_gated_open = opaque_op("lorabank::lora_gated_open", _open)
lora_gated_close = opaque_op("lorabank::lora_gated_close", _close)
lora_gated_close_backward = opaque_op("lorabank::lora_gated_close_backward", _close_backward)


def _fake_open(x, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width):  # type: ignore[no-untyped-def]
    tokens = order.shape[0]
    return [*(x.new_empty(tokens, B.shape[1]) for B in Bs), *(x.new_empty(tokens, width) for _ in Bs)]


def _fake_close(  # type: ignore[no-untyped-def]
    onto, x, gate, up, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation, again
):
    return [x.new_empty(gate.shape[0], Bs[2].shape[1]), x.new_empty(0) if again else x.new_empty(order.shape[0], width)]


def _fake_close_backward(  # type: ignore[no-untyped-def]
    dy, x, gate, up, xas, xa, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation, again, needs_dx
):
    return [x.new_empty(x.shape if needs_dx else 0), *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup_open(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.sizes = [len(each) if isinstance(each, (list, tuple)) else None for each in inputs]


def _open_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if size is None else [None] * size for size in ctx.sizes)


def _setup_close(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    onto, x, gate, up, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, activation, again = inputs
    xa = order if again else output[1]  # anything, then: an empty result would have to be made again, too
    ctx.save_for_backward(x, gate, up, xa, order, tiles, chunks, spans, *xas, *As, *Bs, *ranks, *scalings, *bases)
    ctx.width, ctx.activation, ctx.again, ctx.onto = width, activation, again, onto is not None


def _close_gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, gate, up, xa, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    needs_dx, xas, bases = ctx.needs_input_grad[1], rest[:2], rest[14:]
    As, Bs, ranks, scalings = (rest[i : i + 3] for i in range(2, 14, 3))
    dx, *more = lora_gated_close_backward(
        grads[0], x, gate, up, xas, xa, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.width, ctx.activation,
        ctx.again, needs_dx,
    )  # fmt: skip
    nothing = [None] * 3
    return (
        grads[0] if ctx.onto else None, dx if needs_dx else None, None, None, [None, None], [None] * len(bases), more[:3],
        more[3:], nothing, nothing, *[None] * 7,
    )  # fmt: skip


lora_gated_open.register_fake(_fake_open)
lora_gated_close.register_fake(_fake_close)
lora_gated_close_backward.register_fake(_fake_close_backward)
lora_gated_open.register_autograd(_open_gradient, setup_context=_setup_open)
lora_gated_close.register_autograd(_close_gradient, setup_context=_setup_close)
