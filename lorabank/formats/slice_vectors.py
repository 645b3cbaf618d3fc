"""Magnitudes (DoRA) and lora_B's biases of a fused layer's slices as those of the whole layer, which other forms have.

Outputs that no slice has get a bias of zero, and the norm of the base's weight as magnitude: DoRA gives magnitude · V / ‖V‖, and
V = W where B is zero, so they are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.output_slice import others

Norms = Callable[[str, int], Tensor | None]
"""A layer's path and how many outputs it has → ‖W‖ of each, None where that isn't known."""


def any_norms(path: str, outputs: int) -> Tensor:
    """`Norms` for who looks at sizes, refuses DoRA, or has the weights' own norms later."""
    return torch.ones(outputs)


def joined_vectors(
    path: str, parts: Mapping[str, AdapterLayer], scaling: float, kept: Tensor | None, norms: Norms | None
) -> dict[str, Tensor]:
    """Those of a layer whose slices are `parts`, by `AdapterLayer`'s names; nothing where no slice has any.

    `scaling`: the whole layer's. `kept`: the other outputs' norms, for want of `norms`. Raises AdapterFileError where there are
    none, and where some slices are decomposed and others aren't.
    """
    found: dict[str, Tensor] = {}
    biases = {name: layer.lora_bias for name, layer in parts.items() if layer.lora_bias is not None}
    if biases:
        factors = {name: parts[name].scaling / scaling for name in biases}
        values = {name: bias if factors[name] == 1 else bias * factors[name] for name, bias in biases.items()}
        found["lora_bias"] = _among_all(parts, values)
    magnitudes = {name: layer.magnitude for name, layer in parts.items() if layer.magnitude is not None}
    if magnitudes:
        if plain := [name for name in parts if name not in magnitudes]:
            raise AdapterFileError(
                f"layer {path!r}: its slice {next(iter(magnitudes))!r} is decomposed (DoRA) and {plain[0]!r} isn't, so they "
                "can't be one layer, as in every form but a bank's. Use the adapter in a bank over its base."
            )
        found["magnitude"] = _among_all(parts, magnitudes, _left(path, parts, kept, norms))
    return found


def _left(path: str, parts: Mapping[str, AdapterLayer], kept: Tensor | None, norms: Norms | None) -> Tensor | None:
    """‖W‖ of those outputs that no slice has, None where every output is a slice's."""
    slices = [layer.outputs for layer in parts.values() if layer.outputs is not None]
    rest = others(slices)
    if not len(rest):
        return None
    present = None if norms is None else norms(path, slices[0].total)
    left = kept if present is None else present[rest]
    if left is None or left.shape != rest.shape:
        has = "none" if left is None else len(left)
        raise AdapterFileError(
            f"layer {path!r}: its slices {', '.join(parts)} are decomposed (DoRA), and as one layer that needs the norms of the "
            f"base's other {len(rest)} outputs. The adapter has {has}. Load it into a bank over its base, and use "
            "bank.adapter(name)."
        )
    return left


def _among_all(parts: Mapping[str, AdapterLayer], values: Mapping[str, Tensor], left: Tensor | None = None) -> Tensor:
    """A number for each of the layer's outputs: a slice's own, and `left` (zero for None) where no slice is."""
    slices = {name: layer.outputs for name, layer in parts.items() if layer.outputs is not None}
    given: Sequence[Tensor] = [*values.values(), *([] if left is None else [left])]
    total = next(iter(slices.values())).total
    whole = torch.zeros(total, dtype=reduce(torch.promote_types, (value.dtype for value in given)))
    for name, value in values.items():
        whole[slices[name].rows] = value.to("cpu", whole.dtype)
    if left is not None:
        whole[others(list(slices.values()))] = left.to("cpu", whole.dtype)
    return whole
