"""What an adapter does to each weight, in numbers that need neither the base nor ΔW: norms from A and B alone.

BA has the singular values of √(BᵀB) √(AAᵀ), a matrix of the rank's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lorabank.formats.adapter import Adapter, AdapterLayer

HUGE = 10.0
"""A change is called huge when it alone makes outputs this many times as large as its inputs (root mean squares)."""
OUTLIER_DEVIATIONS = 3.5
"""Robust deviations (1.4826 · median absolute deviation) of log ‖ΔW‖ from its kind's median (Iglewicz and Hoaglin, 1993)."""
OUTLIER_FACTOR = 2.0
"""And at least this many times the median, or one part in as many."""
OUTLIER_LAYERS = 5
"""Kinds with fewer layers have no outliers."""
RULE = f"over {OUTLIER_DEVIATIONS:g} robust deviations of log ‖ΔW‖ from the median of its kind, and {OUTLIER_FACTOR:g} × it"


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """One layer's change in numbers."""

    path: str
    kind: str
    """The last part of its path that isn't a number."""
    fan_in: int
    fan_out: int
    rank: int
    parameters: int
    scaling: float
    norm: float
    """‖ΔW‖ (Frobenius); without DoRA's magnitudes. NaN where a number isn't finite."""
    spectral: float
    """‖ΔW‖₂, the largest singular value."""
    effective_rank: float
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007): how many directions it really uses."""
    finite: bool
    decomposed: bool

    @property
    def zero(self) -> bool:
        """Whether the layer changes nothing."""
        return self.finite and self.norm == 0 and not self.decomposed

    @property
    def gain(self) -> float:
        """Size of the outputs' change for inputs of size 1 in random directions: ‖ΔW‖/√out."""
        return self.norm / math.sqrt(self.fan_out)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What stands out in an adapter."""

    broken: tuple[str, ...]
    """Layers with NaN or infinity."""
    zero: tuple[str, ...]
    huge: tuple[LayerMeasure, ...]
    outliers: Mapping[str, float]
    """Path → ‖ΔW‖ as a multiple of the median of its kind."""


def measure(path: str, layer: AdapterLayer) -> LayerMeasure:
    """The numbers of one layer. In float64; costs r² · (in + out)."""
    finite = all(bool(value.isfinite().all()) for value in layer.tensors.values())
    values = singular_values(layer) if finite else torch.full((1,), math.nan, dtype=torch.float64)
    norm = float(values.norm())
    shares = values[values > 0] / values.sum()
    fan_in, fan_out = layer.size
    return LayerMeasure(
        path=path,
        kind=kind_of(path),
        fan_in=fan_in,
        fan_out=fan_out,
        rank=layer.rank,
        parameters=sum(value.numel() for value in layer.tensors.values()),
        scaling=layer.scaling,
        norm=norm,
        spectral=float(values.max()),
        effective_rank=float((-(shares * shares.log()).sum()).exp()) if norm > 0 else (norm if math.isnan(norm) else 0.0),
        finite=finite,
        decomposed=layer.magnitude is not None,
    )


def singular_values(layer: AdapterLayer) -> Tensor:
    """The largest `rank` singular values of ΔW = scaling · BA, float64, largest first."""
    A, B = layer.A.detach().flatten(1).double(), layer.B.detach().double()
    return abs(layer.scaling) * torch.linalg.svdvals(_root(B.T @ B) @ _root(A @ A.T))


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kind_of(path: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`; numbers at the end (an expert's) don't count."""
    parts = path.split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), path)


def measures(adapter: Adapter) -> list[LayerMeasure]:
    """Of all layers, sorted by path, block 2 before block 10."""
    return [measure(path, adapter.layers[path]) for path in sorted(adapter.layers, key=_natural)]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def findings(found: Sequence[LayerMeasure]) -> Findings:
    """What stands out among the layers."""
    outliers: dict[str, float] = {}
    for kind in dict.fromkeys(layer.kind for layer in found):
        outliers |= _outliers([layer for layer in found if layer.kind == kind and layer.norm > 0])
    return Findings(
        broken=tuple(layer.path for layer in found if not layer.finite),
        zero=tuple(layer.path for layer in found if layer.zero),
        huge=tuple(layer for layer in found if layer.gain > HUGE),
        outliers=outliers,
    )


def _outliers(layers: Sequence[LayerMeasure]) -> dict[str, float]:
    if len(layers) < OUTLIER_LAYERS:
        return {}
    logs = [math.log(layer.norm) for layer in layers]
    middle = median(logs)
    spread = 1.4826 * median(abs(value - middle) for value in logs)
    limit = max(OUTLIER_DEVIATIONS * spread, math.log(OUTLIER_FACTOR))
    return {
        layer.path: math.exp(value - middle) for layer, value in zip(layers, logs, strict=True) if abs(value - middle) > limit
    }
