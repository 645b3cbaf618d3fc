"""Which classes of base layer can be adapted, and how: one table, `LAYER_KINDS`, and bitsandbytes' 4-bit layers beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lorabank.bank import fp8_linear, linear4bit
from lorabank.bank.fp8_linear import EmulatedFp8Linear, Fp8Linear
from lorabank.kernels.base import BASE_PRODUCTS, FAST_PRODUCTS, BaseProduct


def _weight_alone(parameters: Mapping[str, Any]) -> list[Tensor]:
    return [parameters["weight"]]


def _weight_oi(parameters: Mapping[str, Any], dtype: torch.dtype | None) -> Tensor:
    return parameters["weight"].detach()


def _weight_turned(parameters: Mapping[str, Any], dtype: torch.dtype | None) -> Tensor:
    return parameters["weight"].detach().t()


@dataclass(frozen=True)
class LayerKind:
    """How a class of base layer is adapted."""

    product: BaseProduct | None
    """Bit for bit the layer's own; None where only the layer's own call is that."""
    fast: BaseProduct
    """The same to rounding."""
    features: Callable[[nn.Module], tuple[int, int]]
    """(in, out) of a layer of this class."""
    storage: str
    """The name of its product in kernels/gpu/storage.py."""
    tensors: Callable[[Mapping[str, Any]], list[Tensor]] = _weight_alone
    """A layer's parameters → what these products take as their base."""
    held: bool = False
    """Whether `tensors` is asked once, and again when the layer moves, because its answer takes work."""
    weight_oi: Callable[[Mapping[str, Any], torch.dtype | None], Tensor] = _weight_oi
    """(parameters, dtype) → the weight as (out, in): a view of the stored one, or of a quantised one a copy in `dtype`."""
    quantized: bool = False
    """Whether the weight is stored in fewer than 16 bits, with factors beside it."""
    in_blocks: bool = True
    """Whether a compiled block may compute the product itself, by `storage`."""


def _linear_features(layer: nn.Module) -> tuple[int, int]:
    n_out, n_in = layer.get_parameter("weight").shape
    return n_in, n_out


def _conv1d_features(layer: nn.Module) -> tuple[int, int]:
    n_in, n_out = layer.get_parameter("weight").shape
    return n_in, n_out


def _said_features(layer: nn.Module) -> tuple[int, int]:
    size: Any = layer
    return size.in_features, size.out_features


def _four_bit(name: str) -> LayerKind:
    return LayerKind(
        None,  # bitsandbytes has several kernels and chooses among them
        FAST_PRODUCTS[name],
        _said_features,
        name,
        linear4bit.stored,
        held=True,
        weight_oi=lambda parameters, dtype: linear4bit.dequantized(parameters, dtype or torch.float32),
        quantized=True,
    )


def _fp8(product: str) -> LayerKind:
    return LayerKind(
        BASE_PRODUCTS[product],
        FAST_PRODUCTS[product],
        _said_features,
        "fp8",
        fp8_linear.stored,
        weight_oi=lambda parameters, dtype: fp8_linear.dequantized(parameters, dtype or torch.float32),
        quantized=True,
    )


LAYER_KINDS: Mapping[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(BASE_PRODUCTS["linear"], FAST_PRODUCTS["linear"], _linear_features, "linear"),
    Conv1D: LayerKind(BASE_PRODUCTS["conv1d"], FAST_PRODUCTS["conv1d"], _conv1d_features, "conv1d", weight_oi=_weight_turned),
    Fp8Linear: _fp8("fp8"),
    EmulatedFp8Linear: replace(_fp8("fp8_emulated"), in_blocks=False),
}
FOUR_BIT_KINDS: Mapping[str, LayerKind] = {name: _four_bit(name) for name in ("nf4", "fp4")}
"""By the type that a Linear4bit says it has."""


def layer_kind(layer: nn.Module) -> LayerKind | None:
    """How `layer` is adapted, or None. A subclass with a forward of its own is not its base class."""
    for known, kind in LAYER_KINDS.items():
        weight = layer._parameters.get("weight")
        if isinstance(layer, known) and type(layer).forward is known.forward and weight is not None and not is_lazy(weight):
            return kind
    if linear4bit.is_linear4bit(layer) and linear4bit.obstacle(layer) is None:
        return FOUR_BIT_KINDS.get(linear4bit.quant_type(layer))
    return None
