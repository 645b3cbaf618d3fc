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

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import _precision
from lorabank.kernels.gpu.siblings import _put
from lorabank.kernels.tables import RouteTables

WIDEST_RANK = 16
"""Of one slot: more don't fit the registers of `middle`."""
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
