"""torch's variable-length attention: rows laid end to end, each example by itself, with windows that skip what no query sees.

Shapes: N rows, H query heads, G key heads, L tokens a row, D features a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

MOST_FEATURES = 256
"""Of a head."""
_LARGE, _TAKE_LARGE = range(193, 225), ((8, 0), (9, 0))
"""Features of a head whose backward needs more shared memory than GPUs other than these have, as torch's own choice has it."""
_TAKES = frozenset(inspect.signature(varlen.varlen_attn).parameters)
"""Arguments of the installed torch's: they have grown from version to version."""


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
    if torch.version.cuda is None or (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return "it is for NVIDIA GPUs from Ampere on"
    if features in _LARGE and capability not in _TAKE_LARGE:
        return f"its backward doesn't take heads of {features} features on this GPU"
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
