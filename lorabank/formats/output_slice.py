"""`OutputSlice`: which outputs of a fused layer are one of the projections that stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OutputSlice:
    """`width` outputs from `start` on, in each `period` of a layer's `total` ones.

    Projections that lie one behind the other have period = total. Where heads alternate (GPT-NeoX has q, k, v of the first head,
    then those of the second) the period is one head's.
    """

    start: int
    width: int
    period: int
    total: int

    def __post_init__(self) -> None:
        ends = self.start >= 0 and self.width > 0 and self.start + self.width <= self.period
        if not ends or self.period > self.total or self.total % self.period:
            raise ValueError(
                f"a slice of {self.width} outputs from {self.start} on in each {self.period} of {self.total} doesn't exist"
            )

    @property
    def count(self) -> int:
        """How many outputs it has."""
        return self.total // self.period * self.width

    @property
    def rows(self) -> Tensor:
        """int64: their numbers, in order."""
        return torch.arange(self.total).view(-1, self.period)[:, self.start : self.start + self.width].flatten()

    def overlaps(self, other: OutputSlice) -> bool:
        """Whether an output is in both."""
        return bool(torch.isin(self.rows, other.rows).any())


def others(slices: Sequence[OutputSlice]) -> Tensor:
    """int64: the outputs of a layer that are in none of these slices of it, in order."""
    left = torch.ones(slices[0].total, dtype=torch.bool)
    for part in slices:
        left[part.rows] = False
    return left.nonzero().flatten()
