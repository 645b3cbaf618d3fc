"""Adapters of slices of fused layers, such as q in a layer that computes q, k and v: each has ranks of its own.

No other tool's files know slices. What stands there is one pair of matrices for the whole layer, whose ranks are the slices' one
behind the other, all frozen ones at the end, and whose B is zero outside of each slice's own outputs. That is the same change of
the weight. Our own file beside it says which ranks are which slice's, so a slice comes back as it was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.output_slice import OutputSlice, others
from lorabank.formats.slice_vectors import Norms, joined_vectors

Record = dict[str, dict[str, dict[str, Any]]]
"""Layer → slice → what `split` needs to know, as JSON has it."""


def sliced(layers: Mapping[str, AdapterLayer]) -> dict[str, dict[str, AdapterLayer]]:
    """Each fused layer's path → its slices that are adapted, by name; in an order that a file and its copy have in common."""
    found: dict[str, dict[str, AdapterLayer]] = defaultdict(dict)
    for path, layer in sorted(layers.items(), key=_where):
        if layer.outputs is not None:
            parent, _, name = path.rpartition(".")
            found[parent][name] = layer
    return dict(found)


def _where(item: tuple[str, AdapterLayer]) -> tuple[str, int]:
    path, layer = item
    return (path, 0) if layer.outputs is None else (path.rpartition(".")[0], layer.outputs.start)


def without_slices(adapter: Adapter, norms: Norms | None = None) -> Adapter:
    """The same change with one layer for each fused layer, of its slices' ranks in all.

    Where slices are decomposed (DoRA) the layer is, too: its other outputs have their norm as magnitude, which changes nothing.
    `norms`: those of the base at hand; else they are `adapter.base_norms`. Raises AdapterFileError for overlaps, and where there
    are no norms.
    """
    fused = sliced(adapter.layers)
    if not fused:
        return adapter
    layers: dict[str, AdapterLayer] = {}
    for path, layer in adapter.layers.items():
        parent = path.rpartition(".")[0]
        if layer.outputs is None:
            if path in fused:
                raise AdapterFileError(
                    f"layer {path!r} is adapted as a whole and by its slices {', '.join(fused[path])}; expected one of both"
                )
            layers[path] = layer
        elif parent not in layers:
            joined = _joined(parent, fused[parent])
            vectors = joined_vectors(parent, fused[parent], joined.scaling, adapter.base_norms.get(parent), norms)
            layers[parent] = replace(joined, **vectors)
    return replace(adapter, layers=layers, base_norms={})


def record(adapter: Adapter) -> Record:
    """What `split` needs to make slices again of `without_slices(adapter)`'s layers."""
    found: Record = {}
    for parent, parts in sliced(adapter.layers).items():
        common = _common_scaling([layer.scaling for layer in parts.values()])
        found[parent] = {
            name: {
                "rank": layer.rank,
                **({"frozen_rank": layer.frozen_rank} if layer.frozen_rank else {}),
                "scaling": layer.scaling if _is_power_of_two(layer.scaling / common) else common,
                **vars(_outputs(layer)),
            }
            for name, layer in parts.items()
        }
    return found


def split(where: str, adapter: Adapter, recorded: object) -> Adapter:
    """The slices of `without_slices`' layers. Raises AdapterFileError where the record isn't these layers'."""
    if not isinstance(recorded, Mapping) or not recorded:
        return adapter
    layers: dict[str, AdapterLayer] = {}
    norms: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        parts = recorded.get(path)
        if parts is None:
            layers[path] = layer
            continue
        try:
            made = _parts(path, layer, parts)
            layers |= made
            if layer.magnitude is not None and len(rest := others([_outputs(part) for part in made.values()])):
                norms[path] = layer.magnitude[rest]
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
            raise AdapterFileError(
                f"{where}: what it says of the slices of {path!r} isn't this layer's ({error}). Delete it to load the adapter by "
                "adapter_config.json alone."
            ) from error
    return replace(adapter, layers=layers, base_norms=norms)


def _outputs(layer: AdapterLayer) -> OutputSlice:
    assert layer.outputs is not None
    return layer.outputs


def _joined(path: str, parts: Mapping[str, AdapterLayer]) -> AdapterLayer:
    layers, names = list(parts.values()), list(parts)
    slices = [_outputs(layer) for layer in layers]
    for i, mine in enumerate(slices):
        for j, other in enumerate(slices[:i]):
            if mine.total != other.total or mine.overlaps(other):
                raise AdapterFileError(f"layer {path!r}: its slices {names[j]!r} and {names[i]!r} have outputs in common")
    dtype = reduce(torch.promote_types, (layer.B.dtype for layer in layers))
    scaling = _common_scaling([layer.scaling for layer in layers])
    A = layers[0].A.new_empty(sum(layer.rank for layer in layers), layers[0].A.shape[1], dtype=dtype)
    B = A.new_zeros(slices[0].total, len(A))
    places = _places([(layer.rank, layer.frozen_rank) for layer in layers])
    for layer, outputs, ranks in zip(layers, slices, places, strict=True):
        factor = layer.scaling / scaling
        A[ranks] = layer.A.to(dtype)
        B[outputs.rows[:, None], ranks] = (layer.B if factor == 1 else layer.B * factor).to(dtype)
    frozen = sum(layer.frozen_rank for layer in layers) if all(layer.frozen_rank for layer in layers) else 0
    return AdapterLayer(A, B, scaling, attention=layers[0].attention, frozen_rank=frozen)


def _places(ranks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Of slices of these (ranks, frozen ones at their end): where each one's are in the layer, which has all frozen ones last."""
    own = [rank - frozen for rank, frozen in ranks]
    order = torch.arange(sum(rank for rank, _ in ranks))
    trained, behind = order[: sum(own)].split(own), order[sum(own) :].split([frozen for _, frozen in ranks])
    return [torch.cat(each) for each in zip(trained, behind, strict=True)]


def _common_scaling(scalings: list[float]) -> float:
    """One of them, from which most others differ by a power of two, so that B is rounded as little as can be."""
    return max(scalings, key=lambda s: (sum(_is_power_of_two(other / s) for other in scalings), s))


def _is_power_of_two(value: float) -> bool:
    return value > 0 and math.frexp(value)[0] == 0.5


def _power_of_two_at(value: float) -> float | None:
    """The power of two that a quotient is but for rounding: with rsLoRA no alpha may give a layer's scaling to the bit."""
    power = 2.0 ** round(math.log2(value))
    return power if math.isclose(value, power, rel_tol=1e-14) else None


def _parts(path: str, layer: AdapterLayer, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, AdapterLayer]:
    found: dict[str, AdapterLayer] = {}
    ranks = [(said["rank"], said.get("frozen_rank", 0)) for said in recorded.values()]
    numbers = all(type(n) is int for pair in ranks for n in pair) and all(rank > 0 and 2 * n in (0, rank) for rank, n in ranks)
    if not numbers or sum(rank for rank, _ in ranks) != layer.rank:
        raise ValueError(f"ranks and frozen ranks {ranks} of {layer.rank}")
    for (name, said), mine in zip(recorded.items(), _places(ranks), strict=True):
        rank, scaling = len(mine), float(said["scaling"])
        outputs = OutputSlice(**{key: said[key] for key in ("start", "width", "period", "total")})
        if outputs.total != len(layer.B) or not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"{name!r}: rank {rank}, scaling {scaling} and {outputs.total} outputs")
        B = layer.B[outputs.rows[:, None], mine]
        factor = _power_of_two_at(scaling / layer.scaling)
        if factor is None:  # of an attention whose two projections have one scaling in PEFT's file
            factor, scaling = 1.0, layer.scaling
        part = AdapterLayer(layer.A[mine], (B / factor).contiguous(), scaling, outputs=outputs, attention=layer.attention)
        if layer.magnitude is not None:
            part = replace(part, magnitude=layer.magnitude[outputs.rows])
        if layer.lora_bias is not None:
            part = replace(part, lora_bias=layer.lora_bias[outputs.rows] / factor)
        found[f"{path}.{name}"] = part
    inside = sum(int(part.B.count_nonzero()) for part in found.values())
    if inside != int(layer.B.count_nonzero()):
        raise ValueError(f"{inside} of {int(layer.B.count_nonzero())} numbers of B")
    if layer.lora_bias is not None and layer.lora_bias[others([_outputs(part) for part in found.values()])].any():
        raise ValueError("a bias of lora_B at outputs that are no slice's")
    return found
