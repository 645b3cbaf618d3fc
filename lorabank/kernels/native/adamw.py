"""adamw.c on torch tensors: a step, and the norm of a gradient, over many leaves. Plain twins: optim/rules.py and torch's."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lorabank.kernels.native import library
from lorabank.kernels.native.tensors import takes

_LEAF = struct.Struct("@4Pl")
_NUMBERS = struct.Struct("@8d")


def suits(*lists: Sequence[Tensor]) -> bool:
    """Whether adamw.c takes these leaves, gradients or moments: contiguous fp32 on a CPU."""
    return all(takes(x) and x.is_contiguous() for xs in lists for x in xs) and library.loaded() is not None


def norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm over all gradients together, for what `suits` let through. NaN or inf where one of them has it."""
    functions = library.loaded()
    assert functions is not None  # `suits` asked for it
    sums = (ctypes.c_double * len(gradients))()
    leaves = b"".join(_LEAF.pack(0, g.data_ptr(), 0, 0, g.numel()) for g in gradients)
    functions.squares(leaves, len(gradients), sums, torch.get_num_threads())
    return sum(sums) ** 0.5


def adamw(
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    divisor: float,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """One step of the leaves in place, for what `suits` let through; gradients are divided by `divisor` first."""
    functions = library.loaded()
    assert functions is not None  # `suits` asked for it
    places = b"".join(
        _LEAF.pack(p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel())
        for p, g, m, v in zip(leaves, gradients, first, second, strict=True)
    )
    beta1, beta2 = betas
    numbers = _NUMBERS.pack(
        divisor, learning_rate, weight_decay, beta1, beta2, eps, 1.0 - beta1**step, 1.0 - beta2**step
    )  # fmt: skip
    functions.adamw(places, len(leaves), numbers, torch.get_num_threads())
