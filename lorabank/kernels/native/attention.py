"""Softmax attention in attention.c on torch tensors. The plain twin is torch's scaled_dot_product_attention.

Shapes: B rows, H query heads, G key heads (G divides H), T tokens, D features a head.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels.native import library
from lorabank.kernels.native.tensors import takes

_CALL = struct.Struct("@" + "P3l" * 8 + "P5lfi")
FEATURES = 32
"""D must be a multiple of this."""


def suits(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> bool:
    """Whether attention.c takes these: fp32 on a CPU, as many keys as queries, D a multiple of 32 and the same for all three."""
    q, k, v = q_BHTD, k_BGTD, v_BGTD
    return (
        all(takes(x) and x.dim() == 4 for x in (q, k, v))
        and k.shape == v.shape == (q.shape[0], k.shape[1], q.shape[2], q.shape[3])
        and q.shape[1] % max(1, k.shape[1]) == 0
        and q.shape[3] % FEATURES == 0
        and q.numel() > 0
        and k.numel() > 0
        and library.loaded() is not None
    )


def _strided(x: Tensor) -> Tensor:
    """The same numbers in fp32, the features side by side: itself where it is so already."""
    x = x.to(torch.float32).resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scale: float, causal: bool) -> Tensor:
    """softmax(scale · q kᵀ) v, (B, T, H, D) contiguous, for what `suits` let through. Differentiable once."""
    return _Attention.apply(q_BHTD, k_BGTD, v_BGTD, scale, causal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        q, k, v = map(_strided, (q, k, v))
        rows, heads, tokens, features = q.shape
        out_BTHD, lse_BHT = q.new_empty(rows, tokens, heads, features), q.new_empty(rows, heads, tokens)
        functions = library.loaded()
        assert functions is not None  # `suits` asked for it
        nothing = (0, 0, 0, 0)
        call = _packed([q, k, v, out_BTHD.transpose(1, 2)], [nothing] * 4, lse_BHT, scale, causal)
        if functions.attention_forward(call, torch.get_num_threads()):
            raise MemoryError("no memory for the scores of an attention layer")
        ctx.save_for_backward(q, k, v, out_BTHD, lse_BHT)
        ctx.scale, ctx.causal = scale, causal
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dout_BTHD,) = grad_outputs
        # what was saved may come back in another form, from saved_tensors_hooks
        *saved, lse_BHT = ctx.saved_tensors
        q, k, v, out_BTHD = map(_strided, saved)
        lse_BHT, dout_BTHD = lse_BHT.to(torch.float32).contiguous(), _strided(dout_BTHD)
        rows, heads, tokens, features = q.shape
        dq = q.new_empty(rows, tokens, heads, features).transpose(1, 2)
        dk, dv = (q.new_zeros(rows, tokens, k.shape[1], features).transpose(1, 2) for _ in range(2))
        functions = library.loaded()
        assert functions is not None
        gradients = [_place(x) for x in (dout_BTHD.transpose(1, 2), dq, dk, dv)]
        call = _packed([q, k, v, out_BTHD.transpose(1, 2)], gradients, lse_BHT, ctx.scale, ctx.causal)
        if functions.attention_backward(call, torch.get_num_threads()):
            raise MemoryError("no memory for the scores of an attention layer's gradients")
        return dq, dk, dv, None, None


def _place(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _packed(tensors: list[Tensor], gradients: list[tuple[int, int, int, int]], lse: Tensor, scale: float, causal: bool) -> bytes:
    """The C struct of a call: where q, k, v, out, then dout, dq, dk, dv lie; lse; sizes; scale; causal."""
    q, k = tensors[:2]
    numbers = [number for place in [*map(_place, tensors), *gradients] for number in place]
    rows, heads, tokens, features = q.shape
    return _CALL.pack(*numbers, lse.data_ptr(), rows, heads, k.shape[1], tokens, features, scale, causal)
