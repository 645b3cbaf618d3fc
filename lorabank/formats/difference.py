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
    """A measured error, Frobenius norms; that of DoRA's magnitudes counts as a part of their layer's."""

    total: float
    """‖lost‖ / ‖change‖ over all layers."""
    layer: str
    """Where it is largest, relative to the layer's own change."""
    worst: float
    """There."""

    def __str__(self) -> str:
        if not self.worst:
            return "exact"
        return f"relative error {self.total:.2g} over all layers, at most {self.worst:.2g} ({self.layer})"


def difference(old: Mapping[str, AdapterLayer], new: Mapping[str, AdapterLayer]) -> Difference:
    """`new` as an approximation of `old`; a layer that `new` lacks counts as lost whole, one that `old` lacks as no change there.

    Raises AdapterFileError where a layer has another shape in each.
    """
    changes, losses = dict[str, float](), dict[str, float]()
    for path in dict.fromkeys((*old, *new)):
        before, after = old.get(path), new.get(path)
        present = before or after
        assert present is not None
        changes[path] = norm(before) if before else 0.0
        losses[path] = _loss(path, before, after) if before and after else norm(present)
    shares = {path: losses[path] / changes[path] if changes[path] else math.inf if losses[path] else 0.0 for path in losses}
    worst = max(shares, key=lambda path: shares[path])
    size = math.hypot(*changes.values())
    total = math.hypot(*losses.values())
    return Difference(total=total / size if size else math.inf if total else 0.0, layer=worst, worst=shares[worst])


def norm(layer: AdapterLayer) -> float:
    """‖ΔW‖ of scaling · B A, Frobenius, float64; NaN or infinite where its square is."""
    A, B = layer.A.flatten(1).double(), layer.B.double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(layer.scaling) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else squared


def _loss(path: str, old: AdapterLayer, new: AdapterLayer) -> float:
    if old.B.shape[0] != new.B.shape[0] or old.A.shape[1:] != new.A.shape[1:]:
        raise AdapterFileError(f"layer {path!r} is {old.size[0]} → {old.size[1]} in the one and {new.size[0]} → {new.size[1]}")
    scale = 0.0
    if (old.magnitude is None) != (new.magnitude is None):
        scale = math.inf
    elif old.magnitude is not None and new.magnitude is not None:
        a, b = old.magnitude.double(), new.magnitude.double()
        scale = float((a - b).norm() / a.norm()) * norm(old) if float(a.norm()) else float(b.norm())
    before, after = old.B.double() * old.scaling, new.B.double() * new.scaling
    if torch.equal(old.A.double(), new.A.double()) and torch.equal(before, after):
        return scale
    B = torch.cat([before, -after], dim=1)
    A = torch.cat([old.A.flatten(1).double(), new.A.flatten(1).double()])
    return math.hypot(_product_norm(B, A), scale)


def _product_norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖ of finite factors by the triangular ones of both: of a difference, squares would lose half of the digits."""
    rb = torch.linalg.qr(B, mode="r").R
    ra = torch.linalg.qr(A.T, mode="r").R
    return float((rb @ ra.T).norm())
