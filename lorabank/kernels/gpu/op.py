"""One adapted linear layer as one functional custom op, `lorabank::lora_linear`: the frozen product and the adapters' change.

torch.compile sees through it (products and Triton kernels are scheduled like its own), the eager step runs it as it is. The
narrow xAᵀ is all that it saves besides x. Its backward is an op of its own. Shapes as in lora.py; x (…, I), y (…, O).
`drops`: as in dropout.py; with them, scaling is the one that `LayerTables` keeps for dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from lorabank.kernels.gpu import lora
from lorabank.kernels.gpu.storage import STORAGES
from lorabank.kernels.tables import RouteTables


def custom_op(name: str, function: Callable[..., Any]) -> Any:
    """A custom op that torch.compile sees through, where kernels are compiled; one it calls, where they are interpreted."""
    if isinstance(lora._shrink, triton.runtime.JITFunction):
        return torch.library.triton_op(name, function, mutates_args=())
    return torch.library.custom_op(name, function, mutates_args=())


def opaque_op(name: str, function: Callable[..., list[Tensor]]) -> Any:
    """A custom op that compilers don't look into: they would copy what products write into views.

    Inside it runs one that starts kernels as they are; outside of one torch would note each start for a compiler.
    """
    steps = custom_op(f"{name}_steps", function)
    return torch.library.custom_op(name, functools.wraps(function)(lambda *args: steps(*args)), mutates_args=())


def flat_rows(x: Tensor) -> Tensor:
    """(…, F) as (N, F), rows next to each other."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _forward(
    x: Tensor, base: list[Tensor], bias: Tensor | None, A: Tensor, B: Tensor, ranks: Tensor, scaling: Tensor,
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str, width: int, drops: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()  # a slice of a wider tensor is a view with longer rows
    xa_NW = lora.shrink(x_NI, A, tables, ranks, scaling, width, drops)
    kind = STORAGES[storage]
    if kind.add_forward is not None:
        y_NO = lora.change(xa_NW, B, bias, tables, ranks)
        kind.add_forward(y_NO, x_NI, base)
    else:
        y_NO = kind.forward(x_NI, base, bias)
        lora.expand_(y_NO, xa_NW, B, tables, ranks)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1]), xa_NW


def _backward(
    dy: Tensor, x: Tensor, xa: Tensor, base: list[Tensor], A: Tensor, B: Tensor, ranks: Tensor, scaling: Tensor,
    order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, storage: str, width: int, drops: list[Tensor], needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tables = RouteTables(order, tiles, chunks, spans)
    x_NI, dy_NO = x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, dy.shape[-1]).to(x.dtype).contiguous()
    (dB,), (dxa_NW,) = lora.outer_and_shrink([xa], [dy_NO], [B], tables, [ranks], [scaling])
    dA = lora.outer(dxa_NW, x_NI, A, tables, ranks, drops)
    if not needs_dx:
        return x.new_empty(0), dA, dB
    kind = STORAGES[storage]
    if kind.add_input_grad is not None:
        dx_NI = lora.change(dxa_NW, A, None, tables, ranks, drops)
        kind.add_input_grad(dx_NI, dy_NO, base)
    else:
        dx_NI = kind.input_grad(dy_NO, base)
        lora.expand_(dx_NI, dxa_NW, A, tables, ranks, drops)
    return dx_NI.view(x.shape), dA, dB


lora_linear = custom_op("lorabank::lora_linear", _forward)
lora_linear_backward = custom_op("lorabank::lora_linear_backward", _backward)


def _fake_forward(x, base, bias, A, B, ranks, scaling, order, tiles, chunks, spans, storage, width, drops):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], B.shape[1]), x.new_empty(order.shape[0], width)


def _fake_backward(dy, x, xa, base, A, B, ranks, scaling, order, tiles, chunks, spans, storage, width, drops, needs_dx):  # type: ignore[no-untyped-def]
    return (x.new_empty(x.shape) if needs_dx else x.new_empty(0)), torch.empty_like(A), torch.empty_like(B)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, base, _, A, B, ranks, scaling, order, tiles, chunks, spans, storage, width, drops = inputs
    ctx.save_for_backward(x, output[1], A, B, ranks, scaling, order, tiles, chunks, spans, *drops, *base)
    ctx.storage, ctx.width, ctx.drops = storage, width, len(drops)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, xa, A, B, ranks, scaling, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    drops, base = rest[: ctx.drops], rest[ctx.drops :]
    needs_dx = ctx.needs_input_grad[0]
    dx, dA, dB = lora_linear_backward(
        dy, x, xa, base, A, B, ranks, scaling, order, tiles, chunks, spans, ctx.storage, ctx.width, drops, needs_dx
    )
    return (dx if needs_dx else None), [None] * len(base), None, dA, dB, *[None] * 8, [None] * len(drops)


lora_linear.register_fake(_fake_forward)
lora_linear_backward.register_fake(_fake_backward)
lora_linear.register_autograd(_gradient, setup_context=_setup)
