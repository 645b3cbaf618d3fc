"""Attention over packed rows through transformers' attention interface: every example of a row sees itself alone.

Where examples begin and end comes as a tensor, `cu_seq_lens_q`, the argument's name in transformers: cumulative lengths over the
rows laid end to end, int32 (S + 1,); padding is a span of its own. On a CPU each example goes through the attention of a plain
row; on a GPU all go through torch's variable-length attention where it takes them. The plain twin, and what is left otherwise,
is `boundary_mask` with torch's scaled_dot_product_attention.

Shapes: N rows, H query heads, G key heads, L tokens a row, D features a head.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorabank.engine.attention import PACKED, asks_nothing, attention_forward, scale_of, sees_behind_only

BOUNDARIES = "cu_seq_lens_q"
"""Name of the argument."""
MOST_FEATURES = 256
"""Of a head, for torch's variable-length attention."""
_TAKES = frozenset(inspect.signature(varlen.varlen_attn).parameters)
"""Arguments of the installed torch's variable-length attention: they have grown from version to version."""


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


def suits_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length attention takes these: half precision on an Ampere GPU or newer, heads of one size."""
    same = query.dtype == key.dtype == value.dtype and key.shape[-1] == value.shape[-1] == query.shape[-1]
    return query.is_cuda and same and varlen_missing(query.device, query.dtype, query.shape[-1]) is None


def varlen_missing(device: torch.device, dtype: torch.dtype, features: int) -> str | None:
    """Why torch's variable-length attention doesn't take heads of so many features on the GPU `device`; None when it does."""
    if not {"scale", "window_size"} <= _TAKES:
        return "this torch has none that takes a scale and a window"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it is for fp16 and bf16"
    if features % 8 or features > MOST_FEATURES:
        return f"it takes heads of multiples of 8 features up to {MOST_FEATURES}"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "it is for NVIDIA GPUs from Ampere on"
    return None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_S: Tensor, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    """All examples in one call of torch's variable-length attention, (N, L, H, D)."""
    rows, heads, length, features = query.shape
    more: dict[str, Any] = {}
    if key.shape[1] != heads and "enable_gqa" in _TAKES:
        more["enable_gqa"] = True
    elif key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    q, k, v = (x.transpose(1, 2).reshape(rows * length, x.shape[1], features) for x in (query, key, value))
    sides = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    # a row's length bounds every example's; the kernels leave blocks beyond an example's end at once
    out = varlen.varlen_attn(q, k, v, cu_S, cu_S, length, length, scale=scale, window_size=sides, **more)
    assert isinstance(out, Tensor)  # a pair only where more was asked for
    return out.view(rows, length, heads, features)


AttentionInterface.register(PACKED, packed_attention)  # and no masks: transformers builds none for a name without a mask function
