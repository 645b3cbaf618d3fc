"""Layers that read the same x and whose weights have borders of one kind (bordered.py), as one custom op.

`lorabank::lora_joined`: [x, s·xAᵀ of each] is made once, times [W, B] of each layer, and [dx, dy·B of each] is one sum. A layer's
ranks have border columns of their own, which are zero in the others' weights. Nobody calls the op: `grouping.py` puts it in the
place of such layers (queries, keys and values; the output projection alone) in a compiled block. `bases`: layer by layer W, the
wide weight, the shadow of all layers, and poison (P, blocks). `biases` is empty where there are none. Opaque to a compiler, as
bordered_op.py says. Its twin: the layers one after the other.

One product for all layers instead (weights above one another) was tried: it saves 30 µs of 300 in backward at an 8B model's
sizes, and costs 50 for taking y apart and putting dy together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.gpu import lora, siblings
from lorabank.kernels.gpu.bordered import Group
from lorabank.kernels.gpu.op import flat_rows, opaque_op
from lorabank.kernels.gpu.outer_each import outer_each
from lorabank.kernels.gpu.sums import Later
from lorabank.kernels.tables import RouteTables

EACH = 4
"""Tensors of a joined weight."""


def _forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
) -> list[Tensor]:  # fmt: skip
    """[each layer's y, each layer's s·xAᵀ]."""
    tables, weights = RouteTables(order, tiles, chunks, spans), bases[1::EACH]
    wide, narrow = _group(bases, ranks, scalings, width).widen(flat_rows(x), tables)
    ys = [F.linear(wide, weight, biases[i] if biases else None) for i, weight in enumerate(weights)]
    return [*(y.view(*x.shape[:-1], y.shape[-1]) for y in ys), *narrow]


def _backward(
    dys: list[Tensor], x: Tensor, xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables, x_NI, flat = RouteTables(order, tiles, chunks, spans), flat_rows(x), [flat_rows(dy.to(x.dtype)) for dy in dys]
    wide = flat[0] @ bases[1]
    for dy, weight in zip(flat[1:], bases[1 + EACH :: EACH], strict=True):
        torch.addmm(wide, dy, weight, out=wide)
    dx_NI, narrow = _group(bases, ranks, scalings, width).finish(wide, tables)
    later = Later()
    if len(As) == 1:
        dAs = [lora.outer(narrow[0], x_NI, As[0], tables, ranks[0], later=later)]
    else:
        dAs = siblings.outer(narrow, x_NI, As, tables, ranks, later=later)
    dBs = outer_each(xas, flat, Bs, tables, ranks, later)
    later.fold(tables)
    return [dx_NI.view(x.shape) if needs_dx else x.new_empty(0), *dAs, *dBs]


def _group(bases: Sequence[Tensor], ranks: Sequence[Tensor], scalings: Sequence[Tensor], width: int) -> Group:
    pad = bases[1].shape[1] - bases[0].shape[1]
    share = pad // len(ranks)
    return Group(shadow=bases[2], ranks=ranks, scalings=scalings, poison=bases[3::EACH], width=width, pads=pad, share=share)


lora_joined = opaque_op("lorabank::lora_joined", _forward)
lora_joined_backward = opaque_op("lorabank::lora_joined_backward", _backward)


def _fake_forward(x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width):  # type: ignore[no-untyped-def]
    return [*(x.new_empty(*x.shape[:-1], B.shape[1]) for B in Bs), *(x.new_empty(order.shape[0], width) for _ in Bs)]


def _fake_backward(dys, x, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, needs_dx):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) if needs_dx else x.new_empty(0), *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width = inputs
    ctx.save_for_backward(x, order, tiles, chunks, spans, *output[len(As) :], *As, *Bs, *ranks, *scalings, *bases)
    ctx.count, ctx.biases, ctx.width = len(As), len(biases), width


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    count, needs_dx = ctx.count, ctx.needs_input_grad[0]
    xas, As, Bs, ranks, scalings = (rest[i * count : (i + 1) * count] for i in range(5))
    dx, *more = lora_joined_backward(
        list(grads[:count]), x, xas, rest[5 * count :], As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.width, needs_dx
    )
    nothing = [None] * count
    bases = [None] * (EACH * count)
    return dx if needs_dx else None, bases, [None] * ctx.biases, more[:count], more[count:], nothing, nothing, *[None] * 5


lora_joined.register_fake(_fake_forward)
lora_joined_backward.register_fake(_fake_backward)
lora_joined.register_autograd(_gradient, setup_context=_setup)
