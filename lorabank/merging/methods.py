"""The table `COMBINERS`: how the changes of several adapters in one layer become one change of low rank.

`exact` and `svd` work on the factors. `ties`, `dare` and `magnitude_prune` act on the numbers of ΔW, as their papers have it, and
what comes out has full rank: it is truncated, which is part of their error. A weight counts as part of the change: wᵢ·ΔWᵢ is what
is pruned, elected and added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lorabank.formats.adapter import AdapterLayer
from lorabank.merging.low_rank import Truncated, stacked, truncate, truncate_factors

MAJORITY_SIGNS = ("total", "frequency")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One adapter's part in one layer."""

    layer: AdapterLayer
    weight: float
    """Not zero."""
    seed: int
    """Of the draws of `dare`: another for each adapter and layer."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What methods may be told; each takes those of `TAKES`."""

    rank: int
    """Ranks that the layer gets at most."""
    energy: float | None = None
    """Share of ‖ΔW‖² to hold with as few ranks as will do."""
    density: float = 1.0
    """Share of the numbers of each ΔWᵢ that is kept."""
    majority_sign_method: str = "total"
    """`total`: the sign of Σ wᵢ·ΔWᵢ wins; `frequency`: that of most terms."""


@dataclass(frozen=True, kw_only=True)
class CombinedLayer:
    """What a method gives."""

    layer: AdapterLayer
    """With scaling 1."""
    truncated: float = 0.0
    """‖M − B A‖ of the matrix M that the method made of the terms."""


Combiner = Callable[[Sequence[Term], Options], CombinedLayer]
"""(terms of one layer, at least one; options) → the layer. The terms are of one kind and shape, and finite."""


def exact(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """ΔW = Σ wᵢ·ΔWᵢ without cross terms: ranks are concatenated, and each wᵢ·scalingᵢ goes into B (the scaling is then 1)."""
    dtype, first = _dtype(terms), terms[0].layer
    A = torch.cat([_wide(term.layer.A, first, dtype) for term in terms])
    B = torch.cat([_wide(term.layer.B, first, dtype) * (term.weight * term.layer.scaling) for term in terms], dim=1)
    return CombinedLayer(layer=replace(first, A=A, B=B, scaling=1.0, frozen_rank=0))


def svd(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """The best approximation of Σ wᵢ·ΔWᵢ of a rank (Eckart and Young), from the factors: ΔW itself is never made."""
    A, B = stacked([(term.layer.A.flatten(1), term.layer.B, term.weight * term.layer.scaling) for term in terms])
    return _factored(terms, truncate_factors(A, B, rank=options.rank, energy=options.energy))


def magnitude_prune(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """Σ of the largest numbers of each wᵢ·ΔWᵢ, the others being zero; then truncated."""
    return _pruned(terms, options, _largest)


def dare(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """Σ of a random part of the numbers of each wᵢ·ΔWᵢ, over its share (DARE, arXiv:2311.03099); then truncated."""
    return _pruned(terms, options, _drawn)


def ties(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """The largest numbers of each wᵢ·ΔWᵢ; at each place a sign wins, and those of that sign are averaged
    (TIES, arXiv:2306.01708: trim, elect sign, disjoint mean); then truncated."""
    return _elected(terms, options, _largest)


def dare_ties(terms: Sequence[Term], options: Options) -> CombinedLayer:
    """`ties` with the random choice of `dare` in place of the largest."""
    return _elected(terms, options, _drawn)


COMBINERS: Mapping[str, Combiner] = {
    "exact": exact,
    "svd": svd,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
"""Method → function from the terms of one layer to that layer."""
_TRUNCATED = ("rank", "energy")
TAKES: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "svd": _TRUNCATED,
    "ties": (*_TRUNCATED, "density", "majority_sign_method"),
    "dare": (*_TRUNCATED, "density", "seed"),
    "dare_ties": (*_TRUNCATED, "density", "seed", "majority_sign_method"),
    "magnitude_prune": (*_TRUNCATED, "density"),
}
"""Method → the options that it heeds."""
PEFT_NAMES: Mapping[str, str] = {
    "cat": "exact",
    "ties_svd": "ties",
    "dare_linear": "dare",
    "dare_linear_svd": "dare",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
}
"""PEFT's `combination_type` → ours. Its `ties`, `dare_…` and `magnitude_prune` without `_svd` act on A and B by themselves."""

Choice = Callable[[Tensor, Term, float], Tensor]
"""(wᵢ·ΔWᵢ, its term, density) → the same with numbers set to zero."""


def _pruned(terms: Sequence[Term], options: Options, choose: Choice) -> CombinedLayer:
    matrix = reduce(torch.add, (choose(_delta(term, terms), term, options.density) for term in terms))
    return _factored(terms, truncate(matrix, rank=options.rank, energy=options.energy))


def _elected(terms: Sequence[Term], options: Options, choose: Choice) -> CombinedLayer:
    chosen = [choose(_delta(term, terms), term, options.density) for term in terms]
    votes = chosen if options.majority_sign_method == "total" else [values.sign() for values in chosen]
    positive = reduce(torch.add, votes) >= 0  # a tie is positive, as in PEFT
    total, count = torch.zeros_like(chosen[0]), torch.zeros_like(chosen[0])
    for values in chosen:
        agrees = (values != 0) & ((values > 0) == positive)
        total += values * agrees
        count += agrees
    return _factored(terms, truncate(total / count.clamp(min=1), rank=options.rank, energy=options.energy))


def _largest(delta_OI: Tensor, term: Term, density: float) -> Tensor:
    size = delta_OI.abs()
    kept = max(1, int(density * size.numel()))
    border = size.flatten().kthvalue(size.numel() - kept + 1).values
    return delta_OI * (size >= border)


def _drawn(delta_OI: Tensor, term: Term, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(term.seed)  # on the CPU, so that every device draws the same
    return delta_OI * (torch.rand(delta_OI.shape, generator=generator) < density).to(delta_OI.device) / density


def _delta(term: Term, terms: Sequence[Term]) -> Tensor:
    """wᵢ·ΔWᵢ as (out, in); of a convolution all of a kernel's numbers count as in."""
    dtype, first = _dtype(terms), terms[0].layer
    return _wide(term.layer.B, first, dtype) @ _wide(term.layer.A.flatten(1), first, dtype) * (term.weight * term.layer.scaling)


def _factored(terms: Sequence[Term], found: Truncated) -> CombinedLayer:
    first, dtype = terms[0].layer, _dtype(terms)
    A = found.A.to(dtype).view(-1, *first.A.shape[1:])
    return CombinedLayer(layer=replace(first, A=A, B=found.B.to(dtype), scaling=1.0, frozen_rank=0), truncated=found.dropped)


def _dtype(terms: Sequence[Term]) -> torch.dtype:
    wanted = [value.dtype for term in terms for value in (term.layer.A, term.layer.B)]
    return reduce(torch.promote_types, wanted, torch.float32)  # a 16-bit B would round the weights that go into it


def _wide(value: Tensor, first: AdapterLayer, dtype: torch.dtype) -> Tensor:
    return value.detach().to(first.A.device, dtype)
