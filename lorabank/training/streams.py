"""`RowStream`: the order in which one adapter sees its rows. A function of its own seed, rows and batch size alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lorabank.data.render import TokenRow

BUCKET_BATCHES = 16
"""Batches whose rows are sorted by length together: little padding, and still another mix each epoch."""


class RowStream:
    """Endless micro-batches of row indices. Its whole state is the number of micro-batches taken so far."""

    def __init__(self, rows: Sequence[TokenRow], batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in one pass over the rows; the last may be smaller."""
        return math.ceil(len(self.rows) / self.batch_size)

    def batch(self, position: int) -> list[int]:
        """Row indices of micro-batch `position` (0-based, over all epochs)."""
        epoch, index = divmod(position, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches[index]

    def _order(self, epoch: int) -> list[list[int]]:
        """Shuffle, sort by length within buckets of batches, shuffle the batches."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        bucket = BUCKET_BATCHES * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            part = sorted(order[start : start + bucket], key=lambda i: len(self.rows[i].input_ids))
            batches.extend(part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
