"""A change that is far too large for any weight: said when a file is read, before a model shows noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.difference import norm

HUGE = 1e4
"""‖ΔW‖ from which on a layer is named in a warning: weights have norms of 10 to some 1,000."""


def warn_norms(where: str, layers: Mapping[str, AdapterLayer]) -> None:
    """Warn of layers whose change is far larger than any weight of such a model; the picture would be noise."""
    norms = {path: norm(layer) for path, layer in layers.items() if layer.magnitude is None}
    high = {path: value for path, value in norms.items() if not value <= HUGE}
    if high:
        worst = max(high, key=lambda path: high[path] if math.isfinite(high[path]) else math.inf)
        warnings.warn(
            f"{where}: {len(high)} of {len(layers)} layers change their weight by more than it is, {worst!r} by a norm of "
            f"{high[worst]:.3g}: its training diverged, or its alpha is wrong. Use an earlier checkpoint, or a small strength.",
            stacklevel=3,
        )
