"""Rows as e4m3 with a scale each, in Triton: `fp8.quantize_rows`, alone or with LoRA's narrow product in the same pass.

`quantize` finds a row's largest number itself. Where whoever wrote the rows noted it (`maxima_like`), `round_and_shrink` reads
them once for both, `round_outer_and_shrink` for the gradient of B besides. A maximum is noted as the bits of |number| in fp32, a
whole number: those are ordered as the numbers are, with NaN above infinity, so rows that aren't finite are NaN, and no other is.
Maxima stand in the order of entries, scales and rows in that of tokens. The plain twin is fp8.py. Shapes as in lora.py, C layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.fp8 import E4M3
from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import SHARED_BYTES, _precision
from lorabank.kernels.gpu.runs import _entries, _straight
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.tables import TILE, RouteTables

Rounded = tuple[Tensor, Tensor]
"""(e4m3 (N, F), scale (N)): what `fp8.multiply` takes."""
WHOLE_ROW = 16384
"""Numbers of a row that a program of `quantize` holds; of longer ones it reads all twice."""
PROGRAMS = 256
"""Programs that `round_and_shrink` starts at least, if need be by splitting rows: two a multiprocessor."""
SHORTEST_SHARE = 512
"""Features of a split at least."""
ROUND_SHAPE = (128, 4, 4)
"""Of `_round`: features of a step, warps, steps loaded ahead at most."""
THROUGH_SHAPE = (64, 128, 4, 3)
"""Of `_round_through`: tokens of a step, features, warps, steps loaded ahead."""


@triton.jit
def _bits(value):
    """|value| as a whole number."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(bits):
    """Of a row whose largest number has such bits."""
    scale = bits.to(tl.float32, bitcast=True) * (1 / 448)
    return tl.where(scale < 1e-12, 1e-12, scale)  # NaN stays


@triton.jit
def _round_tile(tile, scale, dtype):
    """No number is beyond e4m3's largest: the row's own largest is that."""
    return (tile.to(tl.float32) * tl.div_rn(1.0, scale)[:, None]).to(dtype)


@triton.jit
def _quantize(x, rounded, scales, features, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One row, held in registers with WHOLE."""
    token = tl.program_id(0).to(tl.int64)
    one, f = token + tl.arange(0, 1), tl.arange(0, BLOCK)
    row = token * features
    if WHOLE:
        tile = tl.load(x + row + f[None, :], mask=(f < features)[None, :], other=0.0)
        scale = _scale(tl.max(_bits(tile), 1))
        tl.store(rounded + row + f[None, :], _round_tile(tile, scale, rounded.dtype.element_ty), mask=(f < features)[None, :])
    else:
        bits = tl.zeros((1, BLOCK), dtype=tl.int32)
        for at in range(0, features, BLOCK):
            bits = tl.maximum(bits, _bits(tl.load(x + row + at + f[None, :], mask=(at + f < features)[None, :], other=0.0)))
        scale = _scale(tl.max(bits, 1))
        for at in range(0, features, BLOCK):
            inside = (at + f < features)[None, :]
            tile = tl.load(x + row + at + f[None, :], mask=inside, other=0.0)
            tl.store(rounded + row + at + f[None, :], _round_tile(tile, scale, rounded.dtype.element_ty), mask=inside)
    tl.store(scales + one, scale)


@triton.jit
def _round(
    x0, x1, w0, w1, k0, k1, s0, s1, maxima, rounded, scales, narrow, parts, order, tiles, features, entries, apart, share,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's rows of the layer that the third index names, and x · weightᵀ: scaled with WHOLE, else a split's share."""
    tile, split, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x, weight, ranks, scaling = x0, w0, k0, s0
    if C > 1:  # noqa: SIM102  decided by the compiler
        if layer == 1:
            x, weight, ranks, scaling = x1, w1, k1, s1
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        place = tl.maximum(slot, 0)
        start = tl.load(ranks + place * 2).to(tl.int64)
        rank = tl.where(slot >= 0, tl.load(ranks + place * 2 + 1), 0)
        m, r = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = layer * entries + first + m
        scale = _scale(tl.load(maxima + entry, mask=m < count, other=0))
        if split == 0:
            tl.store(scales + layer * apart + rows, scale, mask=m < count)
        rounded += layer * entries * features
        begin = split * share
        end = tl.minimum(features, begin + share)
        total = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        for at in range(begin, end, BLOCK_F):
            f = at + tl.arange(0, BLOCK_F)
            inside = (m < count)[:, None] & (f < end)[None, :]
            at_MF = rows[:, None] * features + f[None, :]
            x_tile = tl.load(x + at_MF, mask=inside, other=0.0)
            w_tile = tl.load(
                weight + (start + r)[:, None] * features + f[None, :], mask=(r < rank)[:, None] & (f < end)[None, :], other=0.0
            )
            total = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), total, input_precision=PRECISION)
            tl.store(rounded + at_MF, _round_tile(x_tile, scale, rounded.dtype.element_ty), mask=inside)
        kept = (m < count)[:, None] & (r < rank)[None, :]
        if WHOLE:
            scaled = (total * tl.load(scaling + place)).to(narrow.dtype.element_ty)
            tl.store(narrow + entry[:, None] * WIDTH + r[None, :], scaled, mask=kept)
        else:
            entry += (layer * (tl.num_programs(1) - 1) + split) * entries
            tl.store(parts + entry[:, None] * WIDTH + r[None, :], total, mask=kept)


@triton.jit
def _through_step(
    rows, n, x, narrow, w_turned, total, rank, maxima, rounded, scales, shares, column, first, count, r, f, features,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_round_through` for some tokens: the sum with them."""
    entry = first + n
    scale = _scale(tl.load(maxima + entry, mask=n < count, other=0))
    if column == 0:
        tl.store(scales + rows, scale, mask=n < count)
    kept, within = (n < count)[:, None] & (r < rank)[None, :], (n < count)[:, None] & (f < features)[None, :]
    at_NF, at_NW = rows[:, None] * features + f[None, :], entry.to(tl.int64)[:, None] * WIDTH + r[None, :]
    tile = tl.load(x + at_NF, mask=within, other=0.0)
    small = _entries(narrow, entry.to(tl.int64), n < count, r, WIDTH)  # the sum's rows beyond the ranks mean nothing
    total = tl.dot(tl.trans(small), tile, total, input_precision=PRECISION)
    tl.store(shares + at_NW, tl.dot(tile, w_turned, input_precision=PRECISION), mask=kept)
    tl.store(rounded + at_NF, _round_tile(tile, scale, rounded.dtype.element_ty), mask=within)
    return total


@triton.jit
def _round_through(
    x0, x1, n0, n1, w0, w1, k0, k1, g0, g1, p0, p1, maxima, rounded, scales, shares, order, chunks, features, entries, apart,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's rows at some features; narrowᵀ · x over the chunk's tokens; each column's share of x · weightᵀ."""
    chunk, column, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x, narrow, weight, ranks, grad, parts = x0, n0, w0, k0, g0, p0
    if C > 1:  # noqa: SIM102  decided by the compiler
        if layer == 1:
            x, narrow, weight, ranks, grad, parts = x1, n1, w1, k1, g1, p1
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if count > 0:
        place = tl.maximum(slot, 0)
        start = tl.load(ranks + place * 2).to(tl.int64)
        rank = tl.where(slot >= 0, tl.load(ranks + place * 2 + 1), 0)
        maxima += layer * entries
        scales += layer * apart
        rounded += layer * entries * features
        shares += (layer * tl.num_programs(1) + column) * entries * WIDTH
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (r < rank)[:, None] & (f < features)[None, :]
        w_tile = tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=inside, other=0.0).to(x.dtype.element_ty)
        w_turned = tl.trans(w_tile)
        total = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            total = _through_step(
                (base + n).to(tl.int64), n, x, narrow, w_turned, total, rank, maxima, rounded, scales, shares, column,
                first, count, r, f, features, WIDTH, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            total = _through_step(
                rows, n, x, narrow, w_turned, total, rank, maxima, rounded, scales, shares, column,
                first, count, r, f, features, WIDTH, PRECISION,
            )  # fmt: skip
        if slot >= 0:
            _put(total, grad, parts, ranks, slot, chunk, only, r, f, features, WIDTH)


def maxima_like(x_NF: Tensor, layers: int) -> Tensor:
    """Room for each entry's maximum in so many layers' rows, (C, N): `atomic_max` raises it from zero."""
    return torch.zeros((layers, x_NF.shape[0]), dtype=torch.int32, device=x_NF.device)


def quantize(x_NF: Tensor) -> Rounded:
    """Any rows."""
    tokens, features = x_NF.shape
    rounded, (scales,) = _empty([x_NF])
    block = triton.next_power_of_2(min(features, WHOLE_ROW))
    sums.launch(_quantize)[(tokens,)](
        x_NF, rounded, scales, features, BLOCK=block, WHOLE=features <= block, num_warps=4 if block <= 4096 else 8
    )
    return rounded[0], scales


def round_and_shrink(
    x: Sequence[Tensor],
    maxima_CN: Tensor,
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
    width: int,
) -> tuple[list[Rounded], list[Tensor]]:
    """(one or two layers' x (N, F) rounded, `lora.shrink` of each by its weight), x read once."""
    (entries, features), count, item, device = x[0].shape, len(x), x[0].element_size(), x[0].device
    tiles, (block_f, warps, ahead) = tables.tiles_S4.shape[0], ROUND_SHAPE
    splits = max(1, min(features // SHORTEST_SHARE, -(-PROGRAMS // (tiles * count))))
    share = -(-features // (splits * block_f)) * block_f
    rounded, scales = _empty(x)
    narrow = torch.empty((count, entries, width), dtype=x[0].dtype, device=device)
    parts = narrow
    if splits > 1:
        parts = torch.empty((count, splits, entries, width), dtype=torch.float32, device=device)
    sums.launch(_round)[(tiles, splits, count)](
        *_two(x), *_two(weights), *_two(ranks), *_two(scalings), maxima_CN, rounded, scales, narrow, parts, tables.order_N,
        tables.tiles_S4, features, entries, scales.stride(0), share,
        C=count, WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, WHOLE=splits == 1, PRECISION=_precision(x[0].dtype),
        num_warps=warps, num_stages=max(1, min(ahead, SHARED_BYTES // (block_f * (TILE * item + width * 4)))),
    )  # fmt: skip
    if splits > 1:
        sums.gather(narrow.unbind(), parts.unbind(), tables, ranks, scalings)
    return list(zip(rounded.unbind(), scales.unbind(), strict=True)), list(narrow.unbind())


def round_outer_and_shrink(
    x: Sequence[Tensor],
    maxima_CN: Tensor,
    narrow: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    scalings: Sequence[Tensor],
) -> tuple[list[Rounded], list[Tensor], list[Tensor]]:
    """(one or two layers' x rounded, `lora.outer` of narrow and x, `lora.shrink` of x by weight), x read once."""
    (entries, features), count, device = x[0].shape, len(x), x[0].device
    chunks, width, (block_n, block_f, warps, stages) = tables.chunks_C4.shape[0], narrow[0].shape[1], _through_shape(x[0])
    columns = -(-features // block_f)
    rounded, scales = _empty(x)
    grads = [torch.empty_like(weight) for weight in weights]
    parts = [torch.empty((tables.summed, width, features), dtype=torch.float32, device=device) for _ in x]
    shares = torch.empty((count, columns, entries, width), dtype=torch.float32, device=device)
    results = [torch.empty((entries, width), dtype=x[0].dtype, device=device) for _ in x]
    sums.launch(_round_through)[(chunks, columns, count)](
        *_two(x), *_two(narrow), *_two(weights), *_two(ranks), *_two(grads), *_two(parts), maxima_CN, rounded, scales, shares,
        tables.order_N, tables.chunks_C4, features, entries, scales.stride(0),
        C=count, WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, STAGES=stages, PRECISION=_precision(x[0].dtype),
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    sums.fold(grads, parts, tables, ranks)
    sums.gather(results, shares.unbind(), tables, ranks, scalings)
    return list(zip(rounded.unbind(), scales.unbind(), strict=True)), grads, results


def _through_shape(x_NF: Tensor) -> tuple[int, int, int, int]:
    return THROUGH_SHAPE if x_NF.element_size() == 2 else (32, 32, 4, 1)


def _empty(x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and scales of so many layers. Each layer's scales begin at a multiple of 16 bytes: cuBLAS refuses others."""
    rounded, entries = torch.empty((len(x), *x[0].shape), dtype=E4M3, device=x[0].device), x[0].shape[0]
    return rounded, torch.empty((len(x), -(-entries // 4) * 4), dtype=torch.float32, device=x[0].device)[:, :entries]


def _two(values: Sequence[Tensor]) -> list[Tensor]:
    """A kernel has places for two layers: an only one takes both."""
    return [values[0], values[-1]]
