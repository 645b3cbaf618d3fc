"""In which dtype an adapter's products over a half-precision model are computed, and sums that are kept in fp32.

Adapters are kept in fp32. On a GPU their products with inputs in bf16 or fp16 are computed in the inputs' dtype, A and B rounded
to it, with sums in fp32: what tensor cores do, and the Triton kernels (gpu/lora.py). A CPU widens the inputs instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorabank.kernels.segments import Segment

_HALVES = (torch.bfloat16, torch.float16)
SHARE = 2048
"""Numbers that one product sums on a GPU, at least, where a long sum is split: whole, it would keep one program busy."""


def rounds(x: Tensor) -> bool:
    """Whether adapters are rounded to x's dtype for their products with it."""
    return x.is_cuda and x.dtype in _HALVES


def rounded(segment: Segment, x: Tensor) -> Segment:
    """The segment with A and B in the dtype that they are computed in."""
    if not rounds(x):
        return segment
    return replace(segment, A_RI=segment.A_RI.to(x.dtype), B_RO=segment.B_RO.to(x.dtype))


def outer(left: Tensor, right: Tensor) -> Tensor:
    """left (…, R, N) · right (…, N, C), with no dimension or one ahead: a sum over N, in fp32 where the factors are of halves."""
    if not (left.is_cuda and left.dtype in _HALVES):
        return left @ right
    shares = _shares(right.shape[-2]) if right.is_contiguous() and left.mT.is_contiguous() else 1
    parts = torch.bmm(_split(left.mT, shares).mT, _split(right, shares), out_dtype=torch.float32)
    return parts.view(*left.shape[:-2], shares, *parts.shape[1:]).sum(-3) if shares > 1 else parts.view(*left.shape[:-1], -1)


def _shares(count: int) -> int:
    """Into how many equal shares a sum of that many numbers is split."""
    return next((n for n in range(max(1, count // SHARE), 1, -1) if count % n == 0), 1)


def _split(x_SNC: Tensor, shares: int) -> Tensor:
    """(…, N, C) → (… · shares, N / shares, C)."""
    return x_SNC.reshape(-1, x_SNC.shape[-2] // shares, x_SNC.shape[-1])
