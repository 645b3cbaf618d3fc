"""bitsandbytes' `Linear4bit`, read as plain tensors: its weight is a Parameter of its own class, with the factors beside it.

transformers makes such layers when it loads a model with a BitsAndBytesConfig, and `lorabank.quantize_base(model, "nf4")` does.
Nothing here imports bitsandbytes: where it isn't loaded, no model has such a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.errors import LorabankError
from lorabank.kernels import four_bit

_MODULE = "bitsandbytes.nn.modules"


def is_linear4bit(layer: nn.Module) -> bool:
    """Whether `layer` is a Linear4bit, and not a subclass with a forward of its own."""
    known = getattr(sys.modules.get(_MODULE), "Linear4bit", None)
    return known is not None and isinstance(layer, known) and type(layer).forward is known.forward


def obstacle(layer: nn.Module) -> str | None:
    """Why a Linear4bit can't be adapted as it is; None when it can."""
    weight = layer._parameters.get("weight")
    state: Any = getattr(weight, "quant_state", None)
    if weight is None or state is None:
        return "Linear4bit is not quantised yet: move the model to its device first"
    said: Any = layer
    size: tuple[int, int] = (said.out_features, said.in_features)
    if tuple(state.shape) != size or (size[0] * size[1]) % 2:
        return f"Linear4bit holds a weight of shape {tuple(state.shape)} for {size[1]} → {size[0]} features"
    if state.nested and state.state2.blocksize != four_bit.FACTORS:
        return (
            f"Linear4bit has its factors quantised in blocks of {state.state2.blocksize}, bitsandbytes' are of {four_bit.FACTORS}"
        )
    return None


def quant_type(layer: nn.Module) -> str:
    """`nf4` or `fp4`."""
    state: Any = getattr(layer._parameters["weight"], "quant_state", None)
    return str(state.quant_type)


def stored(parameters: Mapping[str, Any]) -> list[Tensor]:
    """A layer's parameters → what its product takes as its base (kernels/four_bit.py)."""
    weight = parameters["weight"]
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise LorabankError(
            "a 4-bit layer was repacked for inference on a CPU, which rounds its factors. Load the model again and attach to it "
            "before its first forward pass, or use base_dtype fp8 or bf16 on a CPU."
        )
    packed = weight.detach().as_subclass(Tensor)
    packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
    if not state.nested:
        return [packed, state.absmax.float()]
    inner = state.state2
    return [packed, state.absmax, inner.absmax.float(), inner.code.float(), state.offset.float()]


def dequantized(parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that the layer stands for."""
    state = parameters["weight"].quant_state
    return four_bit.dequantize(stored(parameters), state.quant_type, tuple(state.shape), dtype)
