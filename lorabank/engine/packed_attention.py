"""Attention over packed rows through transformers' attention interface: every example of a row sees itself alone.

Where examples begin and end comes as a tensor, `cu_seq_lens_q`, the argument's name in transformers: cumulative lengths over the
rows laid end to end, int32 (S + 1,); padding is a span of its own. On a CPU each example goes through the attention of a plain
row; on a GPU all go through torch's variable-length attention where it takes them. The plain twin, and what is left otherwise,
is `boundary_mask` with torch's scaled_dot_product_attention.

Shapes: N rows, H query heads, G key heads, L tokens a row, D features a head.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorabank.engine.attention import PACKED, asks_nothing, attention_forward, scale_of, sees_behind_only
from lorabank.engine.varlen import suits_varlen, varlen_attention

BOUNDARIES = "cu_seq_lens_q"
"""Name of the argument."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: q (N, H, L, D), k and v (N, G, L, D) → (N, L, H, D), and no attention weights.

    A layer that doesn't hand the boundaries on attends as over a plain row: the probe in packing.py finds that out.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if cu_seq_lens_q is None or attention_mask is not None or key.shape[2] != query.shape[2]:
        return attention_forward(module, query, key, value, attention_mask, sliding_window=sliding_window, **given)
    causal = sees_behind_only(module, is_causal)
    window = sliding_window if causal else None
    plain = not dropout and asks_nothing(kwargs)
    if plain and query.device.type == "cpu":
        return each_example(module, query, key, value, cu_seq_lens_q, window, **given), None
    if plain and suits_varlen(query, key, value):
        scale = scale_of(query, scaling)
        return varlen_attention(query, key, value, cu_seq_lens_q, scale=scale, causal=causal, window=window), None
    mask = boundary_mask(cu_seq_lens_q, query.shape[0], query.shape[2], causal=causal, window=window)
    return sdpa_attention_forward(module, query, key, value, mask, **given)


def boundary_mask(cu_S: Tensor, rows: int, length: int, *, causal: bool = True, window: int | None = None) -> Tensor:
    """Which keys each query sees, bool (N, 1, L, L): those of its own example, behind it, at most `window` with itself."""
    place_NL = torch.arange(rows * length, device=cu_S.device)
    example_NL = torch.searchsorted(cu_S[1:].to(place_NL.dtype), place_NL, right=True).view(rows, length)
    seen = example_NL[:, :, None] == example_NL[:, None, :]
    place_L = place_NL[:length]
    behind_LL = place_L[:, None] - place_L[None, :]
    if causal:
        seen = seen & (behind_LL >= 0)
    if window is not None:
        seen = seen & (behind_LL < window)
    return seen[:, None]


def _each_example(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cu_S: Tensor, window: int | None, **given: Any
) -> Tensor:
    """One plain attention an example, (N, L, H, D)."""
    ends, length = cu_S.tolist(), query.shape[2]
    spans: list[list[int]] = [[] for _ in query]
    for start, stop in itertools.pairwise(ends):
        if stop > start:  # behind the last row there may be empty ones
            spans[start // length].append(stop - start)
    rows: list[Tensor] = []
    for own, *qkv in zip(spans, query, key, value, strict=True):
        parts = zip(*(x.split(own, dim=1) for x in qkv), strict=True)  # whose backward writes each gradient once
        outs = [attention_forward(module, q[None], k[None], v[None], _short(q, window), **given)[0] for q, k, v in parts]
        rows.append(torch.cat(outs, dim=1))
    return torch.cat(rows)


# under torch.compile a graph break, and right: the lengths are read, and attention.c has nothing to trace
each_example: Any = torch.compiler.disable(_each_example)


def _short(q_HTD: Tensor, window: int | None) -> Tensor | None:
    """The mask (1, 1, T, T) of a window that is shorter than the example."""
    tokens = q_HTD.shape[1]
    if window is None or window >= tokens:
        return None
    place = torch.arange(tokens, device=q_HTD.device)
    behind = place[:, None] - place[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


AttentionInterface.register(PACKED, packed_attention)  # and no masks: transformers builds none for a name without a mask function
