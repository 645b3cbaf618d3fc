"""`SlotLoss`: what a pass gave an adapter. On a GPU the pass may still be under way: the first look at a number waits for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class SlotLoss:
    """One adapter's part of a pass."""

    __slots__ = ("_read", "tokens")

    tokens: float
    """Σ of its token weights. Known without waiting."""

    def __init__(self, *, tokens: float, row_losses: Mapping[int, float]) -> None:
        self.tokens = tokens
        self._read: Callable[[], Mapping[int, float]] = lambda: row_losses

    @classmethod
    def later(cls, tokens: float, read: Callable[[], Mapping[int, float]]) -> SlotLoss:
        """A loss whose `row_losses` `read` gives, and waits for; always the same ones."""
        made = cls.__new__(cls)
        made.tokens, made._read = tokens, read
        return made

    @property
    def row_losses(self) -> Mapping[int, float]:
        """Row of the batch (example of a packed batch) to its loss sum."""
        return self._read()

    @property
    def loss_sum(self) -> float:
        """Σ over its rows of the loss (for `nll`: nats)."""
        return sum(self._read().values())

    @property
    def finite(self) -> bool:
        """Whether `loss_sum` is neither NaN nor infinite."""
        return math.isfinite(self.loss_sum)

    @property
    def mean(self) -> float:
        """Loss a token."""
        return self.loss_sum / max(self.tokens, 1e-12)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlotLoss) and (self.tokens, self.row_losses) == (other.tokens, other.row_losses)

    def __hash__(self) -> int:
        return hash((self.tokens, frozenset(self.row_losses.items())))

    def __repr__(self) -> str:
        return f"SlotLoss(tokens={self.tokens!r}, row_losses={dict(self.row_losses)!r})"


def read_later(values_N: Tensor) -> Callable[[], Sequence[float]]:
    """The numbers of a tensor, copied to the host behind what its device has to do; calling waits for them."""
    if values_N.device.type != "cuda":
        numbers = values_N.tolist()
        return lambda: numbers
    host = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
    host.copy_(values_N, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values_N.device))

    @functools.cache
    def read() -> Sequence[float]:
        copied.synchronize()
        return host.tolist()

    return read


def by_slot(names: Sequence[str | None], row_losses_N: Tensor, weights: Sequence[float]) -> dict[str, SlotLoss]:
    """Each adapter's loss. `names`: each row's adapter; `weights`: each row's token weights."""
    read = read_later(row_losses_N)
    found: dict[str, SlotLoss] = {}
    for name in dict.fromkeys(n for n in names if n is not None):
        mine = [i for i, n in enumerate(names) if n == name]
        found[name] = SlotLoss.later(sum(weights[i] for i in mine), functools.partial(_chosen, read, mine))
    return found


def _chosen(read: Callable[[], Sequence[float]], rows: Sequence[int]) -> Mapping[int, float]:
    values = read()
    return {row: values[row] for row in rows}
