"""How far two adapters are apart: ‖ΔW − ΔW'‖ over ‖ΔW‖, layer by layer, without forming a ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measured error, Frobenius norms."""

    total: float
    """‖lost‖ / ‖change‖ over all layers, of scaling · B A."""
    layer: str
    """Where it is largest, relative to the layer's own change; or to its magnitudes, if these lost more."""
    worst: float
    """There."""
    magnitudes: float = 0.0
    """‖m − m'‖ over all layers with DoRA: the rows of their weights have the norms m, so theirs are off by that much."""
    magnitudes_of: float = 0.0
    """‖m‖ of the same."""

    def __str__(self) -> str:
        if not self.worst:
            return "exact"
        dora = (
            f"; ‖m − m'‖ of DoRA's magnitudes {self.magnitudes:.2g} beside ‖m‖ {self.magnitudes_of:.3g}"
            if self.magnitudes
            else ""
        )
        return f"relative error {self.total:.2g} over all layers, at most {self.worst:.2g} ({self.layer}){dora}"


def difference(old: Mapping[str, AdapterLayer], new: Mapping[str, AdapterLayer]) -> Difference:
    """`new` as an approximation of `old`; a layer that `new` lacks counts as lost whole, one that `old` lacks as no change there.

    Raises AdapterFileError where a layer has another shape in each.
    """
    changes, losses, shares = dict[str, float](), dict[str, float](), dict[str, float]()
    sizes, moved = list[float](), list[float]()
    for path in dict.fromkeys((*old, *new)):
        before, after = old.get(path), new.get(path)
        present = before or after
        assert present is not None
        changes[path] = norm(before) if before else 0.0
        losses[path] = _loss(path, before, after) if before and after else norm(present)
        size, off = _magnitudes(before, after)
        sizes.append(size)
        moved.append(off)
        shares[path] = max(_share(losses[path], changes[path]), _share(off, size))
    worst = max(shares, key=lambda path: shares[path])
    return Difference(
        total=_share(math.hypot(*losses.values()), math.hypot(*changes.values())),
        layer=worst,
        worst=shares[worst],
        magnitudes=math.hypot(*moved),
        magnitudes_of=math.hypot(*sizes),
    )


def _share(lost: float, size: float) -> float:
    return lost / size if size else math.inf if lost else 0.0


def norm(layer: AdapterLayer) -> float:
    """‖ΔW‖ of scaling · B A, Frobenius, float64; NaN or infinite where its square is."""
    A, B = layer.A.flatten(1).double(), layer.B.double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(layer.scaling) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else squared


def _loss(path: str, old: AdapterLayer, new: AdapterLayer) -> float:
    if old.B.shape[0] != new.B.shape[0] or old.A.shape[1:] != new.A.shape[1:]:
        raise AdapterFileError(f"layer {path!r} is {old.size[0]} → {old.size[1]} in the one and {new.size[0]} → {new.size[1]}")
    before, after = old.B.double() * old.scaling, new.B.double() * new.scaling
    if torch.equal(old.A.double(), new.A.double()) and torch.equal(before, after):
        return 0.0
    B = torch.cat([before, -after], dim=1)
    A = torch.cat([old.A.flatten(1).double(), new.A.flatten(1).double()])
    return _product_norm(B, A)


def _magnitudes(old: AdapterLayer | None, new: AdapterLayer | None) -> tuple[float, float]:
    """(‖m‖, ‖m − m'‖), infinite where only one of two layers has magnitudes."""
    a, b = (layer.magnitude.double() if layer and layer.magnitude is not None else None for layer in (old, new))
    if a is None and b is None:
        return 0.0, 0.0
    if a is not None and b is not None:
        return float(a.norm()), float((a - b).norm())
    size = float(a.norm()) if a is not None else 0.0
    return size, math.inf if old and new else size


def _product_norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖ of finite factors by the triangular ones of both: of a difference, squares would lose half of the digits."""
    rb = torch.linalg.qr(B, mode="r").R
    ra = torch.linalg.qr(A.T, mode="r").R
    return float((rb @ ra.T).norm())
