"""LoRA's products of layers that read the same x (queries, keys and values; gate and up), made together in Triton.

What touches x or dx is done once for all of them: `shrink` reads x once, `change` writes dx once, `outer` reads x once. What
touches one layer's y or dy stays in lora.py. The plain twin is one layer after the other. Shapes as in lora.py, and C layers, 2
to 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.dropout import Drops, _bar, _column_keys, _kept, _row_keys, pointers
from lorabank.kernels.gpu.lora import PROGRAMS, SHARED_BYTES, _precision
from lorabank.kernels.gpu.runs import _entries, _run, _straight, grouped
from lorabank.kernels.gpu.sums import MOST as MOST
from lorabank.kernels.gpu.sums import four
from lorabank.kernels.tables import TILE, RouteTables

WIDEST = 64
"""Ranks up to which they do."""
WIDE_PROGRAMS = 512
"""As lora.py's `PROGRAMS`, for `shrink` of many ranks; where tiles go together some have nothing to do."""


@triton.jit
def _rows_of(weight, ranks, slot, r, f, end, features, dtype):
    """weight[slot's rows, f], (ranks, features)."""
    start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
    kept = (r < rank)[:, None] & (f < end)[None, :]
    return tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=kept, other=0.0).to(dtype)


@triton.jit
def _add_narrow(total, x_tile, weight, ranks, slot, r, f, end, features, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """total + x_tile · weight[slot's rows, f]ᵀ, with TURNED its transpose."""
    w_tile = _rows_of(weight, ranks, slot, r, f, end, features, x_tile.dtype)
    if TURNED:  # compilers see both sides of an early return
        total = tl.dot(w_tile, tl.trans(x_tile), total, input_precision=PRECISION)
    else:
        total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision=PRECISION)
    return total


@triton.jit
def _keep(
    total, narrow, parts, ranks, scaling, slot, entry, m, r, count, split, entries,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Store one layer's product: scaled into narrow, or as a split's share into parts."""
    if TURNED:
        total = tl.trans(total)
    kept = (m < count)[:, None] & (r < tl.load(ranks + slot * 2 + 1))[None, :]
    if WHOLE:
        scaled = (total * tl.load(scaling + slot)).to(narrow.dtype.element_ty)
        tl.store(narrow + entry[:, None] * WIDTH + r[None, :], scaled, mask=kept)
    else:
        row = split.to(tl.int64) * entries + entry
        tl.store(parts + row[:, None] * WIDTH + r[None, :], total, mask=kept)


@triton.jit
def _shrink(
    x, w0, w1, w2, w3, n0, n1, n2, n3, p0, p1, p2, p3, k0, k1, k2, k3, s0, s1, s2, s3, d0, d1, d2, d3,
    steps, draws, order, tiles, features, entries, share, last,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, TURNED: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x · weightᵀ for C weights, x read once. TURNED as in lora.py."""
    tile, split = tl.program_id(0), tl.program_id(1)
    slot, count = _run(tiles, tile, last, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.load(tiles + tile * 4 + 1)
    if (count > 0) & (slot >= 0):
        m, r = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        h0, b0 = _row_keys(d0, steps, draws, slot, first + m, m < count, DROP), _bar(d0, slot, DROP)
        h1, b1 = _row_keys(d1, steps, draws, slot, first + m, m < count, DROP), _bar(d1, slot, DROP)
        if C > 2:
            h2, b2 = _row_keys(d2, steps, draws, slot, first + m, m < count, DROP), _bar(d2, slot, DROP)
        if C > 3:
            h3, b3 = _row_keys(d3, steps, draws, slot, first + m, m < count, DROP), _bar(d3, slot, DROP)
        begin = split * share
        end = tl.minimum(features, begin + share)
        t0 = tl.zeros((WIDTH, BLOCK_M) if TURNED else (BLOCK_M, WIDTH), dtype=tl.float32)
        t1 = tl.zeros((WIDTH, BLOCK_M) if TURNED else (BLOCK_M, WIDTH), dtype=tl.float32)
        t2 = tl.zeros((WIDTH, BLOCK_M) if TURNED else (BLOCK_M, WIDTH), dtype=tl.float32)
        t3 = tl.zeros((WIDTH, BLOCK_M) if TURNED else (BLOCK_M, WIDTH), dtype=tl.float32)
        for at in range(begin, end, BLOCK_F):
            f = at + tl.arange(0, BLOCK_F)
            x_tile = tl.load(x + rows[:, None] * features + f[None, :], mask=(m < count)[:, None] & (f < end)[None, :], other=0.0)
            columns = _column_keys(f, DROP)
            x0 = _kept(x_tile, 0.0, h0, columns, b0, DROP)
            t0 = _add_narrow(t0, x0, w0, k0, slot, r, f, end, features, TURNED, PRECISION)
            x1 = _kept(x_tile, 0.0, h1, columns, b1, DROP)
            t1 = _add_narrow(t1, x1, w1, k1, slot, r, f, end, features, TURNED, PRECISION)
            if C > 2:
                x2 = _kept(x_tile, 0.0, h2, columns, b2, DROP)
                t2 = _add_narrow(t2, x2, w2, k2, slot, r, f, end, features, TURNED, PRECISION)
            if C > 3:
                x3 = _kept(x_tile, 0.0, h3, columns, b3, DROP)
                t3 = _add_narrow(t3, x3, w3, k3, slot, r, f, end, features, TURNED, PRECISION)
        entry = (first + m).to(tl.int64)
        _keep(t0, n0, p0, k0, s0, slot, entry, m, r, count, split, entries, WIDTH, WHOLE, TURNED)
        _keep(t1, n1, p1, k1, s1, slot, entry, m, r, count, split, entries, WIDTH, WHOLE, TURNED)
        if C > 2:
            _keep(t2, n2, p2, k2, s2, slot, entry, m, r, count, split, entries, WIDTH, WHOLE, TURNED)
        if C > 3:
            _keep(t3, n3, p3, k3, s3, slot, entry, m, r, count, split, entries, WIDTH, WHOLE, TURNED)


@triton.jit
def _add_layer(
    total, narrow, weight, ranks, odds, steps, draws, slot, entry, m, r, f, count, features,
    WIDTH: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + one layer's narrow · weight, where dropout keeps it."""
    kept = (m < count)[:, None] & (r < tl.load(ranks + slot * 2 + 1))[None, :]
    small = tl.load(narrow + entry[:, None] * WIDTH + r[None, :], mask=kept, other=0.0)
    w_tile = _rows_of(weight, ranks, slot, r, f, features, features, small.dtype)
    more = tl.dot(small, w_tile, total, input_precision=PRECISION)
    key_m = _row_keys(odds, steps, draws, slot, entry, m < count, DROP)
    return _kept(more, total, key_m, _column_keys(f, DROP), _bar(odds, slot, DROP), DROP)


@triton.jit
def _change(
    out, a1, a2, a3, n0, n1, n2, n3, w0, w1, w2, w3, k0, k1, k2, k3, d0, d1, d2, d3, steps, draws, order, tiles, features, last,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
    ADD: tl.constexpr, TERMS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over C layers of narrow · weight: written for every token, or with ADD added for those with a slot.

    With TERMS so many tensors like out are added besides, for every token.
    """
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, count = _run(tiles, tile, last, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.load(tiles + tile * 4 + 1)
    if (count > 0) & ((slot >= 0) | (not ADD) | (TERMS > 0)):
        m, r, f = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = (first + m).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_F), dtype=tl.float32)
        if slot >= 0:
            total = _add_layer(total, n0, w0, k0, d0, steps, draws, slot, entry, m, r, f, count, features, WIDTH, DROP, PRECISION)
            total = _add_layer(total, n1, w1, k1, d1, steps, draws, slot, entry, m, r, f, count, features, WIDTH, DROP, PRECISION)
            if C > 2:
                total = _add_layer(
                    total, n2, w2, k2, d2, steps, draws, slot, entry, m, r, f, count, features, WIDTH, DROP, PRECISION
                )
            if C > 3:
                total = _add_layer(
                    total, n3, w3, k3, d3, steps, draws, slot, entry, m, r, f, count, features, WIDTH, DROP, PRECISION
                )
        inside = (m < count)[:, None] & (f < features)[None, :]
        at = rows[:, None] * features + f[None, :]
        if ADD:
            total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        if TERMS > 0:
            total += tl.load(a1 + at, mask=inside, other=0.0).to(tl.float32)
        if TERMS > 1:
            total += tl.load(a2 + at, mask=inside, other=0.0).to(tl.float32)
        if TERMS > 2:
            total += tl.load(a3 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _put(total, grad, parts, ranks, slot, chunk, only, r, f, features, WIDTH: tl.constexpr):
    """Store one layer's part of the gradient: where it belongs for a slot's only chunk, else into parts."""
    start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
    inside = (r < rank)[:, None] & (f < features)[None, :]
    if only == 1:
        tl.store(grad + (start + r)[:, None] * features + f[None, :], total, mask=inside)
    else:
        row = chunk.to(tl.int64) * WIDTH + r
        tl.store(parts + row[:, None] * features + f[None, :], total, mask=inside)


@triton.jit
def _add_outer(
    total, narrow, tile, odds, steps, draws, columns, slot, entry, n, r, count,
    WIDTH: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + one layer's narrowᵀ · tile, of which dropout keeps a part."""
    small = _entries(narrow, entry, n < count, r, WIDTH)  # rows of the sum beyond the ranks mean nothing
    key_n = _row_keys(odds, steps, draws, slot, entry, n < count, DROP)
    tile = _kept(tile, 0.0, key_n, columns, _bar(odds, slot, DROP), DROP)
    return tl.dot(tl.trans(small), tile, total, input_precision=PRECISION)


@triton.jit
def _outer_step(
    rows, n, n0, n1, n2, n3, wide, t0, t1, t2, t3, d0, d1, d2, d3, steps, draws, columns, slot, first, count, r, f, features,
    C: tl.constexpr, WIDTH: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_outer` for some tokens: the sums with them."""
    entry = (first + n).to(tl.int64)
    tile = tl.load(wide + rows[:, None] * features + f[None, :], mask=(n < count)[:, None] & (f < features)[None, :], other=0.0)
    t0 = _add_outer(t0, n0, tile, d0, steps, draws, columns, slot, entry, n, r, count, WIDTH, DROP, PRECISION)
    t1 = _add_outer(t1, n1, tile, d1, steps, draws, columns, slot, entry, n, r, count, WIDTH, DROP, PRECISION)
    if C > 2:
        t2 = _add_outer(t2, n2, tile, d2, steps, draws, columns, slot, entry, n, r, count, WIDTH, DROP, PRECISION)
    if C > 3:
        t3 = _add_outer(t3, n3, tile, d3, steps, draws, columns, slot, entry, n, r, count, WIDTH, DROP, PRECISION)
    return t0, t1, t2, t3


@triton.jit
def _outer(
    n0, n1, n2, n3, wide, p0, p1, p2, p3, g0, g1, g2, g3, k0, k1, k2, k3, d0, d1, d2, d3, steps, draws, order, chunks, features,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, DROP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """narrowᵀ · wide for C layers over a chunk's tokens, wide read once."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if (count > 0) & (slot >= 0):
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        columns = _column_keys(f, DROP)
        t0 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t1 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t2 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t3 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            t0, t1, t2, t3 = _outer_step(  # pyright: ignore[reportGeneralTypeIssues]
                (base + n).to(tl.int64), n, n0, n1, n2, n3, wide, t0, t1, t2, t3, d0, d1, d2, d3, steps, draws, columns, slot,
                first, count, r, f, features, C, WIDTH, DROP, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            t0, t1, t2, t3 = _outer_step(  # pyright: ignore[reportGeneralTypeIssues]
                rows, n, n0, n1, n2, n3, wide, t0, t1, t2, t3, d0, d1, d2, d3, steps, draws, columns, slot, first, count, r, f,
                features, C, WIDTH, DROP, PRECISION,
            )  # fmt: skip
        _put(t0, g0, p0, k0, slot, chunk, only, r, f, features, WIDTH)
        _put(t1, g1, p1, k1, slot, chunk, only, r, f, features, WIDTH)
        if C > 2:
            _put(t2, g2, p2, k2, slot, chunk, only, r, f, features, WIDTH)
        if C > 3:
            _put(t3, g3, p3, k3, slot, chunk, only, r, f, features, WIDTH)


def _stages(bytes_each: int) -> int:
    return max(1, min(4, SHARED_BYTES // bytes_each))


def shrink(
    x_NF: Tensor,
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    width: int,
    drops: Drops = (),
) -> list[Tensor]:
    """lora.shrink of x with each of the weights. Each layer has a mask of its own."""
    entries, features = x_NF.shape
    tiles, count, item = tables.tiles_S4.shape[0], len(weights), x_NF.element_size()
    group = grouped(width, item)
    block_f = 128 if width <= 16 and item == 2 else 64
    splits = max(1, min(features // 512, (WIDE_PROGRAMS if group > 1 else PROGRAMS) // tiles))
    share = -(-features // (splits * block_f)) * block_f
    block_f = 64 if drops else block_f  # a mask a layer takes registers; sums stay in the same order
    narrow = [torch.empty((entries, width), dtype=x_NF.dtype, device=x_NF.device) for _ in weights]
    parts = narrow
    if splits > 1:
        parts = [torch.empty((splits, entries, width), dtype=torch.float32, device=x_NF.device) for _ in weights]
    sums.launch(_shrink)[(tiles, splits)](
        x_NF, *four(weights), *four(narrow), *four(parts), *four(ranks), *four(scalings),
        *pointers(drops, MOST, ranks[0]), tables.order_N, tables.tiles_S4, features, entries, share, tiles,
        C=count, WIDTH=width, BLOCK_M=group * TILE, BLOCK_F=block_f, WHOLE=splits == 1, GROUP=group, TURNED=group > 1,
        DROP=bool(drops), PRECISION=_precision(x_NF.dtype), num_warps=4,
        num_stages=2 if group > 1 else _stages(block_f * (TILE * item + count * width * 4)),
    )  # fmt: skip
    if splits > 1:
        sums.gather(narrow, parts, tables, ranks, scalings)
    return narrow


def change(
    narrow: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    out_NF: Tensor | None = None,
    drops: Drops = (),
    more: Sequence[Tensor] = (),
) -> Tensor:
    """Σ of lora.change over the layers, (N, F); added in place to `out_NF`, as lora.expand_ does, where it is given.

    `more`: up to three tensors like `out_NF` that are added to it in the same pass, rounded once.
    """
    (entries, width), features, device = narrow[0].shape, weights[0].shape[1], narrow[0].device
    out = torch.empty((entries, features), dtype=narrow[0].dtype, device=device) if out_NF is None else out_NF
    block_f = 256 if width <= 16 and out.element_size() == 2 and not drops else 128
    tiles, group = tables.tiles_S4.shape[0], grouped(width, out.element_size())
    sums.launch(_change)[(tiles, -(-features // block_f))](
        out, *four([*more, narrow[0]])[: MOST - 1], *four(narrow), *four(weights), *four(ranks), *pointers(drops, MOST, ranks[0]),
        tables.order_N, tables.tiles_S4, features, tiles,
        C=len(narrow), WIDTH=width, BLOCK_M=group * TILE, BLOCK_F=block_f, GROUP=group, ADD=out_NF is not None, TERMS=len(more),
        DROP=bool(drops), PRECISION=_precision(out.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def outer(
    narrow: Sequence[Tensor],
    wide_NF: Tensor,
    likes: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    drops: Drops = (),
    later: sums.Later | None = None,
) -> list[Tensor]:
    """lora.outer of each layer's narrow with the same wide."""
    width, features, chunks = narrow[0].shape[1], wide_NF.shape[1], tables.chunks_C4.shape[0]
    grads = [torch.empty_like(like) for like in likes]
    parts = [torch.empty((tables.summed, width, features), dtype=torch.float32, device=wide_NF.device) for _ in likes]
    block_n, item = 64, wide_NF.element_size()
    block_f = (64 if drops or width > 16 else 128) if item == 2 else 32  # fp32 takes registers
    sums.launch(_outer)[(chunks, -(-features // block_f))](
        *four(narrow), wide_NF, *four(parts), *four(grads), *four(ranks), *pointers(drops, MOST, ranks[0]), tables.order_N,
        tables.chunks_C4, features,
        C=len(narrow), WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, DROP=bool(drops), PRECISION=_precision(wide_NF.dtype),
        STAGES=min(3 if len(narrow) == 2 else 2, _stages(block_n * (block_f + len(narrow) * width) * item)),  # registers, too
        num_warps=4, num_stages=1,
    )  # fmt: skip
    sums.fold_or_leave(grads, parts, tables, ranks, later)
    return grads
