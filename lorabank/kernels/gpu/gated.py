"""Kernels of a gated MLP, down(act(gate(x)) · up(x)), that add LoRA's change where the activation reads: gate and up stay raw.

The frozen products alone are in memory; every kernel makes gate + xA·B (and dh + dyB·A) of its tile again, rounded as the layers
would. `activate` is h with each row's largest number for fp8; `middle` its backward with what sums over tokens in the same pass:
dA of down, and dB of gate and up where `OUTERS` says so. The plain twin is the three layers one after the other. Shapes as in
lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.gated_mlp import _activation
from lorabank.kernels.gpu.lora import _precision
from lorabank.kernels.gpu.rounding import _bits
from lorabank.kernels.gpu.runs import _entries, _straight
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.tables import TILE, RouteTables

OUTERS = 1
"""Gradients that `middle` makes: 3, or 1, down's alone; rounding.py's `round_outer_and_shrink` makes the others then."""
ACTIVATE_SHAPE = (64, 4)
"""Of `_activate_raw`: features, warps."""
MIDDLE_SHAPE = (32, 64, 4, 3)
"""Of `_middle_raw`: tokens of a step, features, warps, steps loaded ahead."""


@triton.jit
def _weight_tile(weight, ranks, slot, r, f, features, dtype):
    """A slot's rows of A or B at some features; zeros without a slot."""
    place = tl.maximum(slot, 0) * 2
    start, rank = tl.load(ranks + place).to(tl.int64), tl.where(slot >= 0, tl.load(ranks + place + 1), 0)
    kept = (r < rank)[:, None] & (f < features)[None, :]
    return tl.load(weight + (start + r)[:, None] * features + f[None, :], mask=kept, other=0.0).to(dtype)


@triton.jit
def _small_tile(narrow, ranks, slot, entry, inside, r, WIDTH: tl.constexpr):
    """Some entries of a narrow tensor; zeros without a slot."""
    rank = tl.where(slot >= 0, tl.load(ranks + tl.maximum(slot, 0) * 2 + 1), 0)
    return tl.where((r < rank)[None, :], _entries(narrow, entry, inside, r, WIDTH), 0.0)


@triton.jit
def _changed(raw, small, w_tile, PRECISION: tl.constexpr):
    """raw + small · weight, rounded once, in fp32."""
    total = tl.dot(small, w_tile, input_precision=PRECISION) + raw.to(tl.float32)
    return total.to(raw.dtype).to(tl.float32)


@triton.jit
def _activate_raw(
    gate, up, h, n0, n1, w0, w1, k0, k1, maxima, order, tiles, features,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, MAXIMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h = act(gate + n0·w0) · (up + n1·w1), and with MAXIMA the bits of each row's largest number."""
    tile, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        m, r, f = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = (first + m).to(tl.int64)
        kept, at = (m < count)[:, None] & (f < features)[None, :], rows[:, None] * features + f[None, :]
        dtype: tl.constexpr = h.dtype.element_ty
        small, w_tile = _small_tile(n0, k0, slot, entry, m < count, r, WIDTH), _weight_tile(w0, k0, slot, r, f, features, dtype)
        g = _changed(tl.load(gate + at, mask=kept, other=0.0), small, w_tile, PRECISION)
        value, _ = _activation(g, GELU)  # pyright: ignore[reportGeneralTypeIssues]
        small, w_tile = _small_tile(n1, k1, slot, entry, m < count, r, WIDTH), _weight_tile(w1, k1, slot, r, f, features, dtype)
        u = _changed(tl.load(up + at, mask=kept, other=0.0), small, w_tile, PRECISION)
        made = (value.to(dtype).to(tl.float32) * u).to(dtype)
        tl.store(h + at, made, mask=kept)
        if MAXIMA:
            tl.atomic_max(maxima + entry, tl.max(tl.where(kept, _bits(made), 0), 1), mask=m < count, sem="relaxed")


@triton.jit
def _middle_step(
    rows, n, dh, gate, up, dg, du, n0, n1, n2, w0_tile, w1_tile, w2_tile, t0, t1, t2, k0, k1, k2, maxima, slot, first, count,
    r, f, features, entries,
    WIDTH: tl.constexpr, GELU: tl.constexpr, MAXIMA: tl.constexpr, OUTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_middle_raw` for some tokens: the sums with them."""
    dtype: tl.constexpr = dg.dtype.element_ty
    inside, entry = n < count, (first + n).to(tl.int64)
    kept, at = inside[:, None] & (f < features)[None, :], rows[:, None] * features + f[None, :]
    small0 = _small_tile(n0, k0, slot, entry, inside, r, WIDTH)
    small1 = _small_tile(n1, k1, slot, entry, inside, r, WIDTH)
    small2 = _small_tile(n2, k2, slot, entry, inside, r, WIDTH)
    d = _changed(tl.load(dh + at, mask=kept, other=0.0), small2, w2_tile, PRECISION)
    g = _changed(tl.load(gate + at, mask=kept, other=0.0), small0, w0_tile, PRECISION)
    u = _changed(tl.load(up + at, mask=kept, other=0.0), small1, w1_tile, PRECISION)
    value, slope = _activation(g, GELU)  # pyright: ignore[reportGeneralTypeIssues]
    made_g = (d * u * slope).to(dtype)
    made_u = (d * value).to(dtype)
    made_h = (value.to(dtype).to(tl.float32) * u).to(dtype)
    tl.store(dg + at, made_g, mask=kept)
    tl.store(du + at, made_u, mask=kept)
    if MAXIMA:
        tl.atomic_max(maxima + entry, tl.max(tl.where(kept, _bits(made_g), 0), 1), mask=inside, sem="relaxed")
        tl.atomic_max(maxima + entries + entry, tl.max(tl.where(kept, _bits(made_u), 0), 1), mask=inside, sem="relaxed")
    t2 = tl.dot(tl.trans(small2), made_h, t2, input_precision=PRECISION)
    if OUTERS > 1:
        t0 = tl.dot(tl.trans(small0), made_g, t0, input_precision=PRECISION)
        t1 = tl.dot(tl.trans(small1), made_u, t1, input_precision=PRECISION)
    return t0, t1, t2


@triton.jit
def _middle_raw(
    dh, gate, up, dg, du, n0, n1, n2, w0, w1, w2, g0, g1, g2, q0, q1, q2, k0, k1, k2, maxima, order, chunks, features, entries,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, MAXIMA: tl.constexpr,
    OUTERS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up from dh + n2·w2, and n2ᵀ · h (n0ᵀ · dgate, n1ᵀ · dup) over a chunk's tokens."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if count > 0:
        dtype: tl.constexpr = dg.dtype.element_ty
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        w0_tile = _weight_tile(w0, k0, slot, r, f, features, dtype)
        w1_tile = _weight_tile(w1, k1, slot, r, f, features, dtype)
        w2_tile = _weight_tile(w2, k2, slot, r, f, features, dtype)
        t0 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t1 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t2 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            t0, t1, t2 = _middle_step(
                (base + n).to(tl.int64), n, dh, gate, up, dg, du, n0, n1, n2, w0_tile, w1_tile, w2_tile, t0, t1, t2, k0, k1, k2,
                maxima, slot, first, count, r, f, features, entries, WIDTH, GELU, MAXIMA, OUTERS, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            t0, t1, t2 = _middle_step(
                rows, n, dh, gate, up, dg, du, n0, n1, n2, w0_tile, w1_tile, w2_tile, t0, t1, t2, k0, k1, k2,
                maxima, slot, first, count, r, f, features, entries, WIDTH, GELU, MAXIMA, OUTERS, PRECISION,
            )  # fmt: skip
        if slot >= 0:
            _put(t2, g2, q2, k2, slot, chunk, only, r, f, features, WIDTH)
            if OUTERS > 1:
                _put(t0, g0, q0, k0, slot, chunk, only, r, f, features, WIDTH)
                _put(t1, g1, q1, k1, slot, chunk, only, r, f, features, WIDTH)


def activate(
    gate_NF: Tensor,
    up_NF: Tensor,
    narrow: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    activation: str,
    maxima_CN: Tensor | None = None,
) -> Tensor:
    """h (N, F) from gate's and up's frozen products, narrow xA and B. `maxima_CN`: raised to what is in h."""
    features, width = gate_NF.shape[1], narrow[0].shape[1]
    h = torch.empty_like(gate_NF)
    block_f, warps = ACTIVATE_SHAPE if h.element_size() == 2 else (32, 4)
    sums.launch(_activate_raw)[(tables.tiles_S4.shape[0], -(-features // block_f))](
        gate_NF, up_NF, h, *narrow, *weights, *ranks, tables.order_N if maxima_CN is None else maxima_CN, tables.order_N,
        tables.tiles_S4, features,
        WIDTH=width, BLOCK_M=TILE, BLOCK_F=block_f, GELU=activation == "gelu_tanh", MAXIMA=maxima_CN is not None,
        PRECISION=_precision(h.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return h


def middle(
    dh_NF: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    narrow: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: RouteTables,
    ranks: Sequence[Tensor],
    activation: str,
    maxima_CN: Tensor | None = None,
    outers: int = OUTERS,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(gradients of gate and up (N, F), and `outers` gradients: [dB of gate, dB of up, dA of down], or the last alone).

    `dh`: of down's frozen product. `narrow`: s·xAᵀ of gate and up, s·dy·B of down. `weights` (ΣR, F): B of gate and up, A of
    down. `maxima_CN`: raised to what is in the gradients of gate and up.
    """
    features, width, chunks = dh_NF.shape[1], narrow[0].shape[1], tables.chunks_C4.shape[0]
    dg, du = torch.empty_like(dh_NF), torch.empty_like(dh_NF)
    grads = [torch.empty_like(weight) for weight in weights[-outers:]]
    parts = [torch.empty((tables.summed, width, features), dtype=torch.float32, device=dh_NF.device) for _ in grads]
    block_n, block_f, warps, stages = MIDDLE_SHAPE if dh_NF.element_size() == 2 else (32, 32, 4, 1)
    stages = stages if activation == "silu" or outers == 1 else min(stages, 2)  # GELU takes registers
    sums.launch(_middle_raw)[(chunks, -(-features // block_f))](
        dh_NF, gate_NF, up_NF, dg, du, *narrow, *weights, *_three(grads), *_three(parts), *ranks,
        tables.order_N if maxima_CN is None else maxima_CN, tables.order_N, tables.chunks_C4, features, len(dh_NF),
        WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, GELU=activation == "gelu_tanh", MAXIMA=maxima_CN is not None,
        OUTERS=outers, STAGES=stages, PRECISION=_precision(dh_NF.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    sums.fold(grads, parts, tables, ranks[-outers:])
    return dg, du, grads


def _three(values: Sequence[Tensor]) -> list[Tensor]:
    """The last of the kernel's places is down's: an only one takes all."""
    return [values[0]] * (3 - len(values)) + list(values)
