"""The middle of a gated MLP whose layers are adapted, in Triton: h = act(gate) · up, the adapters' changes of both included.

`gate_up` takes the frozen products g₀ and u₀ as they are, adds the changes in registers and makes h and, in the same pass, each
column's share of h·Aᵀ for the down layer. `gate_up_backward` makes the gradients of gate and up, makes h again instead of keeping
it, and in the same pass the gradients of both B and each column's share of dgate·Bᵀ and dup·Bᵀ. So gate, up and their gradients
are each written once and no pass over them is made for LoRA alone. For few ranks. Shapes as in lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu.lora import _fold_into, _gather_into, _launch, _precision
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
def _put(total, grad, parts, ranks, slot, chunk, only, f, features, WIDTH: tl.constexpr):
    """Store a chunk's part of a gradient: where it belongs for a slot's only chunk, else into parts."""
    r = tl.arange(0, WIDTH)
    start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
    kept = (r < rank)[:, None] & (f < features)[None, :]
    if only == 1:
        tl.store(grad + (start + r)[:, None] * features + f[None, :], total, mask=kept)
    else:
        row = chunk.to(tl.int64) * WIDTH + r
        tl.store(parts + row[:, None] * features + f[None, :], total, mask=kept)


@triton.jit
def _gate_up_backward(
    dh, g0, u0, h, dg, du, ng, nu, wg, wu, sg, su, pg, pu, bg, bu, kg, ku, order, chunks, features, entries,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if count > 0:
        f = column * BLOCK_F + tl.arange(0, BLOCK_F)
        w_gate = _weight_tile(wg, kg, slot, f, features, WIDTH).to(dh.dtype.element_ty)
        w_up = _weight_tile(wu, ku, slot, f, features, WIDTH).to(dh.dtype.element_ty)
        total_gate = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        total_up = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        for start in range(0, count, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside, entry = n < count, (first + n).to(tl.int64)
            rows = tl.load(order + first + n, mask=inside, other=0).to(tl.int64)
            at, kept = rows[:, None] * features + f[None, :], inside[:, None] & (f < features)[None, :]
            small_gate = _narrow_tile(ng, kg, slot, entry, inside, WIDTH)
            small_up = _narrow_tile(nu, ku, slot, entry, inside, WIDTH)
            gate = tl.load(g0 + at, mask=kept, other=0.0).to(tl.float32)
            up = tl.load(u0 + at, mask=kept, other=0.0).to(tl.float32)
            grad = tl.load(dh + at, mask=kept, other=0.0).to(tl.float32)
            gate = tl.dot(small_gate, w_gate, gate, input_precision=PRECISION)
            up = tl.dot(small_up, w_up, up, input_precision=PRECISION)
            value, slope = _activation(gate, GELU)
            tl.store(h + at, (value * up).to(h.dtype.element_ty), mask=kept)
            d_up = (grad * value).to(du.dtype.element_ty)
            d_gate = (grad * up * slope).to(dg.dtype.element_ty)
            tl.store(du + at, d_up, mask=kept)
            tl.store(dg + at, d_gate, mask=kept)
            if slot >= 0:
                total_gate = tl.dot(tl.trans(small_gate), d_gate, total_gate, input_precision=PRECISION)
                total_up = tl.dot(tl.trans(small_up), d_up, total_up, input_precision=PRECISION)
                share = tl.dot(d_gate, tl.trans(w_gate), input_precision=PRECISION)
                _share(share, sg, kg, slot, column, entries, entry, inside, WIDTH)
                share = tl.dot(d_up, tl.trans(w_up), input_precision=PRECISION)
                _share(share, su, ku, slot, column, entries, entry, inside, WIDTH)
        if slot >= 0:
            _put(total_gate, bg, pg, kg, slot, chunk, only, f, features, WIDTH)
            _put(total_up, bu, pu, ku, slot, chunk, only, f, features, WIDTH)


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
    _launch(_gate_up)[(tables.tiles_S4.shape[0], columns)](
        g0, u0, h, *narrow, *Bs, A_down, shares, *ranks, tables.order_N, tables.tiles_S4, features, entries,
        WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, GELU=activation == "gelu_tanh", PRECISION=_precision(g0.dtype),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    xa_NW = torch.empty((entries, width), dtype=g0.dtype, device=g0.device)
    _gather_into(xa_NW, shares, tables, ranks[2], scaling_down)
    return h, xa_NW


@dataclass(frozen=True)
class GateUpGradients:
    """What `gate_up_backward` makes: of gate, then of up."""

    h_NF: Tensor
    dys: list[Tensor]
    dBs: list[Tensor]
    narrow: list[Tensor]
    """dgate·Bᵀ and dup·Bᵀ, scaled, (N, W)."""


def gate_up_backward(
    dh: Tensor,
    products: Sequence[Tensor],
    narrow: Sequence[Tensor],
    Bs: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    activation: str,
) -> GateUpGradients:
    """The gradients of gate and up from that of h."""
    (entries, features), width, device = dh.shape, narrow[0].shape[1], dh.device
    block_f = 64
    columns, chunks = -(-features // block_f), tables.chunks_C4.shape[0]
    h, dg, du = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    shares = [torch.empty((columns, entries, width), dtype=torch.float32, device=device) for _ in Bs]
    parts = [torch.empty((chunks, width, features), dtype=torch.float32, device=device) for _ in Bs]
    dBs = [torch.empty_like(B) for B in Bs]
    _launch(_gate_up_backward)[(chunks, columns)](
        dh, *products, h, dg, du, *narrow, *Bs, *shares, *parts, *dBs, *ranks[:2], tables.order_N, tables.chunks_C4,
        features, entries,
        WIDTH=width, BLOCK_N=16, BLOCK_F=block_f, GELU=activation == "gelu_tanh", PRECISION=_precision(dh.dtype),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    made = [torch.empty((entries, width), dtype=dh.dtype, device=device) for _ in Bs]
    for i, dB in enumerate(dBs):
        _fold_into(dB, parts[i], tables, ranks[i])
        _gather_into(made[i], shares[i], tables, ranks[i], scalings[i])
    return GateUpGradients(h, [dg, du], dBs, made)
