"""`combine`: several adapters of one base into one adapter, layer by layer, through the table `COMBINERS` (methods.py)."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import MergeError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer
from lorabank.formats.difference import norm
from lorabank.formats.patterns import to_patterns
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import without_slices
from lorabank.merging.arguments import an_adapter
from lorabank.merging.combine_about import agreed, check_labels, warn_of_settings
from lorabank.merging.combine_base import check_one_base
from lorabank.merging.combine_extras import check_method, with_lora_biases
from lorabank.merging.combine_report import CombineReport, LayerError
from lorabank.merging.combine_tied import pairs_of, with_tied
from lorabank.merging.combine_whole import Wholes, task_of, wholes_of
from lorabank.merging.low_rank import factored_norm, stacked
from lorabank.merging.methods import COMBINERS, MAJORITY_SIGNS, PEFT_NAMES, TAKES, CombinedLayer, Options, Term
from lorabank.merging.weights import Weights, as_text, layer_weights

Weighted = Sequence[tuple[Adapter, Weights]]
Busy = Callable[[str, int, int], object]
"""Gets (activity, layers done, layers in all)."""
FROM_COARSE = ("fp4", "nf4", "fp8")
"""Storages of a quantised base, the one that is furthest from it first."""
DENSITY = 0.5
HEADROOM = 1e6
"""How far below the largest number of its dtype a change stays: sums and random projections of it must be finite too."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What came of a combination."""

    adapter: Adapter
    report: CombineReport
    """How far its change is from the weighted sum of the changes."""


def combine(
    parts: Weighted,
    method: str = "exact",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    majority_sign_method: str | None = None,
) -> Adapter:
    """One adapter whose change is the weighted sum of those in `parts`, as `method` defines it; float32 or wider.

    parts: (adapter, weight); a weight is a number, a mapping from parts of the model to numbers, or kohya's list of block weights
    (merging/weights.py). Ranks, targets and kinds of layer may differ; weights may be negative or zero.
    method: `exact` (ranks add up), or one of a limited rank: `svd`, `ties`, `dare`, `dare_ties`, `magnitude_prune` (`COMBINERS`).
    rank: of each layer at most (default: the largest among the adapters there). energy: the share of ‖ΔW‖² to hold, with as few
    ranks as will do, up to `rank` if that is given too. density: the share of each change's numbers that ties, dare and
    magnitude_prune keep (default 0.5). seed: of dare's draws (default 0). majority_sign_method: `total` (default) or `frequency`.
    `combine_and_measure` says how far the result is from the exact sum; here that is `metadata["combine.error"]`.
    Raises FingerprintError for adapters of different bases, MergeError for anything else that doesn't fit.
    """
    options = {"rank": rank, "energy": energy, "density": density, "seed": seed, "majority_sign_method": majority_sign_method}
    return _combined(parts, method, options, lambda activity, done, total: None).adapter


def combine_and_measure(
    parts: Weighted,
    method: str = "exact",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    majority_sign_method: str | None = None,
    names: Sequence[str] | None = None,
    busy: Busy = lambda activity, done, total: None,
) -> Combined:
    """`combine`, with its report. `busy` gets (activity, layers done, in all); `names`: what messages call the adapters."""
    options = {"rank": rank, "energy": energy, "density": density, "seed": seed, "majority_sign_method": majority_sign_method}
    return _combined(parts, method, options, busy, names)


def _combined(
    parts: Weighted,
    method: str,
    given: Mapping[str, int | float | str | None],
    busy: Busy,
    names: Sequence[str] | None = None,
) -> Combined:
    method = _known_method(method)
    told = _check_options(method, given)
    parts = [(without_slices(an_adapter(adapter, "combine"), any_norms), weight) for adapter, weight in parts]
    adapters = [adapter for adapter, _ in parts]
    called = [f"adapter {index}" for index in range(len(parts))] if names is None else [f"adapter {name!r}" for name in names]
    _check_adapters(adapters, called)
    check_method(method, adapters, called)
    weights = [
        layer_weights(weight, adapter.layers, f"the weight of {name}")
        for name, (adapter, weight) in zip(called, parts, strict=True)
    ]
    check_one_base(adapters, called)
    _check_shapes(adapters, called)
    check_labels(parts, called)
    warn_of_settings(parts, called)
    wholes = wholes_of(parts, called)
    _check_tables(wholes, adapters, called)
    seed = int(told.get("seed", 0))
    terms: dict[str, list[Term]] = {}
    for index, (adapter, own) in enumerate(zip(adapters, weights, strict=True)):
        for path, layer in adapter.layers.items():
            known = terms.setdefault(path, [])
            if own[path] != 0:
                _refuse_non_finite(layer, path, called[index])
                _refuse_too_large(layer, path, called[index], own[path], float(told.get("density", 1.0)))
                known.append(Term(layer=layer, weight=own[path], seed=_layer_seed(seed, index, path)))
    layers: dict[str, AdapterLayer] = {}
    errors: dict[str, LayerError] = {}
    for done, (path, found) in enumerate(terms.items()):
        busy("combining", done, len(terms))
        first = next(adapter.layers[path] for adapter in adapters if path in adapter.layers)
        made = _layer(method, found, first, told)
        layers[path] = made.layer
        errors[path] = _error(found, made)
    pairs = pairs_of(adapters, weights)
    layers = with_tied(with_lora_biases(layers, adapters, weights), pairs)
    errors |= {head: errors[embedding] for head, embedding in pairs.items()}
    busy("combining", len(terms), len(terms))
    report = CombineReport(method=method, layers=errors)
    made = _adapter(parts, method, told, layers, wholes, report)
    return Combined(adapter=replace(made, config=replace(made.config, ensure_weight_tying=bool(pairs))), report=report)


def _layer(method: str, terms: Sequence[Term], first: AdapterLayer, told: Mapping[str, int | float | str]) -> CombinedLayer:
    if not terms:  # the layer stays, with a change of exactly zero
        dtype = torch.promote_types(torch.float32, torch.promote_types(first.A.dtype, first.B.dtype))
        zeros = torch.zeros(first.B.shape[0], 1, dtype=dtype, device=first.A.device)
        A = first.A[:1].detach().to(dtype).nan_to_num(0.0, 0.0, 0.0)
        return CombinedLayer(layer=replace(first, A=A, B=zeros, scaling=1.0, frozen_rank=0))
    energy = told.get("energy")
    unlimited = min(terms[0].layer.size)
    usual = max(term.layer.rank for term in terms) if energy is None else unlimited
    options = Options(
        rank=min(int(told.get("rank", usual)), unlimited),
        energy=None if energy is None else float(energy),
        density=float(told.get("density", DENSITY)),
        majority_sign_method=str(told.get("majority_sign_method", MAJORITY_SIGNS[0])),
    )
    return COMBINERS[method](terms, options)


def _error(terms: Sequence[Term], made: CombinedLayer) -> LayerError:
    ranks = tuple(term.layer.rank for term in terms)
    if not terms:
        return LayerError(exact=0.0, difference=0.0, truncated=0.0, ranks=ranks, rank=made.layer.rank)
    factors = [(term.layer.A.flatten(1), term.layer.B, term.weight * term.layer.scaling) for term in terms]
    floor = RESOLVED * math.fsum(norm(term.layer) * abs(term.weight) for term in terms)  # parts that cancel leave rounding alone
    less = (made.layer.A.flatten(1), made.layer.B, -made.layer.scaling)
    return LayerError(
        exact=_above(floor, factored_norm(*stacked(factors))),
        difference=_above(floor, factored_norm(*stacked([*factors, less]))),
        truncated=made.truncated,
        ranks=ranks,
        rank=made.layer.rank,
    )


RESOLVED = 1e-6
"""Share of the parts' ‖ΔW‖ below which a difference is float32's rounding."""


def _above(floor: float, value: float) -> float:
    return 0.0 if value <= floor else value


def _adapter(
    parts: Weighted,
    method: str,
    told: Mapping[str, int | float | str],
    layers: Mapping[str, AdapterLayer],
    wholes: Wholes,
    report: CombineReport,
) -> Adapter:
    adapters = [adapter for adapter, _ in parts]
    rank, rank_pattern = to_patterns({path: layer.rank for path, layer in layers.items()})
    # every layer's scaling is 1, so its alpha is its rank
    # "lora_only" says that no adapted layer's bias is the base's
    every = all(adapter.config.bias == "lora_only" and adapter.biases.keys() <= wholes.biases.keys() for adapter in adapters)
    config = AdapterConfig(
        rank=rank,
        alpha=rank,
        rank_pattern=rank_pattern,
        alpha_pattern=rank_pattern,
        targets=sorted(layers),
        bias="none" if not wholes.biases else "lora_only" if every else "all",
        lora_bias=any(layer.lora_bias is not None for layer in layers.values()),
        trainable_token_indices={path: own.ids for path, own in wholes.token_rows.items()},
        modules_to_save=sorted(wholes.modules) or None,
    )
    return Adapter(
        config=config,
        layers=layers,
        modules=wholes.modules,
        biases=wholes.biases,
        token_rows=wholes.token_rows,
        fingerprint=next((a.fingerprint for a in adapters if a.fingerprint), None),
        base_model=next((a.base_model for a in adapters if a.base_model), None),
        task_type=task_of(parts, wholes.modules),
        metadata={
            **agreed(parts),
            "combine.method": method,
            "combine.weights": " ".join(as_text(weight) for _, weight in parts),
            **{f"combine.{name}": str(value) for name, value in told.items()},
            "combine.error": f"{report.error:.3g}",
            **_base_storage(adapters),
        },
    )


def _known_method(method: str) -> str:
    if method == "linear":
        raise MergeError(
            "combine: PEFT's 'linear' adds the A and the B of adapters, which gives cross terms and not the weighted sum of "
            "their changes. Use 'exact', or 'svd' for a rank as small."
        )
    known = PEFT_NAMES.get(method, method)
    if known not in COMBINERS:
        hint = closest(method, [*COMBINERS, *PEFT_NAMES])
        raise MergeError(f"combine: unknown method {method!r}{hint}; available are {', '.join(COMBINERS)}")
    return known


def _check_options(method: str, given: Mapping[str, int | float | str | None]) -> dict[str, int | float | str]:
    told = {name: value for name, value in given.items() if value is not None}
    for name in told:
        if name not in TAKES[method]:
            takers = ", ".join(other for other in COMBINERS if name in TAKES[other])
            raise MergeError(f"combine: method {method!r} takes no {name}; {takers} do. Leave it out, or choose one of these.")
    for name, fits, expected in (
        ("rank", lambda value: _whole(value) and value >= 1, "a whole number ≥ 1"),
        ("seed", _whole, "a whole number"),
        ("energy", lambda value: _share(value), "a share of ‖ΔW‖², above 0 and at most 1"),
        ("density", lambda value: _share(value), "a share of the numbers, above 0 and at most 1"),
        ("majority_sign_method", lambda value: value in MAJORITY_SIGNS, " or ".join(MAJORITY_SIGNS)),
    ):
        if name in told and not fits(told[name]):
            raise MergeError(f"combine: {name} should be {expected}, got {told[name]!r}")
    return told


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _layer_seed(seed: int, index: int, path: str) -> int:
    """The same draws whatever order the layers come in, and others for each adapter and layer."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}:{path}".encode()).digest()[:8], "big") >> 1


def _base_storage(adapters: Sequence[Adapter]) -> dict[str, str]:
    """How the base was stored while they were trained, which a merge states the error of; of several storages the coarsest."""
    met = {adapter.metadata.get(BASE_STORAGE) for adapter in adapters}
    quantized = [storage for storage in FROM_COARSE if storage in met]
    if len(met) > 1:
        each = ", ".join(adapter.metadata.get(BASE_STORAGE, "unquantised") for adapter in adapters)
        warnings.warn(
            f"combine: the adapters were trained beside a base that was stored in different ways ({each}), so each learned to "
            "make up for other rounding. A merge states the error of the coarsest.",
            stacklevel=5,
        )
    return {BASE_STORAGE: quantized[0]} if quantized else {}


def _check_adapters(adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    if not adapters:
        raise MergeError("combine: no adapters given; expected a list of (adapter, weight)")
    for index, adapter in enumerate(adapters):
        if not adapter.layers:
            raise MergeError(f"combine: {called[index]} has no layers")
        decomposed = next((path for path, layer in adapter.layers.items() if layer.magnitude is not None), None)
        if decomposed is not None:
            raise MergeError(
                f"combine: {called[index]} is decomposed (DoRA; layer {decomposed!r}): what it does to a weight depends on the "
                "weight, so it isn't one of several sums. Merge it into the base first, or route rows to a mixture."
            )


def _check_tables(wholes: Wholes, adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    """Raise MergeError where one adapter has rows of a table and another A and B of it."""
    for path in wholes.token_rows:
        changed = next((name for adapter, name in zip(adapters, called, strict=True) if path in adapter.layers), None)
        if changed is not None:
            owner = next(name for adapter, name in zip(adapters, called, strict=True) if path in adapter.token_rows)
            raise MergeError(
                f"combine: {path!r} has trained token rows in {owner} and A and B in {changed}, which don't go together. Leave "
                "one of them out."
            )


def _refuse_non_finite(layer: AdapterLayer, path: str, name: str) -> None:
    if not (all(bool(tensor.isfinite().all()) for tensor in layer.tensors.values()) and math.isfinite(layer.scaling)):
        raise MergeError(
            f"combine: {name} holds NaN or infinity in layer {path!r}: its training diverged. Use an earlier checkpoint "
            "of it, or give that layer the weight 0."
        )


def _refuse_too_large(layer: AdapterLayer, path: str, name: str, weight: float, density: float) -> None:
    """`density`: dare divides by it."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(layer.A.dtype, layer.B.dtype))
    factor = float(layer.B.abs().max()) * abs(weight * layer.scaling)  # what goes into B must fit by itself
    size = max(norm(layer) * abs(weight), factor) / density
    if not size <= torch.finfo(dtype).max / HEADROOM:
        raise MergeError(
            f"combine: weight {weight:g} of {name} makes its change in layer {path!r} too large for {dtype}: the result "
            "wouldn't be finite. Choose a smaller weight."
        )


def _check_shapes(adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    kinds: dict[str, tuple[int, bool, bool]] = {}
    for index, adapter in enumerate(adapters):
        for path, layer in adapter.layers.items():
            shape = (layer.B.shape[0], *layer.A.shape[1:])
            kind = layer.groups, layer.looks_up, layer.dense
            if kinds.setdefault(path, kind) != kind:
                raise MergeError(f"combine: layer {path!r} isn't of one kind in all adapters; they belong to different bases")
            first, known = shapes.setdefault(path, (index, shape))
            if known != shape:
                raise MergeError(
                    f"combine: layer {path!r} is {known} (out, in) in {called[first]} and {shape} in {called[index]}; "
                    "they belong to different bases"
                )
