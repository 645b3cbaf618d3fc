"""Which tensors the C functions take: numbers in fp32 that lie in this process's memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def takes(x: Tensor) -> bool:
    """Whether x is an ordinary strided fp32 tensor on the CPU, not one that only stands for numbers (meta, fake, negated)."""
    ordinary = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return ordinary and x.dtype == torch.float32 and x.device.type == "cpu" and not x.is_neg()


def plain(x: Tensor) -> Tensor:
    """The same numbers in fp32, in order and as they lie in memory: itself where it is so already."""
    return x.to(torch.float32).resolve_neg().contiguous()
