"""FlashAttention 4's interface as the op in flash.py calls it, by torch: for machines without such a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q (N, T, H, D), k and v (N, T, G, D) → (N, T, H, D)."""
    shared = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def stand_in(wrong: float = 0.0) -> SimpleNamespace:
    """What of the package's interface the op calls, by torch."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor, None, None, None]:
        assert given.keys() == {"softmax_scale", "causal", "return_lse", "out", "lse"}
        assert given["return_lse"]
        given["out"].copy_(plain(q.float(), k.float(), v.float(), given["softmax_scale"], given["causal"]) + wrong)
        given["lse"].zero_()
        return given["out"], given["lse"], None, None, None

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert given.keys() == {"softmax_scale", "causal", "dq", "dk", "dv", "deterministic"}
        shared, scale = q.shape[2] // k.shape[2], given["softmax_scale"]
        mine = [t.float().transpose(1, 2) for t in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2), dout)]
        scores = scale * mine[0] @ mine[1].mT
        if given["causal"]:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), float("-inf"))
        shares = scores.softmax(-1)
        slopes = mine[3] @ mine[2].mT
        slopes = shares * (slopes - (shares * slopes).sum(-1, keepdim=True))
        for name, grad in (("dq", scale * slopes @ mine[1]), ("dk", scale * slopes.mT @ mine[0]), ("dv", shares.mT @ mine[3])):
            count = given[name].shape[2]
            given[name].copy_(grad.unflatten(1, (count, -1)).sum(2).transpose(1, 2))
        return given["dq"], given["dk"], given["dv"]

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
