"""`FrozenPart`: A₀ and B₀ of a slot whose change is a difference, scaling · (B A − B₀ A₀). They never train.

The product reads one pair of twice the rank, [A; A₀] and [B; −B₀]: one rounding of the sum, one draw of dropout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorabank.formats.adapter import AdapterLayer


class FrozenPart:
    """Where a slot started in one layer: plain tensors, no parameters, so no optimizer and no `state_dict` sees them."""

    def __init__(self, A_RI: Tensor, B_RO: Tensor) -> None:
        """B_RO: (rank, out), as slots keep it."""
        self.A_RI, self.B_RO = A_RI.detach(), B_RO.detach()

    def to(self, device: torch.device) -> None:
        """Move both."""
        self.A_RI, self.B_RO = self.A_RI.to(device), self.B_RO.to(device)

    def write(self, A_RI: Tensor, B_RO: Tensor) -> None:
        """Copy values in."""
        self.A_RI.copy_(A_RI)
        self.B_RO.copy_(B_RO)

    def joined(self, A_RI: Tensor, B_RO: Tensor) -> tuple[Tensor, Tensor]:
        """[A; A₀] and [B; −B₀], (2 · rank, …). Gradients reach A and B alone."""
        return torch.cat([A_RI, self.A_RI]), torch.cat([B_RO, -self.B_RO])

    def named(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """For checkpoints: `<path>.A` and `<path>.B`."""
        yield f"{path}.A", self.A_RI
        yield f"{path}.B", self.B_RO


def split(layer: AdapterLayer) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """A (rank, in), B (out, rank) that train, and (A₀, B₀), of an adapter's layer; None where all of it trains."""
    A, B, kept = layer.A.flatten(1), layer.B, layer.rank - layer.frozen_rank
    return (A[:kept], B[:, :kept], (A[kept:], -B[:, kept:])) if layer.frozen_rank else (A, B, None)
