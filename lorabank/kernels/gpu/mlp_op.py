"""A gated MLP whose three layers are adapted as one functional custom op, `lorabank::lora_mlp`: down(act(gate(x)) · up(x)).

Nobody calls it: `grouping.py` puts it in the place of such layers in a compiled block. Lists have one entry for each of gate,
up and down; `bases` all tensors of the storages, layer by layer; `biases` is empty where there are none. Results: y, the frozen
products g₀ and u₀, and the three xAᵀ; h isn't kept but made again in backward. Its twin: the three layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels.gpu import lora, mlp, siblings
from lorabank.kernels.gpu.op import custom_op
from lorabank.kernels.gpu.storage import STORAGES
from lorabank.kernels.tables import RouteTables


def _forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str, width: int,
    activation: str,
) -> list[Tensor]:  # fmt: skip
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI = x.reshape(-1, x.shape[-1])
    kind, parts = STORAGES[storage], _parts(bases)
    narrow = siblings.shrink(x_NI, As[:2], tables, ranks[:2], scalings[:2], width)
    products = [kind.forward(x_NI, parts[i], biases[i] if biases else None) for i in (0, 1)]
    h_NF, xa_NW = mlp.gate_up(products, narrow, Bs[:2], As[2], tables, ranks, scalings[2], activation)
    bias = biases[2] if biases else None
    if kind.add_forward is not None:
        y_NO = lora.change(xa_NW, Bs[2], bias, tables, ranks[2])
        kind.add_forward(y_NO, h_NF, parts[2])
    else:
        y_NO = kind.forward(h_NF, parts[2], bias)
        lora.expand_(y_NO, xa_NW, Bs[2], tables, ranks[2])
    return [y_NO.view(*x.shape[:-1], y_NO.shape[-1]), *products, *narrow, xa_NW]


def _backward(
    dy: Tensor, x: Tensor, products: list[Tensor], xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor],
    ranks: list[Tensor], scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str,
    width: int, activation: str, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI, dy_NO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(x.dtype).contiguous()
    kind, parts = STORAGES[storage], _parts(bases)
    (dB_down,), (dxa_NW,) = lora.outer_and_shrink(xas[2:], [dy_NO], Bs[2:], tables, ranks[2:], scalings[2:])
    if kind.add_input_grad is not None:
        dh_NF = lora.change(dxa_NW, As[2], None, tables, ranks[2])
        kind.add_input_grad(dh_NF, dy_NO, parts[2])
    else:
        dh_NF = kind.input_grad(dy_NO, parts[2])
        lora.expand_(dh_NF, dxa_NW, As[2], tables, ranks[2])
    h_NF, dys = mlp.gate_up_backward(dh_NF, products, xas[:2], Bs[:2], tables, ranks, activation)
    dA_down = lora.outer(dxa_NW, h_NF, As[2], tables, ranks[2])
    dBs, narrow = lora.outer_and_shrink(xas[:2], dys, Bs[:2], tables, ranks[:2], scalings[:2])
    dAs = siblings.outer(narrow, x_NI, As[:2], tables, ranks[:2])
    gradients = [*dAs, dA_down, *dBs, dB_down]
    if not needs_dx:
        return [x.new_empty(0), *gradients]
    if kind.add_input_grad is not None:
        dx_NI = siblings.change(narrow, As[:2], tables, ranks[:2])
        for i in (0, 1):
            kind.add_input_grad(dx_NI, dys[i], parts[i])
    else:
        dx_NI = kind.input_grad(dys[0], parts[0]) + kind.input_grad(dys[1], parts[1])
        siblings.change(narrow, As[:2], tables, ranks[:2], out_NF=dx_NI)
    return [dx_NI.view(x.shape), *gradients]


def _parts(bases: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    each = len(bases) // 3
    return [bases[i * each : (i + 1) * each] for i in range(3)]


lora_mlp = custom_op("lorabank::lora_mlp", _forward)
lora_mlp_backward = custom_op("lorabank::lora_mlp_backward", _backward)


def _fake_forward(x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, activation):  # type: ignore[no-untyped-def]
    tokens = order.shape[0]
    products = [x.new_empty(tokens, B.shape[1]) for B in Bs[:2]]
    return [x.new_empty(*x.shape[:-1], Bs[2].shape[1]), *products, *(x.new_empty(tokens, width) for _ in Bs)]


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, x, products, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, activation, needs_dx
):
    return [torch.empty_like(x) if needs_dx else x.new_empty(0), *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, storage, width, activation = inputs
    ctx.save_for_backward(x, order, tiles, chunks, spans, *output[1:], *As, *Bs, *ranks, *scalings, *bases)
    ctx.biases, ctx.storage, ctx.width, ctx.activation = len(biases), storage, width, activation


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, g0, u0, *rest = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    xas, As, Bs, ranks, scalings = (rest[i * 3 : (i + 1) * 3] for i in range(5))
    bases = rest[15:]
    dx, *more = lora_mlp_backward(
        grads[0], x, [g0, u0], xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.storage, ctx.width,
        ctx.activation, needs_dx,
    )  # fmt: skip
    nothing = [None] * 3
    return (
        dx if needs_dx else None, [None] * len(bases), [None] * ctx.biases, more[:3], more[3:], nothing, nothing, *[None] * 7,
    )  # fmt: skip


lora_mlp.register_fake(_fake_forward)
lora_mlp_backward.register_fake(_fake_backward)
lora_mlp.register_autograd(_gradient, setup_context=_setup)
