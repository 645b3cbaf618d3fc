"""What compiled code is told of the sizes that change from call to call: rows, tokens, examples of packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorabank.engine.packed_attention import BOUNDARIES


def vary(*tensors: Tensor) -> None:
    """Tell the compiler that the first size varies from call to call."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def vary_lengths(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Tell the compiler that rows and tokens of the block's inputs vary, and the number of examples in packed rows."""
    given = [value for group in (args, kwargs.values()) for value in group]
    hidden = [x, *(value for value in given if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == x.ndim)]
    sizes = {size for tensor in hidden for size in tensor.shape[:-1]} - {1}
    inside = [part for value in given if isinstance(value, tuple) for part in value]
    for tensor in [x, *given, *inside]:
        if isinstance(tensor, Tensor):
            for dim, size in enumerate(tensor.shape[:-1] if tensor is x or tensor.is_floating_point() else tensor.shape):
                if size in sizes:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
    if isinstance(boundaries := kwargs.get(BOUNDARIES), Tensor):
        vary(boundaries)
