"""`RowStream`: the order in which one adapter sees its rows. A function of its own seed, rows, batch size and packing alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from lorabank.training.data_sets import TaskRow
from lorabank.training.packing import pack_rows

BUCKET_BATCHES = 16
"""Batches whose rows are sorted by length, or packed, together: little padding, and still another mix each epoch."""


class RowStream:
    """Endless micro-batches of row indices. Its whole state is the number of micro-batches taken so far."""

    def __init__(self, rows: Sequence[TaskRow], batch_size: int, seed: int, *, pack_to: int | None = None) -> None:
        """`pack_to`: tokens of a packed row, of which a micro-batch then holds `batch_size`; None: a row an example."""
        self.rows, self.batch_size, self.seed, self.pack_to = rows, batch_size, seed, pack_to
        self._epoch = -1
        self._batches: list[list[list[int]]] = []
        self._counts: list[int] = []
        """Micro-batches of each epoch that was looked at so far; packed, they differ from epoch to epoch."""

    @property
    def most_examples(self) -> int:
        """No micro-batch holds more."""
        return self.batch_size * (self.pack_to or 1)

    def draws(self, position: int) -> list[int]:
        """A seed for each row of micro-batch `position`: of this stream's seed, the micro-batch and the row alone."""
        start = self.seed * 1_000_003 + position
        return [_mixed(start * 1_000_003 + i) for i in self.batch(position)]

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a batch may hold."""
        return max(self.pack_to or 0, *(row.size for row in self.rows))

    def batch(self, position: int) -> list[int]:
        """Row indices of micro-batch `position` (0-based, over all epochs)."""
        return [i for row in self.packed(position) for i in row]

    def packed(self, position: int) -> list[list[int]]:
        """The same by row of the batch: without packing each holds one."""
        epoch, index = self._place(position)
        return self._of(epoch)[index]

    def passes(self, position: int) -> float:
        """Passes over the rows after `position` micro-batches."""
        epoch, index = self._place(position)
        return epoch + index / self._count(epoch)

    def micro_batches(self, epochs: float) -> int:
        """Micro-batches of so many passes over the rows; the last of a pass may be smaller."""
        if self.pack_to is None:
            return math.ceil(epochs * self._count(0))
        whole = math.floor(epochs)
        part = epochs - whole
        return sum(map(self._count, range(whole))) + (math.ceil(part * self._count(whole)) if part else 0)

    def packed_rows(self) -> tuple[int, float]:
        """Packed rows of the first pass over the rows, and the share of their tokens that is used."""
        count = sum(len(batch) for batch in self._of(0))
        used = sum(row.size for row in self.rows)
        return count, used / (count * self.longest)

    def _place(self, position: int) -> tuple[int, int]:
        """Epoch and micro-batch in it."""
        if self.pack_to is None:
            return divmod(position, self._count(0))
        epoch = 0
        while position >= (count := self._count(epoch)):
            epoch, position = epoch + 1, position - count
        return epoch, position

    def _count(self, epoch: int) -> int:
        if self.pack_to is None:
            return math.ceil(len(self.rows) / self.batch_size)
        for missing in range(len(self._counts), epoch + 1):
            self._counts.append(len(self._order(missing)))
        return self._counts[epoch]

    def _of(self, epoch: int) -> list[list[list[int]]]:
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches

    def _order(self, epoch: int) -> list[list[list[int]]]:
        """Shuffle, sort by length within buckets of batches (or pack them), shuffle the batches (or packed rows)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        if self.pack_to is not None:
            rows = [[part[i] for i in row] for part in self._parts(order) for row in pack_rows(self._lengths(part), self.pack_to)]
            mixed = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            return [mixed[i : i + self.batch_size] for i in range(0, len(mixed), self.batch_size)]
        bucket = BUCKET_BATCHES * self.batch_size
        batches: list[list[list[int]]] = []
        for start in range(0, len(order), bucket):
            part = sorted(order[start : start + bucket], key=lambda i: self.rows[i].size)
            batches.extend([[i] for i in part[at : at + self.batch_size]] for at in range(0, len(part), self.batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _parts(self, order: Sequence[int]) -> Iterator[list[int]]:
        """The order cut where the tokens so far fill the packed rows of a bucket."""
        full = BUCKET_BATCHES * self.batch_size * (self.pack_to or 1)
        part: list[int] = []
        tokens = 0
        for i in order:
            part.append(i)
            tokens += self.rows[i].size
            if tokens >= full:
                yield part
                part, tokens = [], 0
        if part:
            yield part

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        return [self.rows[i].size for i in rows]


def _mixed(number: int) -> int:
    """A seed in [0, 2⁶³) whose bits all depend on all of the number's (splitmix64), since neighbouring seeds may draw alike."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return (number ^ (number >> 31)) >> 1
