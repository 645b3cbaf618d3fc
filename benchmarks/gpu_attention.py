"""Causal attention by FlashAttention's kernels as blocks call them, for gpu_kernels.py, beside torch's own.

Shapes: N rows, T tokens, H query heads, G key heads, D features a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.gpu import flash

ROWS, TOKENS, HEADS, KEY_HEADS, FEATURES = 2, 2048, 32, 8, 128
"""Llama-3.1-8B's."""
TOLERANCE = 2e-2
"""Relative norm, what flash.py allows too: the shares and their gradients are rounded to bf16 on the way."""
BACKWARD = 2.5
"""FLOP of backward in those of forward: five products for two."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One call."""

    q: Tensor
    """(N, T, H, D), as the gradient of y is."""
    k: Tensor
    """(N, T, G, D), as v is."""
    v: Tensor
    dy: Tensor

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Attention:
        """Random tensors."""
        torch.manual_seed(0)
        q, dy = (torch.randn(ROWS, TOKENS, HEADS, FEATURES, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(ROWS, TOKENS, KEY_HEADS, FEATURES, device=device, dtype=dtype) for _ in range(2))
        return cls(q=q, k=k, v=v, dy=dy)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.q.shape[3] ** -0.5

    @property
    def shape(self) -> str:
        """Of its row."""
        rows, tokens, heads, features = self.q.shape
        return f"{rows} × {tokens}, {heads} heads of {features}, {self.k.shape[2]} key heads"

    @property
    def flop(self) -> int:
        """Of the forward: two products, of which a causal mask leaves half."""
        rows, tokens, heads, features = self.q.shape
        return 2 * rows * heads * tokens * tokens * features

    def forward(self) -> tuple[Tensor, Tensor]:
        """(y, its log-sum-exp) by our op."""
        return flash.flash_attention(self.q, self.k, self.v, self.scale, True)

    def backward(self, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) by our op."""
        return flash.flash_attention_backward(self.dy, self.q, self.k, self.v, y, lse, self.scale, True)

    def torchs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """y (N, H, T, D) by torch's attention; its inputs likewise, as models turn them."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)

    def turned(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dy as torch's attention takes them."""
        q, k, v, dy = (tensor.transpose(1, 2) for tensor in (self.q, self.k, self.v, self.dy))
        return q, k, v, dy


def missing(device: torch.device) -> str | None:
    """Why ours isn't measured; None where it is."""
    if flash.ready(device, FEATURES, HEADS // KEY_HEADS):
        return None
    return "flash-attn-4 isn't ready on this GPU, so ours is torch's attention"


def found(a: Attention) -> dict[str, Tensor]:
    """By our ops."""
    y, lse = a.forward()
    return dict(zip(("attention", "dq", "dk", "dv"), (y, *a.backward(y, lse)), strict=True))


def expected(a: Attention) -> dict[str, Tensor]:
    """The same by its definition, in fp32, one row after the other: a row's scores alone are half a GiB."""
    rows = [_row(a, i) for i in range(len(a.q))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(a: Attention, i: int) -> dict[str, Tensor]:
    q, k, v = (tensor[i].float().requires_grad_() for tensor in (a.q, a.k, a.v))
    keys, values = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    scores = torch.einsum("thd,shd->hts", q, keys) * a.scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    y = torch.einsum("hts,shd->thd", scores.masked_fill(later, float("-inf")).softmax(-1), values)
    gradients = torch.autograd.grad(y, (q, k, v), a.dy[i].float())
    return dict(zip(("attention", "dq", "dk", "dv"), (y.detach(), *gradients), strict=True))


def timings(a: Attention) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], int]]:
    """(kernel, ours, torch's, FLOP)."""
    q, k, v, dy = a.turned()
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    yield "attention forward", a.forward, lambda: a.torchs(q, k, v), a.flop
    y, lse = a.forward()
    theirs = a.torchs(*leaves)
    yield (
        "attention backward",
        lambda: a.backward(y, lse),
        lambda: torch.autograd.grad(theirs, leaves, dy, retain_graph=True),
        int(BACKWARD * a.flop),
    )
