"""`combine`: several adapters of one base into one adapter, through the table `COMBINERS`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import FingerprintError, MergeError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer
from lorabank.formats.patterns import to_patterns

Weighted = Sequence[tuple[Adapter, float]]
FROM_COARSE = ("fp4", "nf4", "fp8")
"""Storages of a quantised base, the one that is furthest from it first."""
LATER_METHODS = ("svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def exact(parts: Weighted) -> dict[str, AdapterLayer]:
    """ΔW = Σ wᵢ·ΔWᵢ without cross terms: ranks are concatenated, and each wᵢ·scalingᵢ goes into B (the scaling is then 1)."""
    terms: dict[str, list[tuple[AdapterLayer, float]]] = {}
    for adapter, weight in parts:
        for path, layer in adapter.layers.items():
            terms.setdefault(path, []).append((layer, weight))
    return {path: _concatenated(found) for path, found in terms.items()}


COMBINERS: Mapping[str, Callable[[Weighted], dict[str, AdapterLayer]]] = {"exact": exact}
"""Method → function from (adapter, weight) pairs, already checked to be of one base and of equal shapes, to layers."""


def combine(parts: Weighted, method: str = "exact") -> Adapter:
    """One adapter whose change is the weighted sum of those in `parts`, as `method` defines it; float32 or wider.

    Ranks and targets may differ; weights may be negative or zero. Raises FingerprintError for adapters of different bases,
    MergeError for anything else that doesn't fit.
    """
    if method not in COMBINERS:
        if method in LATER_METHODS:
            raise MergeError(f"combine: method {method!r} is not available yet; available are {', '.join(COMBINERS)}")
        hint = closest(method, [*COMBINERS, *LATER_METHODS])
        raise MergeError(f"combine: unknown method {method!r}{hint}; available are {', '.join(COMBINERS)}")
    parts = list(parts)
    if not parts:
        raise MergeError("combine: no adapters given; expected a list of (adapter, weight)")
    for index, (adapter, weight) in enumerate(parts):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MergeError(f"combine: the weight of adapter {index} should be a number, got {weight!r}")
        if not adapter.layers:
            raise MergeError(f"combine: adapter {index} has no layers")
        decomposed = next((path for path, layer in adapter.layers.items() if layer.magnitude is not None), None)
        if decomposed is not None:
            raise MergeError(
                f"combine: adapter {index} is decomposed (DoRA; layer {decomposed!r}): what it does to a weight depends on the "
                "weight, so it isn't one of several sums. Merge it into the base first, or route rows to a mixture."
            )
    adapters = [adapter for adapter, _ in parts]
    _check_one_base(adapters)
    _check_shapes(adapters)
    layers = COMBINERS[method](parts)
    rank, rank_pattern = to_patterns({path: layer.rank for path, layer in layers.items()})
    # every layer's scaling is 1, so its alpha is its rank
    config = AdapterConfig(rank=rank, alpha=rank, rank_pattern=rank_pattern, alpha_pattern=rank_pattern, targets=sorted(layers))
    return Adapter(
        config=config,
        layers=layers,
        fingerprint=next((a.fingerprint for a in adapters if a.fingerprint), None),
        base_model=next((a.base_model for a in adapters if a.base_model), None),
        task_type=next((a.task_type for a in adapters if a.task_type), None),
        metadata={
            "combine.method": method,
            "combine.weights": " ".join(f"{weight:g}" for _, weight in parts),
            **_base_storage(adapters),
        },
    )


def _base_storage(adapters: Sequence[Adapter]) -> dict[str, str]:
    """How the base was stored while they were trained, which a merge states the error of; of several storages the coarsest."""
    met = {adapter.metadata.get(BASE_STORAGE) for adapter in adapters}
    quantized = [storage for storage in FROM_COARSE if storage in met]
    if len(met) > 1:
        each = ", ".join(adapter.metadata.get(BASE_STORAGE, "unquantised") for adapter in adapters)
        warnings.warn(
            f"combine: the adapters were trained beside a base that was stored in different ways ({each}), so each learned to "
            "make up for other rounding. A merge states the error of the coarsest.",
            stacklevel=3,
        )
    return {BASE_STORAGE: quantized[0]} if quantized else {}


def _concatenated(terms: list[tuple[AdapterLayer, float]]) -> AdapterLayer:
    wanted = [layer.A.dtype for layer, _ in terms] + [layer.B.dtype for layer, _ in terms]
    dtype = reduce(torch.promote_types, wanted, torch.float32)  # a 16-bit B would round the weights that go into it
    device = terms[0][0].A.device
    first = terms[0][0]
    used = [(layer, weight) for layer, weight in terms if weight != 0]
    if not used:  # the layer stays, with a change of exactly zero
        zeros = torch.zeros(first.B.shape[0], 1, dtype=dtype, device=device)
        return replace(first, A=first.A[:1].to(dtype).clone(), B=zeros, scaling=1.0)

    def wide(value: Tensor) -> Tensor:
        return value.detach().to(device, dtype)

    A = torch.cat([wide(layer.A) for layer, _ in used])
    B = torch.cat([wide(layer.B) * (weight * layer.scaling) for layer, weight in used], dim=1)
    return replace(first, A=A, B=B, scaling=1.0)


def _check_one_base(adapters: Sequence[Adapter]) -> None:
    known = [(index, adapter.fingerprint) for index, adapter in enumerate(adapters) if adapter.fingerprint]
    for index, fingerprint in known[1:]:
        difference = known[0][1].compare(fingerprint)
        if difference:
            bases = f"{adapters[known[0][0]].base_model or 'unnamed'} and {adapters[index].base_model or 'unnamed'}"
            raise FingerprintError(
                f"combine: adapters {known[0][0]} and {index} were trained on different bases ({bases}): {difference}. "
                "Only adapters of one base can be combined."
            )


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    kinds: dict[str, tuple[int, bool]] = {}
    for index, adapter in enumerate(adapters):
        for path, layer in adapter.layers.items():
            shape = (layer.B.shape[0], *layer.A.shape[1:])
            if kinds.setdefault(path, (layer.groups, layer.looks_up)) != (layer.groups, layer.looks_up):
                raise MergeError(f"combine: layer {path!r} isn't of one kind in all adapters; they belong to different bases")
            first, known = shapes.setdefault(path, (index, shape))
            if known != shape:
                raise MergeError(
                    f"combine: layer {path!r} is {known} (out, in) in adapter {first} and {shape} in adapter {index}; "
                    "they belong to different bases"
                )
