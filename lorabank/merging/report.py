"""What a merge lost to the rounding of the base's dtype, as values and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorabank.wording import counted

UNRESOLVED = 0.5
"""Share of Δ lost to rounding above which it counts as below what the storage resolves."""


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """One layer's change and the part of it that rounding swallowed; Frobenius norms."""

    weight: float
    """‖W‖ before the merge."""
    delta: float
    """‖ΔW‖ that was asked for, strength included."""
    lost: float
    """‖W + ΔW − what is stored now‖."""
    lost_in_bf16: float | None = None
    """Of a quantised weight: what `lost` would be with the same sum stored in bf16."""
    moved: float = 0.0
    """‖W − Wq‖ for an adapter that was trained on a quantised base: Wq is W as it was stored then."""

    @property
    def share(self) -> float:
        """‖lost Δ‖ / ‖Δ‖; 0 for a layer without change."""
        return self.lost / self.delta if self.delta else 0.0


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge changed and lost."""

    layers: Mapping[str, LayerLoss]
    dtypes: tuple[str, ...]
    """Dtypes of the merged weights, or how they are quantised."""
    extras: Mapping[str, LayerLoss] = field(default_factory=dict)
    """The same of trained biases and token rows, by the name of the model's tensor."""
    trained_in: str | None = None
    """How the base was quantised while the adapter was trained (`fp8`, `nf4`), as far as the adapter says."""

    @property
    def lost_share(self) -> float:
        """‖lost Δ‖ / ‖Δ‖ over all layers, biases and rows."""
        every = [*self.layers.values(), *self.extras.values()]
        delta = math.hypot(*(layer.delta for layer in every))
        return math.hypot(*(layer.lost for layer in every)) / delta if delta else 0.0

    @property
    def lost_share_in_bf16(self) -> float | None:
        """The same with the quantised weights' sums stored in bf16; None where no weight is quantised."""
        if all(layer.lost_in_bf16 is None for layer in self.layers.values()):
            return None
        delta = math.hypot(*(layer.delta for layer in self.layers.values()))
        lost = (layer.lost if layer.lost_in_bf16 is None else layer.lost_in_bf16 for layer in self.layers.values())
        return math.hypot(*lost) / delta if delta else 0.0

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Layers whose ΔW is below the resolution of what stores them: rounding takes more than half of it."""
        return tuple(path for path, layer in self.layers.items() if layer.share > UNRESOLVED)

    @property
    def rounding_error(self) -> float:
        """‖lost‖ / ‖W‖: how far the stored weights are from W + ΔW, for scale beside the weights."""
        weight = math.hypot(*(layer.weight for layer in self.layers.values()))
        return math.hypot(*(layer.lost for layer in self.layers.values())) / weight if weight else 0.0

    @property
    def relative_change(self) -> float:
        """‖Δ‖ / ‖W‖ over the merged layers."""
        weight = math.hypot(*(layer.weight for layer in self.layers.values()))
        return math.hypot(*(layer.delta for layer in self.layers.values())) / weight if weight else 0.0

    @property
    def base_error(self) -> float:
        """‖W − Wq‖ / ‖W‖ over the merged layers: how far the base is from the quantised one beside which the adapter learned."""
        weight = math.hypot(*(layer.weight for layer in self.layers.values()))
        return math.hypot(*(layer.moved for layer in self.layers.values())) / weight if weight else 0.0

    def __str__(self) -> str:
        worst, loss = max(self.layers.items(), key=lambda item: item[1].share)
        trained = (
            f"; trained on a {self.trained_in} base: these weights differ from it by ‖W − Wq‖/‖W‖ = {_percent(self.base_error)}"
            if self.trained_in
            else ""
        )
        in_bf16 = self.lost_share_in_bf16
        more = f" and {len(self.extras)} biases and tables" if self.extras else ""
        off = f"what is stored is off by ‖lost‖/‖W‖ = {_percent(self.rounding_error)}"
        kept = "" if in_bf16 is None else f"; in bf16 it would be {_percent(in_bf16)}; {off}"
        return (
            f"merged {counted(len(self.layers), 'layer')}{more} ({', '.join(self.dtypes)}), ‖Δ‖/‖W‖ = "
            f"{self.relative_change:.2g}; "
            f"lost to rounding ‖lost Δ‖/‖Δ‖ = {_percent(self.lost_share)}, at most {_percent(loss.share)} ({worst}){kept}"
            f"{trained}"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"
