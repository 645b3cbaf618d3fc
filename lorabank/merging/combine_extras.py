"""What adapters have beside A and B, as the methods of a combination take it. lora_B's biases add up as changes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.extras import extras_by_path


def check_method(method: str, adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    """Raise MergeError for a method that isn't a weighted sum, and adapters that change more than weights.

    called: what messages call the adapters.
    """
    for name, adapter in zip(called, adapters, strict=True):
        whole = dict.fromkeys(adapter.modules, "every parameter is trained")
        for path, what in {**extras_by_path(adapter), **whole}.items():
            if method != "exact":
                raise MergeError(
                    f"combine: of {path!r} in {name} {what}, and {method!r} is about changes of weights. Use 'exact'."
                )


def with_lora_biases(
    layers: Mapping[str, AdapterLayer], adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]]
) -> dict[str, AdapterLayer]:
    """The combined layers with Σ wᵢ · scalingᵢ · bᵢ, in all that can have it where any adapter has one."""
    having = any(layer.lora_bias is not None for adapter in adapters for layer in adapter.layers.values())
    made: dict[str, AdapterLayer] = {}
    for path, layer in layers.items():
        total = layer.B.new_zeros(len(layer.B)) if having and not (layer.looks_up or layer.stack or layer.attention) else None
        for adapter, own in zip(adapters, weights, strict=True):
            low = adapter.layers[path].lora_bias if path in adapter.layers else None
            if low is not None and total is not None and own[path] != 0:
                total = total + own[path] * adapter.layers[path].scaling * low.to(total.device, total.dtype)
        made[path] = replace(layer, lora_bias=total)
    return made
