"""Kernels of a gated MLP whose frozen weights carry A or B at their border, so that LoRA needs no pass over the wide tensors.

With B as further columns of W, [W, Bᵀ], the product of [x, s·xAᵀ] with it is y complete, and dy·[W, Bᵀ] gives dx and dy·B at
once; with A as further rows, [W; A], h·[W; A]ᵀ gives y and h·Aᵀ, and [dy, s·dyB]·[W; A] is dh complete. gate and up have B at
their border, down has A, so only x, y and their gradients are touched beside the products. `write` fills the borders, `widen`
makes [x, s·xAᵀ] in one pass over x, `finish` adds what is left to a narrow side, `activate` is h = act(gate)·up, and `middle`
its backward with the gradients of gate's and up's B and down's A in the same pass.

A border's column (or row) j belongs to the slot whose ranks hold row j of the capacity buffers; others are zero, and so is x's
border there. A slot's numbers that aren't finite would reach every row through 0 · NaN: the border has zeros for them and
`poison` NaN for their slot, which `widen` and `finish` add to that slot's own rows. Other shapes as in lora.py. The plain twin
is the three layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import SHARED_BYTES, _precision
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.tables import TILE, RouteTables

STEP = 64
"""Borders are multiples of so many columns: rows stay aligned to 128 bytes."""
WIDEST = 128
"""Ranks of all slots together up to which a border pays: each costs a product a further column."""
WIDEST_RANK = 16
"""Of one slot: more don't fit the registers of `middle`."""
MOST_SLOTS = 64
"""Slot numbers that `_write` compares every column with."""
WRITTEN = 64
"""Features that one program writes a border for."""
ACTIVATIONS = ("silu", "gelu_tanh")


def border_width(rows: int) -> int:
    """Columns of a border for so many rows of capacity buffers, up to the last in use; 0 where none pays."""
    width = -(-rows // STEP) * STEP
    return width if width <= WIDEST else 0


@triton.jit
def _write(
    w0, w1, w2, t0, t1, t2, k0, k1, k2, poison, slots, features, blocks, length0, length1, length2,
    PAD: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A layer's border at some features, and for each slot whether it is all finite there. `length`: of target's rows."""
    block, layer = tl.program_id(0), tl.program_id(1)
    weight, target, ranks, length = w0, t0, k0, length0
    if layer == 1:
        weight, target, ranks, length = w1, t1, k1, length1
    if layer == 2:
        weight, target, ranks, length = w2, t2, k2, length2
    j, s, f = tl.arange(0, PAD), tl.arange(0, SLOTS), block * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(ranks + s * 2, mask=s < slots, other=0)
    rank = tl.load(ranks + s * 2 + 1, mask=s < slots, other=0)
    mine = ((start[None, :] <= j[:, None]) & (j[:, None] < (start + rank)[None, :])).to(tl.int32)
    taken, inside = tl.sum(mine, 1) > 0, (f < features)[None, :]
    value = tl.load(weight + j.to(tl.int64)[:, None] * features + f[None, :], mask=taken[:, None] & inside, other=0.0)
    rounded = value.to(target.dtype.element_ty)
    back = rounded.to(tl.float32)
    finite = (back - back) == 0.0  # as it stands in the border: fp16 ends at 65,504
    spoiled = tl.sum(mine * tl.max(1 - finite.to(tl.int32), 1)[:, None], 0)
    tl.store(poison + (layer * slots + s) * blocks + block, tl.where(spoiled > 0, float("nan"), 0.0), mask=s < slots)
    clean = tl.where(finite, rounded, 0.0).to(target.dtype.element_ty)
    if layer < 2:  # further columns; of down, rows
        tl.store(target + f.to(tl.int64)[:, None] * length + j[None, :], tl.trans(clean), mask=(f < features)[:, None])
    else:
        tl.store(target + j.to(tl.int64)[:, None] * length + f[None, :], clean, mask=inside)


@triton.jit
def _poison(poison, slot, blocks, BLOCKS: tl.constexpr):
    """0, or NaN where a number of the slot in that border isn't finite."""
    b = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(poison + slot * blocks + b, mask=b < blocks, other=0.0), 0)


@triton.jit
def _border(
    total, wide, width, at, narrow, ranks, scaling, poison, blocks, slot, entry, rows, m, r, count,
    PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scale a layer's product, store it in narrow and in its columns of the wide border; zeros in the others."""
    place = tl.maximum(slot, 0)
    start = tl.load(ranks + place * 2)
    rank = tl.where(slot >= 0, tl.load(ranks + place * 2 + 1), 0)
    scaled = total * tl.load(scaling + place) + tl.where(slot >= 0, _poison(poison, place, blocks, BLOCKS), 0.0)
    made = scaled.to(wide.dtype.element_ty)
    kept = (m < count)[:, None] & (r < rank)[None, :]
    tl.store(narrow + entry[:, None] * WIDTH + r[None, :], made, mask=kept)
    row = wide + rows[:, None] * width + at
    tl.store(row + (start + r)[None, :], made, mask=kept)
    j = tl.arange(0, PAD)
    others = (m < count)[:, None] & ((j < start) | (j >= start + rank))[None, :]
    tl.store(row + j[None, :], tl.zeros((BLOCK_M, PAD), dtype=wide.dtype.element_ty), mask=others)


@triton.jit
def _widen(
    x, wide, w0, w1, n0, n1, k0, k1, s0, s1, p0, p1, order, tiles, features, width, blocks,
    C: tl.constexpr, PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[x, s·x·w0ᵀ], or for two layers [s·x·w0ᵀ, x, s·x·w1ᵀ]: x read once and written once."""
    tile = tl.program_id(0)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        place = tl.maximum(slot, 0)
        m, r = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = (first + m).to(tl.int64)
        start0 = tl.load(k0 + place * 2).to(tl.int64)
        rank0 = tl.where(slot >= 0, tl.load(k0 + place * 2 + 1), 0)
        start1 = tl.load(k1 + place * 2).to(tl.int64)
        rank1 = tl.where(slot >= 0, tl.load(k1 + place * 2 + 1), 0)
        left = (C - 1) * PAD
        t0 = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        t1 = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        for at in range(0, features, BLOCK_F):
            f = at + tl.arange(0, BLOCK_F)
            kept = (m < count)[:, None] & (f < features)[None, :]
            x_tile = tl.load(x + rows[:, None] * features + f[None, :], mask=kept, other=0.0)
            tl.store(wide + rows[:, None] * width + left + f[None, :], x_tile, mask=kept)
            a_tile = tl.load(
                w0 + (start0 + r)[:, None] * features + f[None, :], mask=(r < rank0)[:, None] & (f < features)[None, :], other=0.0
            ).to(x_tile.dtype)
            t0 = tl.dot(x_tile, tl.trans(a_tile), t0, input_precision=PRECISION)
            if C > 1:
                a_tile = tl.load(
                    w1 + (start1 + r)[:, None] * features + f[None, :],
                    mask=(r < rank1)[:, None] & (f < features)[None, :],
                    other=0.0,
                ).to(x_tile.dtype)
                t1 = tl.dot(x_tile, tl.trans(a_tile), t1, input_precision=PRECISION)
        _border(
            t0, wide, width, (2 - C) * features, n0, k0, s0, p0, blocks, slot, entry, rows, m, r, count,
            PAD, WIDTH, BLOCK_M, BLOCKS,
        )  # fmt: skip
        if C > 1:
            _border(
                t1, wide, width, PAD + features, n1, k1, s1, p1, blocks, slot, entry, rows, m, r, count,
                PAD, WIDTH, BLOCK_M, BLOCKS,
            )  # fmt: skip


@triton.jit
def _add_narrow(
    total, wide, width, at, narrow, weight, ranks, scaling, poison, blocks, slot, entry, rows, m, r, f, count, features, column,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a layer's narrow · weight, its narrow being what stands in the border; the first column's program keeps that."""
    start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
    kept = (m < count)[:, None] & (r < rank)[None, :]
    found = tl.load(wide + rows[:, None] * width + at + start + r[None, :], mask=kept, other=0.0).to(tl.float32)
    small = (found * tl.load(scaling + slot) + _poison(poison, slot, blocks, BLOCKS)).to(narrow.dtype.element_ty)
    small = tl.where(kept, small, 0.0).to(narrow.dtype.element_ty)
    if column == 0:
        tl.store(narrow + entry[:, None] * WIDTH + r[None, :], small, mask=kept)
    inside = (r < rank)[:, None] & (f < features)[None, :]
    w_tile = tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=inside, other=0.0).to(small.dtype)
    return tl.dot(small, w_tile, total, input_precision=PRECISION)


@triton.jit
def _finish(
    wide, out, n0, n1, w0, w1, k0, k1, s0, s1, p0, p1, order, tiles, features, width, blocks,
    C: tl.constexpr, PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = the middle of wide + Σ over its borders of s·border·weight; the borders lie as `_widen` lays them."""
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        m, r, f = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = (first + m).to(tl.int64)
        left = (C - 1) * PAD
        kept = (m < count)[:, None] & (f < features)[None, :]
        total = tl.load(wide + rows[:, None] * width + left + f[None, :], mask=kept, other=0.0).to(tl.float32)
        if slot >= 0:
            total = _add_narrow(
                total, wide, width, (2 - C) * features, n0, w0, k0, s0, p0, blocks, slot, entry, rows, m, r, f, count, features,
                column, WIDTH, BLOCKS, PRECISION,
            )  # fmt: skip
            if C > 1:
                total = _add_narrow(
                    total, wide, width, PAD + features, n1, w1, k1, s1, p1, blocks, slot, entry, rows, m, r, f, count, features,
                    column, WIDTH, BLOCKS, PRECISION,
                )  # fmt: skip
        tl.store(out + rows[:, None] * features + f[None, :], total.to(out.dtype.element_ty), mask=kept)


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
def _activate(gate, up, h, numbers, BLOCK: tl.constexpr, GELU: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(g, GELU)  # pyright: ignore[reportGeneralTypeIssues]
    made = value.to(h.dtype.element_ty).to(tl.float32) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, made.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _middle(
    dh, gate, up, dg, du, n0, n1, n2, g0, g1, g2, q0, q1, q2, k0, k1, k2, order, chunks, features,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up from that of h, and narrowᵀ · dgate, narrowᵀ · dup, narrowᵀ · h over a chunk's tokens."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if count > 0:
        place = tl.maximum(slot, 0) * 2
        rank0 = tl.where(slot >= 0, tl.load(k0 + place + 1), 0)
        rank1 = tl.where(slot >= 0, tl.load(k1 + place + 1), 0)
        rank2 = tl.where(slot >= 0, tl.load(k2 + place + 1), 0)
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        t0 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t1 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t2 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, last = tl.load(order + first), tl.load(order + first + count - 1)
        for at in range(0, count, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            inside = n < count
            if last - base == count - 1:  # entries of a slot are in the order of their tokens: these are all there are between
                rows = (base + n).to(tl.int64)
            else:
                rows = tl.load(order + first + n, mask=inside, other=0).to(tl.int64)
            entry = (first + n).to(tl.int64)[:, None] * WIDTH + r[None, :]
            kept, place_NF = inside[:, None] & (f < features)[None, :], rows[:, None] * features + f[None, :]
            d = tl.load(dh + place_NF, mask=kept, other=0.0).to(tl.float32)
            g = tl.load(gate + place_NF, mask=kept, other=0.0).to(tl.float32)
            u = tl.load(up + place_NF, mask=kept, other=0.0).to(tl.float32)
            value, slope = _activation(g, GELU)  # pyright: ignore[reportGeneralTypeIssues]
            made_g = (d * u * slope).to(dg.dtype.element_ty)
            made_u = (d * value).to(dg.dtype.element_ty)
            made_h = (value * u).to(dg.dtype.element_ty)
            tl.store(dg + place_NF, made_g, mask=kept)
            tl.store(du + place_NF, made_u, mask=kept)
            small = tl.load(n0 + entry, mask=inside[:, None] & (r < rank0)[None, :], other=0.0)
            t0 = tl.dot(tl.trans(small), made_g, t0, input_precision=PRECISION)
            small = tl.load(n1 + entry, mask=inside[:, None] & (r < rank1)[None, :], other=0.0)
            t1 = tl.dot(tl.trans(small), made_u, t1, input_precision=PRECISION)
            small = tl.load(n2 + entry, mask=inside[:, None] & (r < rank2)[None, :], other=0.0)
            t2 = tl.dot(tl.trans(small), made_h, t2, input_precision=PRECISION)
        if slot >= 0:
            _put(t0, g0, q0, k0, slot, chunk, only, r, f, features, WIDTH)
            _put(t1, g1, q1, k1, slot, chunk, only, r, f, features, WIDTH)
            _put(t2, g2, q2, k2, slot, chunk, only, r, f, features, WIDTH)


def poison_like(ranks_P2: Tensor, features: int) -> Tensor:
    """Room for what `write` finds out about each slot: fp32 (3, P, blocks), all finite."""
    return torch.zeros((3, ranks_P2.shape[0], -(-features // WRITTEN)), device=ranks_P2.device)


def write(borders: Sequence[Tensor], weights: Sequence[Tensor], ranks: Sequence[Tensor], poison: Tensor) -> None:
    """Fill three layers' borders from capacity buffers (ΣR, F); `poison`: of `poison_like`.

    `borders`: further columns (F, pad) of gate and up, further rows (pad, F) of down: parts of their wide weights.
    """
    slots, features, blocks = ranks[0].shape[0], weights[0].shape[1], poison.shape[2]
    start: Any = _write  # never inside compiled code, which would see to the device: Triton starts kernels on the current GPU
    with torch.cuda.device_of(poison):
        start[(blocks, 3)](
            *weights, *borders, *ranks, poison, slots, features, blocks, *(border.stride(0) for border in borders),
            PAD=borders[2].shape[0], SLOTS=triton.next_power_of_2(slots), BLOCK=WRITTEN, num_warps=4,
        )  # fmt: skip


def widen(
    x_NF: Tensor,
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    poison: Sequence[Tensor],
    pad: int,
    width: int,
) -> tuple[Tensor, list[Tensor]]:
    """(x with one border behind it, or for two layers one before and one behind it, and each layer's narrow (N, W))."""
    (entries, features), count, item = x_NF.shape, len(weights), x_NF.element_size()
    wide = torch.empty((entries, features + count * pad), dtype=x_NF.dtype, device=x_NF.device)
    narrow = [torch.empty((entries, width), dtype=x_NF.dtype, device=x_NF.device) for _ in weights]
    block_f = 128 if item == 2 else 64
    blocks = poison[0].shape[1]
    sums.launch(_widen)[(tables.tiles_S4.shape[0],)](
        x_NF, wide, *_two(weights), *_two(narrow), *_two(ranks), *_two(scalings), *_two(poison), tables.order_N, tables.tiles_S4,
        features, wide.shape[1], blocks,
        C=count, PAD=pad, WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, BLOCKS=triton.next_power_of_2(blocks),
        PRECISION=_precision(x_NF.dtype), num_warps=4,
        num_stages=max(1, min(4, SHARED_BYTES // (block_f * (TILE * item + count * width * 4)))),
    )  # fmt: skip
    return wide, narrow


def finish(
    wide: Tensor,
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    poison: Sequence[Tensor],
    pad: int,
    width: int,
) -> tuple[Tensor, list[Tensor]]:
    """(the middle of `wide` with its borders' products by weights (ΣR, F) added, (N, F), and each layer's narrow (N, W))."""
    entries, features, count = wide.shape[0], weights[0].shape[1], len(weights)
    out = torch.empty((entries, features), dtype=wide.dtype, device=wide.device)
    narrow = [torch.empty((entries, width), dtype=wide.dtype, device=wide.device) for _ in weights]
    block_f = 256 if wide.element_size() == 2 else 128
    blocks = poison[0].shape[1]
    sums.launch(_finish)[(tables.tiles_S4.shape[0], -(-features // block_f))](
        wide, out, *_two(narrow), *_two(weights), *_two(ranks), *_two(scalings), *_two(poison), tables.order_N, tables.tiles_S4,
        features, wide.shape[1], blocks,
        C=count, PAD=pad, WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, BLOCKS=triton.next_power_of_2(blocks),
        PRECISION=_precision(wide.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, narrow


def activate(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """act(gate) · up, (N, F)."""
    h = torch.empty_like(gate_NF)
    sums.launch(_activate)[(-(-h.numel() // 2048),)](
        gate_NF, up_NF, h, h.numel(), BLOCK=2048, GELU=activation == "gelu_tanh", num_warps=8
    )
    return h


def middle(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    narrow: Sequence[Tensor],
    likes: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(gradients of gate and up (N, F), and [dB of gate, dB of up, dA of down], fp32 like `likes` (ΣR, F)).

    `narrow`: s·xAᵀ of gate and up and s·dy·B of down.
    """
    features, width, chunks, item = dh.shape[1], narrow[0].shape[1], tables.chunks_C4.shape[0], dh.element_size()
    dg, du = torch.empty_like(dh), torch.empty_like(dh)
    grads = [torch.empty_like(like) for like in likes]
    parts = [torch.empty((chunks, width, features), dtype=torch.float32, device=dh.device) for _ in likes]
    block_n, block_f = (64, 32) if item == 2 else (32, 32)
    sums.launch(_middle)[(chunks, -(-features // block_f))](
        dh, gate, up, dg, du, *narrow, *grads, *parts, *ranks, tables.order_N, tables.chunks_C4, features,
        WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, GELU=activation == "gelu_tanh", PRECISION=_precision(dh.dtype),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    sums.fold(grads, parts, tables, ranks)
    return dg, du, grads


def _two(values: Sequence[Tensor]) -> list[Tensor]:
    """A kernel has places for two layers: an only one takes both."""
    return [values[0], values[-1]]
