"""The frozen product, one pair of functions for each way a base weight is stored: y = W x + b and dx = Wᵀ dy.

Everything above works with the pair and doesn't know the storage: `base` is the list of a storage's tensors. New storages are new
entries of `BASE_PRODUCTS`, and of `FAST_PRODUCTS` for the passes that may round (see `Routing.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels import four_bit, fp8, onednn


@dataclass(frozen=True)
class BaseProduct:
    """The two products of one storage."""

    forward: Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]
    """(x (…, I), base, bias) → y (…, O)"""
    input_grad: Callable[[Tensor, Sequence[Tensor]], Tensor]
    """(dy (…, O), base) → dx (…, I), in dy's dtype"""


def _linear_forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return F.linear(x, base[0], bias)


def _linear_input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    return dy @ base[0].to(dy.dtype)


def _conv1d_forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    weight_IO = base[0]
    out_shape = x.shape[:-1] + weight_IO.shape[1:]
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight_IO if bias is None else torch.addmm(bias, flat, weight_IO)
    return y.view(out_shape)


def _conv1d_input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    return dy @ base[0].to(dy.dtype).t()


def _fast_linear_forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return onednn.linear(x, base[0], bias)


def _fast_linear_input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    return onednn.input_grad(dy, base[0].to(dy.dtype))


def _fast_conv1d_forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return onednn.linear(x, base[0].t(), bias) if onednn.suits(x, base[0]) else _conv1d_forward(x, base, bias)


def _fast_conv1d_input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    return onednn.linear(dy, base[0].to(dy.dtype))


def _four_bit(quant_type: str) -> BaseProduct:
    return BaseProduct(
        partial(four_bit.forward, quant_type=quant_type),
        partial(four_bit.input_grad, quant_type=quant_type),
    )


BASE_PRODUCTS: Mapping[str, BaseProduct] = {
    "linear": BaseProduct(_linear_forward, _linear_input_grad),
    "conv1d": BaseProduct(_conv1d_forward, _conv1d_input_grad),
    "fp8": BaseProduct(fp8.forward, fp8.input_grad),
    "fp8_emulated": BaseProduct(fp8.emulated_forward, fp8.emulated_input_grad),
}
"""Bit for bit those of the layer that they replace."""

FAST_PRODUCTS: Mapping[str, BaseProduct] = {
    "linear": BaseProduct(_fast_linear_forward, _fast_linear_input_grad),
    "conv1d": BaseProduct(_fast_conv1d_forward, _fast_conv1d_input_grad),
    "fp8": BASE_PRODUCTS["fp8"],
    "fp8_emulated": BASE_PRODUCTS["fp8_emulated"],
    "nf4": _four_bit("nf4"),
    "fp4": _four_bit("fp4"),
}
"""The same to rounding, and faster where this machine has something faster; elsewhere the very same."""
