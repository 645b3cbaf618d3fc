"""How far a combination's change is from the weighted sum of its parts' changes, as values and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorabank.wording import counted


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer; Frobenius norms."""

    exact: float
    """‖ΔW‖ of the exact sum Σ wᵢ·ΔWᵢ."""
    difference: float
    """‖ΔW − result‖."""
    truncated: float
    """The part that a limited rank took from what the method made; for `svd` the whole difference, for `exact` nothing."""
    ranks: tuple[int, ...]
    """Of the parts with a weight other than 0."""
    rank: int
    """Of the result."""

    @property
    def error(self) -> float:
        """‖ΔW − result‖ / ‖ΔW‖; 0 where both are zero."""
        if self.exact == 0:
            return math.inf if self.difference else 0.0
        return self.difference / self.exact


@dataclass(frozen=True, kw_only=True)
class CombineReport:
    """What a combination kept and changed."""

    method: str
    layers: Mapping[str, LayerError]

    @property
    def error(self) -> float:
        """‖ΔW − result‖ / ‖ΔW‖ over all layers."""
        exact = math.hypot(*(layer.exact for layer in self.layers.values()))
        difference = math.hypot(*(layer.difference for layer in self.layers.values()))
        return difference / exact if exact else math.inf if difference else 0.0

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.layers, key=lambda path: self.layers[path].error)

    @property
    def ranks(self) -> tuple[int, int]:
        """Lowest and highest rank of the result."""
        ranks = [layer.rank for layer in self.layers.values()]
        return min(ranks), max(ranks)

    @property
    def ranks_before(self) -> tuple[int, int]:
        """Lowest and highest sum of the parts' ranks in a layer, which is what `exact` would have."""
        ranks = [sum(layer.ranks) for layer in self.layers.values()]
        return min(ranks), max(ranks)

    def __str__(self) -> str:
        worst = self.layers[self.worst]
        return (
            f"{self.method}: {counted(len(self.layers), 'layer')}, ranks in all {_span(self.ranks_before)} "
            f"before, {_span(self.ranks)} "
            f"after; ‖ΔW − result‖/‖ΔW‖ = {_percent(self.error)}, at most {_percent(worst.error)} ({self.worst})"
        )


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _percent(share: float) -> str:
    """Below what float32 resolves it counts as none."""
    return "0 %" if share < 1e-5 else f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"
