"""What a gated MLP with borders (bordered.py) has of its own: h = act(gate)·up, and its backward with three layers' gradients.

`middle` makes the gradients of gate and up from that of h, and in the same pass those of gate's and up's B and down's A: features
don't depend on one another there, so a program keeps its few columns' sums and walks along the tokens. Shapes as in lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import fast_math, sums
from lorabank.kernels.gpu.lora import _precision
from lorabank.kernels.gpu.runs import _entries, _straight
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.tables import RouteTables

WIDEST_RANK = 16
"""Of one slot: more don't fit the registers of `middle`."""
MIDDLE_SHAPE = (16, 64, 4, 3)
"""Of `_middle`: tokens of a step, features, warps, steps loaded ahead."""
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _activation(g, GELU: tl.constexpr):
    """(act(g), its derivative), fp32."""
    if GELU:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        tanh = 2.0 * fast_math.sigmoid(2.0 * inner) - 1.0
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        value = 0.5 * g * (1.0 + tanh)
        derivative = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * slope
    else:
        sigmoid = fast_math.sigmoid(g)
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
def _middle_step(
    rows, n, dh, gate, up, dg, du, n0, n1, n2, t0, t1, t2, first, count, r, f, features,
    WIDTH: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_middle` for some tokens: the sums with them. Their rows beyond a slot's ranks mean nothing."""
    dtype: tl.constexpr = dg.dtype.element_ty
    inside = n < count
    kept, at = inside[:, None] & (f < features)[None, :], rows[:, None] * features + f[None, :]
    entry = (first + n).to(tl.int64)
    d = tl.load(dh + at, mask=kept, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=kept, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=kept, other=0.0).to(tl.float32)
    value, slope = _activation(g, GELU)  # pyright: ignore[reportGeneralTypeIssues]
    made_g, made_u, made_h = (d * u * slope).to(dtype), (d * value).to(dtype), (value * u).to(dtype)
    tl.store(dg + at, made_g, mask=kept)
    tl.store(du + at, made_u, mask=kept)
    small = _entries(n0, entry, inside, r, WIDTH)
    t0 = tl.dot(tl.trans(small), made_g, t0, input_precision=PRECISION)
    small = _entries(n1, entry, inside, r, WIDTH)
    t1 = tl.dot(tl.trans(small), made_u, t1, input_precision=PRECISION)
    small = _entries(n2, entry, inside, r, WIDTH)
    t2 = tl.dot(tl.trans(small), made_h, t2, input_precision=PRECISION)
    return t0, t1, t2


@triton.jit
def _middle(
    dh, gate, up, dg, du, n0, n1, n2, g0, g1, g2, q0, q1, q2, k0, k1, k2, order, chunks, features,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up from that of h, and narrowᵀ · dgate, narrowᵀ · dup, narrowᵀ · h over a chunk's tokens."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(chunks + chunk * 4), tl.load(chunks + chunk * 4 + 1), tl.load(chunks + chunk * 4 + 2)
    only = tl.load(chunks + chunk * 4 + 3)
    if count > 0:
        r, f = tl.arange(0, WIDTH), column * BLOCK_F + tl.arange(0, BLOCK_F)
        t0 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t1 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        t2 = tl.zeros((WIDTH, BLOCK_F), dtype=tl.float32)
        base, straight = _straight(order, first, count)  # pyright: ignore[reportGeneralTypeIssues]
        for at in tl.range(0, tl.where(straight, count, 0), BLOCK_N, num_stages=STAGES):
            n = at + tl.arange(0, BLOCK_N)
            t0, t1, t2 = _middle_step(  # pyright: ignore[reportGeneralTypeIssues]
                (base + n).to(tl.int64), n, dh, gate, up, dg, du, n0, n1, n2, t0, t1, t2, first, count, r, f, features,
                WIDTH, GELU, PRECISION,
            )  # fmt: skip
        for at in tl.range(0, tl.where(straight, 0, count), BLOCK_N, num_stages=1):
            n = at + tl.arange(0, BLOCK_N)
            rows = tl.load(order + first + n, mask=n < count, other=0).to(tl.int64)
            t0, t1, t2 = _middle_step(  # pyright: ignore[reportGeneralTypeIssues]
                rows, n, dh, gate, up, dg, du, n0, n1, n2, t0, t1, t2, first, count, r, f, features, WIDTH, GELU, PRECISION,
            )  # fmt: skip
        if slot >= 0:
            _put(t0, g0, q0, k0, slot, chunk, only, r, f, features, WIDTH)
            _put(t1, g1, q1, k1, slot, chunk, only, r, f, features, WIDTH)
            _put(t2, g2, q2, k2, slot, chunk, only, r, f, features, WIDTH)


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
    later: sums.Later | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(gradients of gate and up (N, F), and [dB of gate, dB of up, dA of down], fp32 like `likes` (ΣR, F)).

    `narrow`: s·xAᵀ of gate and up and s·dy·B of down.
    """
    features, width, chunks, item = dh.shape[1], narrow[0].shape[1], tables.chunks_C4.shape[0], dh.element_size()
    dg, du = torch.empty_like(dh), torch.empty_like(dh)
    grads = [torch.empty_like(like) for like in likes]
    parts = [torch.empty((tables.summed, width, features), dtype=torch.float32, device=dh.device) for _ in likes]
    block_n, block_f, warps, stages = MIDDLE_SHAPE if item == 2 else (32, 32, 4, 1)
    sums.launch(_middle)[(chunks, -(-features // block_f))](
        dh, gate, up, dg, du, *narrow, *grads, *parts, *ranks, tables.order_N, tables.chunks_C4, features,
        WIDTH=width, BLOCK_N=block_n, BLOCK_F=block_f, GELU=activation == "gelu_tanh", STAGES=stages,
        PRECISION=_precision(dh.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    sums.fold_or_leave(grads, parts, tables, ranks, later)
    return dg, du, grads
