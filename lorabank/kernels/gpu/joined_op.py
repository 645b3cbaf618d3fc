"""Layers that read the same x and whose weights stand above one another with a common border (bordered.py), as one custom op.

`lorabank::lora_joined`: y of all of them is one product, [x, s·xAᵀ of each]·[W, B]ᵀ, and so is dx with every dy·B. A layer's
ranks have columns of their own, in which the others' rows are zero. Nobody calls the op: `grouping.py` puts it in the place of
such layers (queries, keys and values; the output projection alone) in a compiled block. `bases`: layer by layer W, the wide
weight, the shadow, both of all layers, and poison (P, blocks). `biases` is empty where there are none. Opaque to a compiler, as
bordered_op.py says. Its twin: the layers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorabank.kernels.gpu import lora, siblings
from lorabank.kernels.gpu.bordered import Group
from lorabank.kernels.gpu.op import custom_op
from lorabank.kernels.gpu.outer_joined import outer_joined
from lorabank.kernels.tables import RouteTables

EACH = 4
"""Tensors of a joined weight."""


def _forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
) -> list[Tensor]:  # fmt: skip
    """[y of all layers side by side (…, ΣO), each layer's s·xAᵀ]."""
    tables, weight = RouteTables(order, tiles, chunks, spans), bases[1]
    wide, narrow = _group(bases, ranks, scalings, width).widen(_rows(x), tables)
    y_NO = torch.addmm(torch.cat(biases), wide, weight.t()) if biases else wide @ weight.t()
    return [y_NO.view(*x.shape[:-1], y_NO.shape[-1]), *narrow]


def _backward(
    dy: Tensor, x: Tensor, xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dA of each layer, dB of each layer]; dx is empty where it isn't needed."""
    tables, x_NI, dy_NO = RouteTables(order, tiles, chunks, spans), _rows(x), _rows(dy.to(x.dtype))
    dx_NI, narrow = _group(bases, ranks, scalings, width).finish(dy_NO @ bases[1], tables)
    if len(As) == 1:
        dAs = [lora.outer(narrow[0], x_NI, As[0], tables, ranks[0])]
    else:
        dAs = siblings.outer(narrow, x_NI, As, tables, ranks)
    dBs = outer_joined(xas, dy_NO, Bs, tables, ranks)
    return [dx_NI.view(x.shape) if needs_dx else x.new_empty(0), *dAs, *dBs]


def _group(bases: Sequence[Tensor], ranks: Sequence[Tensor], scalings: Sequence[Tensor], width: int) -> Group:
    pad = bases[1].shape[1] - bases[0].shape[1]
    share = pad // len(ranks)
    return Group(shadow=bases[2], ranks=ranks, scalings=scalings, poison=bases[3::EACH], width=width, pads=pad, share=share)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


_steps: dict[str, Callable[..., list[Tensor]]] = {
    "forward": custom_op("lorabank::lora_joined_steps", _forward),
    "backward": custom_op("lorabank::lora_joined_backward_steps", _backward),
}
"""What the ops below run: ops that start kernels as they are; outside of one torch would note each start for a compiler."""


def _run_forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int,
) -> list[Tensor]:  # fmt: skip
    return _steps["forward"](x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width)


def _run_backward(
    dy: Tensor, x: Tensor, xas: list[Tensor], bases: list[Tensor], As: list[Tensor], Bs: list[Tensor], ranks: list[Tensor],
    scalings: list[Tensor], order: Tensor, tiles: Tensor, chunks: Tensor, spans: Tensor, width: int, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    return _steps["backward"](dy, x, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, needs_dx)


lora_joined = torch.library.custom_op("lorabank::lora_joined", _run_forward, mutates_args=())
lora_joined_backward = torch.library.custom_op("lorabank::lora_joined_backward", _run_backward, mutates_args=())


def _fake_forward(x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width):  # type: ignore[no-untyped-def]
    outputs = sum(B.shape[1] for B in Bs)
    return [x.new_empty(*x.shape[:-1], outputs), *(x.new_empty(order.shape[0], width) for _ in Bs)]


def _fake_backward(dy, x, xas, bases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width, needs_dx):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) if needs_dx else x.new_empty(0), *map(torch.empty_like, As), *map(torch.empty_like, Bs)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, biases, As, Bs, ranks, scalings, order, tiles, chunks, spans, width = inputs
    ctx.save_for_backward(x, order, tiles, chunks, spans, *output[1:], *As, *Bs, *ranks, *scalings, *bases)
    ctx.count, ctx.biases, ctx.width = len(As), len(biases), width


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    x, order, tiles, chunks, spans, *rest = ctx.saved_tensors
    count, needs_dx = ctx.count, ctx.needs_input_grad[0]
    xas, As, Bs, ranks, scalings = (rest[i * count : (i + 1) * count] for i in range(5))
    dx, *more = lora_joined_backward(
        grads[0], x, xas, rest[5 * count :], As, Bs, ranks, scalings, order, tiles, chunks, spans, ctx.width, needs_dx
    )
    nothing = [None] * count
    bases = [None] * (EACH * count)
    return dx if needs_dx else None, bases, [None] * ctx.biases, more[:count], more[count:], nothing, nothing, *[None] * 5


lora_joined.register_fake(_fake_forward)
lora_joined_backward.register_fake(_fake_backward)
lora_joined.register_autograd(_gradient, setup_context=_setup)
