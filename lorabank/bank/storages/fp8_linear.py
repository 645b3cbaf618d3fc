"""`Fp8Linear`: a frozen linear layer whose weight is kept in fp8, and its twin that emulates fp8 units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.kernels import fp8

STORED = ("weight", "weight_scale", "weight_t", "weight_t_scale")
"""The parameters, in the order in which the product takes them."""


class Fp8Linear(nn.Module):
    """y = W x + b with W as e4m3 and one scale a row, once for each direction (see kernels/fp8.py). Two bytes a weight in all.

    Its parameters are plain and frozen, so they shard, move and save as any others; a change of dtype changes the bias alone.
    """

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None) -> None:
        """Quantises `weight_OI`, which isn't kept."""
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        for name, value in zip(STORED, fp8.quantize_weight(weight_OI.detach()), strict=True):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", bias)

    weight: nn.Parameter
    """e4m3 (O, I)"""
    weight_scale: nn.Parameter
    """fp32 (O)"""
    weight_t: nn.Parameter
    """e4m3 (I, O): rounded by its own rows, so not exactly the turned `weight`"""
    weight_t_scale: nn.Parameter
    """fp32 (I)"""
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)"""
        return fp8.product(x, stored(self._parameters), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        """Moves everything; casts only the bias: numbers in fp8 mean nothing in another dtype without their scales."""

        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if value is self.bias or moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(move, recurse)
        return self


class EmulatedFp8Linear(Fp8Linear):
    """The same layer with the arithmetic of fp8 units in plain torch: slow, for measuring on a CPU what a GPU would train."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)"""
        return fp8.product(x, stored(self._parameters), self.bias, emulated=True)


def stored(parameters: Mapping[str, Any]) -> list[Tensor]:
    """A layer's parameters → what its product takes as its base."""
    return [parameters[name] for name in STORED]


def dequantized(parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that the forward product stands for."""
    return fp8.dequantize_rows(parameters["weight"], parameters["weight_scale"], dtype)
