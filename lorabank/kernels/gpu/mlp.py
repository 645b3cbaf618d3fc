"""The middle of a gated MLP whose layers are adapted, in Triton: h = act(gate) · up, the adapters' changes of both included.

`gate_up` takes the frozen products g₀ and u₀ as they are, adds the changes in registers and makes h and, in the same pass, each
column's share of h·Aᵀ for the down layer, so no pass over gate, up or h is made for LoRA alone. `gate_up_backward` makes the
gradients of gate and up, and h again instead of keeping it. For few ranks. Shapes as in lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import _precision
from lorabank.kernels.tables import TILE, RouteTables

WIDEST = 16
"""Ranks up to which this pays."""
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _activation(g, GELU: tl.constexpr):
    """(act(g), its derivative), fp32."""
    if GELU:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        value = 0.5 * g * (1.0 + tanh)
        derivative = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * slope
    else:
        sigmoid = tl.sigmoid(g)
        value = g * sigmoid
        derivative = sigmoid * (1.0 + g * (1.0 - sigmoid))
    return value, derivative


@triton.jit
def _weight_tile(weight, ranks, slot, f, features, WIDTH: tl.constexpr):
    """The slot's rows of a capacity buffer, (W, columns), zero beyond its ranks."""
    r, place = tl.arange(0, WIDTH), tl.maximum(slot, 0)
    start = tl.load(ranks + place * 2).to(tl.int64)
    rank = tl.where(slot >= 0, tl.load(ranks + place * 2 + 1), 0)
    kept = (r < rank)[:, None] & (f < features)[None, :]
    return tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=kept, other=0.0)


@triton.jit
def _narrow_tile(narrow, ranks, slot, entry, inside, WIDTH: tl.constexpr):
    """Narrow rows of some entries, zero beyond the slot's ranks."""
    r = tl.arange(0, WIDTH)
    rank = tl.where(slot >= 0, tl.load(ranks + tl.maximum(slot, 0) * 2 + 1), 0)
    return tl.load(narrow + entry[:, None] * WIDTH + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _share(share, shares, ranks, slot, column, entries, entry, inside, WIDTH: tl.constexpr):
    """Store a column's share of a narrow product."""
    r = tl.arange(0, WIDTH)
    rank = tl.where(slot >= 0, tl.load(ranks + tl.maximum(slot, 0) * 2 + 1), 0)
    row = column.to(tl.int64) * entries + entry
    tl.store(shares + row[:, None] * WIDTH + r[None, :], share, mask=inside[:, None] & (r < rank)[None, :])


@triton.jit
def _gate_up(
    g0, u0, h, ng, nu, wg, wu, wd, shares, kg, ku, kd, order, tiles, features, entries,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        m, f = tl.arange(0, BLOCK_M), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry, inside = (first + m).to(tl.int64), m < count
        at, kept = rows[:, None] * features + f[None, :], inside[:, None] & (f < features)[None, :]
        small = _narrow_tile(ng, kg, slot, entry, inside, WIDTH)
        gate = tl.load(g0 + at, mask=kept, other=0.0).to(tl.float32)
        gate = tl.dot(small, _weight_tile(wg, kg, slot, f, features, WIDTH).to(small.dtype), gate, input_precision=PRECISION)
        small = _narrow_tile(nu, ku, slot, entry, inside, WIDTH)
        up = tl.load(u0 + at, mask=kept, other=0.0).to(tl.float32)
        up = tl.dot(small, _weight_tile(wu, ku, slot, f, features, WIDTH).to(small.dtype), up, input_precision=PRECISION)
        value, _ = _activation(gate, GELU)
        made = (value * up).to(h.dtype.element_ty)
        tl.store(h + at, made, mask=kept)
        if slot >= 0:
            w_tile = _weight_tile(wd, kd, slot, f, features, WIDTH).to(made.dtype)
            made = tl.where(kept, made, 0.0).to(made.dtype)
            share = tl.dot(made, tl.trans(w_tile), input_precision=PRECISION)
            _share(share, shares, kd, slot, column, entries, entry, inside, WIDTH)


@triton.jit
def _gate_up_backward(
    dh, g0, u0, h, dg, du, ng, nu, wg, wu, kg, ku, order, tiles, features,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        m, f = tl.arange(0, BLOCK_M), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry, inside = (first + m).to(tl.int64), m < count
        at, kept = rows[:, None] * features + f[None, :], inside[:, None] & (f < features)[None, :]
        small = _narrow_tile(ng, kg, slot, entry, inside, WIDTH)
        gate = tl.load(g0 + at, mask=kept, other=0.0).to(tl.float32)
        gate = tl.dot(small, _weight_tile(wg, kg, slot, f, features, WIDTH).to(small.dtype), gate, input_precision=PRECISION)
        small = _narrow_tile(nu, ku, slot, entry, inside, WIDTH)
        up = tl.load(u0 + at, mask=kept, other=0.0).to(tl.float32)
        up = tl.dot(small, _weight_tile(wu, ku, slot, f, features, WIDTH).to(small.dtype), up, input_precision=PRECISION)
        grad = tl.load(dh + at, mask=kept, other=0.0).to(tl.float32)
        value, slope = _activation(gate, GELU)
        tl.store(h + at, (value * up).to(h.dtype.element_ty), mask=kept)
        tl.store(du + at, (grad * value).to(du.dtype.element_ty), mask=kept)
        tl.store(dg + at, (grad * up * slope).to(dg.dtype.element_ty), mask=kept)


def gate_up(
    products: Sequence[Tensor],
    narrow: Sequence[Tensor],
    Bs: Sequence[Tensor],
    A_down: Tensor,
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scaling_down: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(h (N, F), h·Aᵀ of the down layer (N, W)) from [g₀, u₀] and their xAᵀ. `ranks`: of gate, up and down."""
    g0, u0 = products
    (entries, features), width = g0.shape, narrow[0].shape[1]
    h, block_f = torch.empty_like(g0), 128
    columns = -(-features // block_f)
    shares = torch.empty((columns, entries, width), dtype=torch.float32, device=g0.device)
    sums.launch(_gate_up)[(tables.tiles_S4.shape[0], columns)](
        g0, u0, h, *narrow, *Bs, A_down, shares, *ranks, tables.order_N, tables.tiles_S4, features, entries,
        WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, GELU=activation == "gelu_tanh", PRECISION=_precision(g0.dtype),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    xa_NW = torch.empty((entries, width), dtype=g0.dtype, device=g0.device)
    sums.gather([xa_NW], [shares], tables, [ranks[2]], [scaling_down])
    return h, xa_NW


def gate_up_backward(
    dh: Tensor,
    products: Sequence[Tensor],
    narrow: Sequence[Tensor],
    Bs: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, list[Tensor]]:
    """(h, the gradients of gate and up) from that of h, all (N, F)."""
    features, width, block_f = dh.shape[1], narrow[0].shape[1], 128
    h, dg, du = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    sums.launch(_gate_up_backward)[(tables.tiles_S4.shape[0], -(-features // block_f))](
        dh, *products, h, dg, du, *narrow, *Bs, *ranks[:2], tables.order_N, tables.tiles_S4, features,
        WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, GELU=activation == "gelu_tanh", PRECISION=_precision(dh.dtype),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return h, [dg, du]
