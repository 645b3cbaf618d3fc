"""Gradients of several layers' B, each from its own dy, in one start. Shapes as in lora.py; plain twin: `lora.outer` of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import SHARED_BYTES, _precision
from lorabank.kernels.gpu.runs import _entries, _straight
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.gpu.sums import four
from lorabank.kernels.tables import RouteTables


@triton.jit
def _step(rows, n, narrow, wide, total, first, count, r, f, features, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """The sum with some more tokens."""
    small = _entries(narrow, (first + n).to(tl.int64), n < count, r, WIDTH)  # the sum's rows beyond the ranks mean nothing
    kept = (n < count)[:, None] & (f < features)[None, :]
    tile = tl.load(wide + rows[:, None] * features + f[None, :], mask=kept, other=0.0)
    return tl.dot(tl.trans(small), tile, total, input_precision=PRECISION)


@triton.jit
def _outer_each(
    n0, n1, n2, n3, y0, y1, y2, y3, p0, p1, p2, p3, g0, g1, g2, g3, k0, k1, k2, k3, order, chunks, f0, f1, f2, f3,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """narrowᵀ · wide of a layer over a chunk's tokens; the second index counts the layers' blocks of columns."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    narrow, wide, parts, grad, ranks, features = n0, y0, p0, g0, k0, f0
    before = tl.cdiv(f0, BLOCK_F)
    if C > 1:  # noqa: SIM102  decided by the compiler
        if tl.program_id(1) >= before:
            narrow, wide, parts, grad, ranks, features = n1, y1, p1, g1, k1, f1
            column = tl.program_id(1) - before
    if C > 2:
        before += tl.cdiv(f1, BLOCK_F)
        if tl.program_id(1) >= before:
            narrow, wide, parts, grad, ranks, features = n2, y2, p2, g2, k2, f2
            column = tl.program_id(1) - before
    if C > 3:
        before += tl.cdiv(f2, BLOCK_F)
        if tl.program_id(1) >= before:
            narrow, wide, parts, grad, ranks, features = n3, y3, p3, g3, k3, f3
            column = tl.program_id(1) - before
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if (count > 0) & (slot >= 0):
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        total = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            rows = (base + n).to(tl.int64)
            total = _step(rows, n, narrow, wide, total, first, count, r, f, features, WIDTH, PRECISION)
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            total = _step(rows, n, narrow, wide, total, first, count, r, f, features, WIDTH, PRECISION)
        _put(total, grad, parts, ranks, slot, chunk, only, r, f, features, WIDTH)


def outer_each(
    narrow: Sequence[Tensor],
    wide: Sequence[Tensor],
    likes: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    later: sums.Later | None = None,
) -> list[Tensor]:
    """lora.outer of each of up to four layers' narrow (N, W) and wide (N, F)."""
    width, chunks, item = narrow[0].shape[1], tables.chunks_C4.shape[0], wide[0].element_size()
    features = [like.shape[1] for like in likes]
    grads = [torch.empty_like(like) for like in likes]
    parts = [torch.empty((tables.summed, width, size), dtype=torch.float32, device=wide[0].device) for size in features]
    block_n, block_f = 64, 128 if width <= 64 else 64
    sums.launch(_outer_each)[(chunks, sum(-(-size // block_f) for size in features))](
        *four(narrow), *four(wide), *four(parts), *four(grads), *four(ranks), tables.order_N, tables.chunks_C4, *four(features),
        C=len(narrow), WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, PRECISION=_precision(wide[0].dtype),
        STAGES=max(1, min(4, SHARED_BYTES // (block_n * (block_f + width) * item))), num_warps=4, num_stages=1,
    )  # fmt: skip
    sums.fold_or_leave(grads, parts, tables, ranks, later)
    return grads
