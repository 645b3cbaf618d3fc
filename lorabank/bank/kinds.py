"""Which classes of base layer can be adapted, and how: one table, `LAYER_KINDS`, and bitsandbytes' 4-bit layers beside it.

Linear layers have fast products of their own (kernels/ops.py). Others say what their map is (kernels/maps.py), and adapters add
to what the layer itself computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.storages import fp8_linear, linear4bit
from lorabank.bank.storages.fp8_linear import EmulatedFp8Linear, Fp8Linear
from lorabank.kernels.base import BASE_PRODUCTS, FAST_PRODUCTS, BaseProduct
from lorabank.kernels.maps import ConvMap, EmbeddingMap, LinearMap, LowRankMap


def _weight_alone(parameters: Mapping[str, Any]) -> list[Tensor]:
    return [parameters["weight"]]


def _weight_oi(parameters: Mapping[str, Any], dtype: torch.dtype | None) -> Tensor:
    return parameters["weight"].detach()


def _weight_turned(parameters: Mapping[str, Any], dtype: torch.dtype | None) -> Tensor:
    return parameters["weight"].detach().t()


def _weight_flat(parameters: Mapping[str, Any], dtype: torch.dtype | None) -> Tensor:
    return parameters["weight"].detach().flatten(1)


def _linear_map(layer: nn.Module) -> LowRankMap:
    return LinearMap()


@dataclass(frozen=True)
class LayerKind:
    """How a class of base layer is adapted."""

    product: BaseProduct | None
    """Bit for bit the layer's own; None where only the layer's own call is that."""
    fast: BaseProduct | None
    """The same to rounding; None for a map that isn't linear over features."""
    features: Callable[[nn.Module], tuple[int, int]]
    """(in, out) of a layer of this class."""
    storage: str
    """The name of its product in kernels/gpu/storage.py, or of what it is."""
    tensors: Callable[[Mapping[str, Any]], list[Tensor]] = _weight_alone
    """A layer's parameters → what these products take as their base."""
    held: bool = False
    """Whether `tensors` is asked once, and again when the layer moves, because its answer takes work."""
    weight_oi: Callable[[Mapping[str, Any], torch.dtype | None], Tensor] = _weight_oi
    """(parameters, dtype) → the weight as (out, in): of a quantised one a copy in `dtype`, else a view where that can be."""
    quantized: bool = False
    """Whether the weight is stored in fewer than 16 bits, with factors beside it."""
    in_blocks: bool = True
    """Whether a compiled block may compute the product itself, by `storage`."""
    low_rank_map: Callable[[nn.Module], LowRankMap] = _linear_map
    """A layer → what a change of it is made of."""
    kernel: Callable[[nn.Module], tuple[int, ...]] = lambda layer: ()
    """A layer → the sizes of its kernel, by which A is shaped in files; none but of a convolution."""
    groups: Callable[[nn.Module], int] = lambda layer: 1
    """A layer → how many parts its channels are split into, none of which sees another's."""

    @property
    def linear(self) -> bool:
        """Whether the layer is one of those that `all-linear` means."""
        return self.fast is not None or self.storage in (EXPERTS, SLICE)


def _linear_features(layer: nn.Module) -> tuple[int, int]:
    n_out, n_in = layer.get_parameter("weight").shape
    return n_in, n_out


def _conv1d_features(layer: nn.Module) -> tuple[int, int]:
    n_in, n_out = layer.get_parameter("weight").shape
    return n_in, n_out


def _conv_features(layer: nn.Module) -> tuple[int, int]:
    weight = layer.get_parameter("weight")
    return weight[0].numel(), weight.shape[0]


def _embedding_features(layer: nn.Module) -> tuple[int, int]:
    ids, features = layer.get_parameter("weight").shape
    return ids, features


def _stack_features(layer: nn.Module) -> tuple[int, int]:
    stack: Any = layer
    return stack.size


def _kernel(layer: nn.Module) -> tuple[int, ...]:
    return tuple(layer.get_parameter("weight").shape[2:])


def _groups(layer: nn.Module) -> int:
    conv: Any = layer
    return conv.groups


def _conv_map(layer: nn.Module) -> LowRankMap:
    conv: Any = layer
    said = isinstance(conv.padding, str)  # "same" may pad one end more than the other
    filled = conv.padding_mode != "zeros"
    return ConvMap(
        kernel=_kernel(layer),
        stride=conv.stride,
        padding=(0,) * len(conv.stride) if said or filled else conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        channels=conv.in_channels,
        pads=tuple(conv._reversed_padding_repeated_twice) if said or filled else (),
        mode=conv.padding_mode if filled else "constant",
    )


def _embedding_map(layer: nn.Module) -> LowRankMap:
    embedding: Any = layer
    return EmbeddingMap(embedding.padding_idx)


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


def _slice_features(layer: nn.Module) -> tuple[int, int]:
    part: Any = layer
    return part.features


CONV, EMBEDDING, EXPERTS, SLICE = "conv", "embedding", "experts", "slice"
"""`LayerKind.storage` of layers that aren't linear over features, and of stacked experts, which are for their own tokens."""
_CONV = LayerKind(
    None,
    None,
    _conv_features,
    CONV,
    weight_oi=_weight_flat,
    in_blocks=False,
    low_rank_map=_conv_map,
    kernel=_kernel,
    groups=_groups,
)
LAYER_KINDS: Mapping[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(BASE_PRODUCTS["linear"], FAST_PRODUCTS["linear"], _linear_features, "linear"),
    Conv1D: LayerKind(
        BASE_PRODUCTS["conv1d"],
        FAST_PRODUCTS["conv1d"],
        _conv1d_features,
        "conv1d",
        weight_oi=_weight_turned,
        low_rank_map=lambda layer: LinearMap(transposed=True),
    ),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.Embedding: LayerKind(
        None, None, _embedding_features, EMBEDDING, weight_oi=_weight_turned, in_blocks=False, low_rank_map=_embedding_map
    ),
    ExpertStack: LayerKind(None, None, _stack_features, EXPERTS, in_blocks=False),
    FusedSlice: LayerKind(None, None, _slice_features, SLICE, in_blocks=False),
    Fp8Linear: _fp8("fp8"),
    EmulatedFp8Linear: replace(_fp8("fp8_emulated"), in_blocks=False),
}
SAME_MAP: Mapping[str, LayerKind] = {
    "transformers.models.falcon.modeling_falcon.FalconLinear": replace(LAYER_KINDS[nn.Linear], product=None),  # adds b later
}
"""Subclasses with a forward of their own that is the same map, by their full names."""
FOUR_BIT_KINDS: Mapping[str, LayerKind] = {name: _four_bit(name) for name in ("nf4", "fp4")}
"""By the type that a Linear4bit says it has."""


def own_way(layer: nn.Module) -> str | None:
    """Why a layer of a class in the table isn't what the table says of it, if it isn't."""
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            return "with max_norm it writes into its weight as it is called"
        return "scale_grad_by_freq weighs its gradient by counts" if layer.scale_grad_by_freq else None
    for known in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, known):
            own = type(layer)._conv_forward is not known._conv_forward or "_conv_forward" in layer.__dict__
            return "it has a convolution of its own" if own else None
    return None


def layer_kind(layer: nn.Module) -> LayerKind | None:
    """How `layer` is adapted, or None. A subclass with a forward of its own is not its base class."""
    for known, kind in LAYER_KINDS.items():
        weight = layer._parameters.get("weight")
        if isinstance(layer, known) and type(layer).forward is known.forward and weight is not None and not is_lazy(weight):
            return None if own_way(layer) else kind
    if (same := SAME_MAP.get(f"{type(layer).__module__}.{type(layer).__qualname__}")) is not None:
        return same
    if linear4bit.is_linear4bit(layer) and linear4bit.obstacle(layer) is None:
        return FOUR_BIT_KINDS.get(linear4bit.quant_type(layer))
    return None
