"""`bank.summary()`: what is adapted, what isn't, and how many parameters each adapter has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorabank.wording import counted


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """One adapter of a bank."""

    rank: int
    alpha: float
    parameters: int
    layers: int
    kinds: Mapping[str, int]
    """Last part of the adapted layers' paths to their number."""
    saved: tuple[str, ...] = ()
    """Paths of the modules that it trains in full."""


@dataclass(frozen=True, kw_only=True)
class BankSummary:
    """A bank at one moment. Printing it gives a table."""

    base_parameters: int
    adapters: Mapping[str, AdapterSummary]
    adapted_layers: int
    unadapted: Mapping[str, int]
    """Kinds of linear layer that no adapter changes, to their number."""
    unsupported: Mapping[str, str]
    """Linear maps that can't be adapted yet, by path, with the reason."""

    def __str__(self) -> str:
        lines = [f"base model: {self.base_parameters:,} frozen parameters, {counted(self.adapted_layers, 'layer')} wrapped"]
        for name, a in self.adapters.items():
            share = 100 * a.parameters / max(1, self.base_parameters)
            kinds = ", ".join(f"{kind} × {count}" for kind, count in a.kinds.items())
            whole = f"; in full: {', '.join(a.saved)}" if a.saved else ""
            size = f"{a.parameters:,} parameters ({share:.2f} % of the base) in {counted(a.layers, 'layer')}"
            lines.append(f"  {name}: rank {a.rank}, alpha {a.alpha:g}, {size}: {kinds}{whole}")
        if not self.adapters:
            lines.append("  no adapters yet")
        if self.unadapted:
            lines.append("  not adapted: " + ", ".join(f"{kind} × {count}" for kind, count in self.unadapted.items()))
        for path, why in list(self.unsupported.items())[:5]:
            lines.append(f"  can't be adapted: {path}: {why}")
        if len(self.unsupported) > 5:
            lines.append(f"  … and {len(self.unsupported) - 5} more that can't be adapted")
        return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def count_kinds(paths: list[str]) -> dict[str, int]:
    """How often each last path component occurs, in order of first appearance."""
    return dict(Counter(path.rpartition(".")[2] for path in paths))
