"""The frozen product, one pair of functions for each way a base weight is stored: y = W x + b and dx = Wᵀ dy.

Everything above works with the pair and doesn't know the storage. New storages are new entries of `BASE_PRODUCTS`, and of
`FAST_PRODUCTS` for the passes that may round (see `Routing.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels import onednn


@dataclass(frozen=True)
class BaseProduct:
    """The two products of one storage."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x (…, I), weight, bias) → y (…, O)"""
    input_grad: Callable[[Tensor, Tensor], Tensor]
    """(dy (…, O), weight) → dx (…, I)"""
    weight_oi: Callable[[Tensor], Tensor]
    """The stored weight as a view or copy of shape (O, I)."""


def _linear_input_grad(dy: Tensor, weight_OI: Tensor) -> Tensor:
    return dy @ weight_OI


def _conv1d_forward(x: Tensor, weight_IO: Tensor, bias: Tensor | None) -> Tensor:
    out_shape = x.shape[:-1] + weight_IO.shape[1:]
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight_IO if bias is None else torch.addmm(bias, flat, weight_IO)
    return y.view(out_shape)


def _conv1d_fast_forward(x: Tensor, weight_IO: Tensor, bias: Tensor | None) -> Tensor:
    return onednn.linear(x, weight_IO.t(), bias) if onednn.suits(x, weight_IO) else _conv1d_forward(x, weight_IO, bias)


BASE_PRODUCTS: Mapping[str, BaseProduct] = {
    "linear": BaseProduct(F.linear, _linear_input_grad, lambda weight: weight),
    "conv1d": BaseProduct(_conv1d_forward, lambda dy, weight_IO: dy @ weight_IO.t(), lambda weight: weight.t()),
}
"""Bit for bit those of the layer that they replace."""

FAST_PRODUCTS: Mapping[str, BaseProduct] = {
    "linear": BaseProduct(onednn.linear, onednn.input_grad, lambda weight: weight),
    "conv1d": BaseProduct(_conv1d_fast_forward, lambda dy, weight_IO: onednn.linear(dy, weight_IO), lambda weight: weight.t()),
}
"""The same to rounding, and faster where this machine has something faster; elsewhere the very same."""
