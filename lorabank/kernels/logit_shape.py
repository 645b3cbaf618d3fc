"""What some models do to the logits that their head gives: scale them, or cap them by a hyperbolic tangent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitShape:
    """logit = cap · tanh(factor / divisor · z / cap), whatever of it there is, step by step in z's dtype as models compute it."""

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The logits, of z's shape and dtype."""
        z = z if self.factor is None else z * self.factor
        z = z if self.divisor is None else z / self.divisor
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    @property
    def slope(self) -> float:
        """Of the straight part: d logit / dz at 0."""
        return (1.0 if self.factor is None else self.factor) / (1.0 if self.divisor is None else self.divisor)

    def bend(self, logits: Tensor) -> Tensor | None:
        """(d logit / dz) / `slope` where the logits are these; None where it is 1."""
        return None if self.cap is None else 1 - (logits / self.cap).square()
