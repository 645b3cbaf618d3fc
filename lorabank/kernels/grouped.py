"""Products with stacked matrices: each group of x's rows meets a matrix of its own, such as tokens their expert.

Shapes: M rows of x, those of one group together and in the groups' order; E groups; I inputs, O outputs, R ranks. `ends_E`
(int32) is the row behind each group's last; the last of them is M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that torch has one call for."""


def ends_of(groups_M: Tensor, count: int) -> Tensor:
    """`ends_E` of rows whose groups are `groups_M`, in order; without waiting for a GPU."""
    ends = torch.searchsorted(groups_M, torch.arange(count, device=groups_M.device, dtype=groups_M.dtype), right=True)
    return ends.to(torch.int32)


@dataclass(frozen=True)
class SortedPairs:
    """The pairs of T tokens and K experts each, P = T · K, in the order of the experts."""

    experts_P: Tensor
    order_P: Tensor
    """Each pair's number among (token, k)."""
    token_P: Tensor
    back_P: Tensor
    """Where the pairs of the first token are, of the second and so on."""
    ends_E: Tensor
    each: int
    """K"""

    @classmethod
    def of(cls, experts_TK: Tensor, count: int) -> SortedPairs:
        """Sorted, without waiting for a GPU. `count`: E."""
        experts_P, order_P = torch.sort(experts_TK.reshape(-1), stable=True)
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        each = experts_TK.shape[-1]
        return cls(experts_P, order_P, order_P // each, back_P, ends_of(experts_P, count), each)

    def summed(self, value_PF: Tensor) -> Tensor:
        """Σ over each token's pairs, (T, F), always in the same order."""
        return value_PF[self.back_P].view(-1, self.each, value_PF.shape[-1]).sum(1)


def product(x_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its group's matrix, (M, O), in the dtype of both."""
    if x_MI.dtype in _AT_ONCE and _aligned(x_MI) and _aligned(weight_EIO):
        return F.grouped_mm(x_MI, weight_EIO, offs=ends_E)
    out = x_MI.new_empty(len(x_MI), weight_EIO.shape[2])
    begin = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > begin:
            torch.mm(x_MI[begin:end], weight_EIO[group], out=out[begin:end])
        begin = end
    return out


def outer(narrow_MR: Tensor, wide_MF: Tensor, ends_E: Tensor) -> Tensor:
    """Σ over each group's rows of narrowᵀ · wide, (E, R, F)."""
    if narrow_MR.dtype in _AT_ONCE and _aligned(narrow_MR) and _aligned(wide_MF):
        return F.grouped_mm(narrow_MR.t(), wide_MF, offs=ends_E)
    out = narrow_MR.new_zeros(len(ends_E), narrow_MR.shape[1], wide_MF.shape[1])
    begin = 0
    for group, end in enumerate(ends_E.tolist()):
        torch.mm(narrow_MR[begin:end].t(), wide_MF[begin:end], out=out[group])
        begin = end
    return out


def _aligned(value: Tensor) -> bool:
    """Whether rows and matrices begin at multiples of 16 bytes, which the one call asks for."""
    steps = [stride for stride in value.stride() if stride != 1]
    size = value.element_size()
    return value.numel() > 0 and value.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in steps)


class _Frozen(torch.autograd.Function):
    """The product with frozen matrices: dx takes the matrices alone, so x isn't kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ends)
        return product(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, ends = ctx.saved_tensors
        return product(grad_outputs[0].contiguous(), weight.transpose(1, 2), ends), None, None


def frozen_product(x_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`product`, differentiable in x. x is brought into the weight's dtype, as autocast leaves it wider."""
    return _Frozen.apply(x_MI.to(weight_EIO.dtype), weight_EIO, ends_E)
