"""Adapted linear layers that read the same x as one custom op, `lorabank::lora_linears`; its twin is `lora_linear` for each.

Nobody calls it: `grouping.py` puts it in the place of such layers in a compiled block. Lists have one entry a layer; `bases` all
tensors of the storages, layer by layer; `biases` is empty where there are none; `drops` as in dropout.py. Results: every layer's
y, then every layer's xAᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels.gpu import lora, siblings
from lorabank.kernels.gpu.op import custom_op
from lorabank.kernels.gpu.storage import STORAGES
from lorabank.kernels.tables import RouteTables


def _forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str, width: int,
    drops: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI = x.reshape(-1, x.shape[-1])
    narrow = siblings.shrink(x_NI, As, tables, ranks, scalings, width, drops)
    kind, count = STORAGES[storage], len(As)
    each = len(bases) // count
    results: list[Tensor] = []
    for i in range(count):
        base, bias = bases[i * each : (i + 1) * each], biases[i] if biases else None
        if kind.add_forward is not None:
            y_NO = lora.change(narrow[i], Bs[i], bias, tables, ranks[i])
            kind.add_forward(y_NO, x_NI, base)
        else:
            y_NO = kind.forward(x_NI, base, bias)
            lora.expand_(y_NO, narrow[i], Bs[i], tables, ranks[i])
        results.append(y_NO.view(*x.shape[:-1], y_NO.shape[-1]))
    return [*results, *narrow]


def _backward(
    dys: list[Tensor], x: Tensor, xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str, width: int,
    drops: list[Tensor], needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI = x.reshape(-1, x.shape[-1])
    flat = [dy.reshape(-1, dy.shape[-1]).to(x.dtype).contiguous() for dy in dys]
    dBs, narrow = lora.outer_and_shrink(xas, flat, Bs, tables, ranks, scalings)
    dAs = siblings.outer(narrow, x_NI, As, tables, ranks, drops)
    if not needs_dx:
        return [x.new_empty(0), *dAs, *dBs]
    kind, each = STORAGES[storage], len(bases) // len(flat)
    parts = [bases[i * each : (i + 1) * each] for i in range(len(flat))]
    if kind.add_input_grad is not None:
        dx_NI = siblings.change(narrow, As, tables, ranks, drops=drops)
        for dy, base in zip(flat, parts, strict=True):
            kind.add_input_grad(dx_NI, dy, base)
    else:
        dx_NI, *more = (kind.input_grad(dy, base) for dy, base in zip(flat, parts, strict=True))
        siblings.change(narrow, As, tables, ranks, out_NF=dx_NI, drops=drops, more=more)
    return [dx_NI.view(x.shape), *dAs, *dBs]


lora_linears = custom_op("lorabank::lora_linears", _forward)
lora_linears_backward = custom_op("lorabank::lora_linears_backward", _backward)


def _fake_forward(x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, drops):  # type: ignore[no-untyped-def]
    return [*(x.new_empty(*x.shape[:-1], B.shape[1]) for B in Bs), *(x.new_empty(order.shape[0], width) for _ in Bs)]


def _fake_backward(dys, x, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, drops, needs_dx):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x) if needs_dx else x.new_empty(0), *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, drops = inputs
    count = len(As)
    ctx.save_for_backward(x, order, tiles, chunks, spans, *output[count:], *As, *Bs, *ranks, *scalings, *drops, *bases)
    ctx.count, ctx.biases, ctx.drops, ctx.storage, ctx.width = count, len(biases), len(drops), storage, width


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    count, needs_dx = ctx.count, ctx.needs_input_grad[0]
    xas, As, Bs, ranks, scalings = (rest[i * count : (i + 1) * count] for i in range(5))
    drops, bases = rest[5 * count : 5 * count + ctx.drops], rest[5 * count + ctx.drops :]
    dx, *more = lora_linears_backward(
        list(grads[:count]), x, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.storage, ctx.width, drops,
        needs_dx,
    )  # fmt: skip
    nothing = [None] * count
    return (
        dx if needs_dx else None, [None] * len(bases), [None] * ctx.biases, more[:count], more[count:], nothing, nothing,
        *[None] * 6, [None] * len(drops),
    )  # fmt: skip


lora_linears.register_fake(_fake_forward)
lora_linears_backward.register_fake(_fake_backward)
lora_linears.register_autograd(_gradient, setup_context=_setup)
