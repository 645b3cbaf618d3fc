"""Loss scales for a base in fp16, one an adapter: small gradients would vanish in fp16's five bits of exponent.

Each adapter's losses are multiplied by its own scale before backward and its gradients divided by it right after, in fp32; so
whoever reads gradients sees plain sums. Where one overflows, that adapter's step is skipped (the optimizer leaves a gradient
that isn't finite alone) and its scale halved; after many passes without, the scale is doubled. Scales are powers of two, so
neither rounds. (Micikevicius et al., Mixed Precision Training, arXiv:1710.03740, section 3.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorabank.engine.results import read_later

FIRST = 2.0**7
"""Losses here are sums over tokens, not means, so less is needed than the 2¹⁶ that is usual for means."""
SMALLEST, LARGEST = 2.0**-8, 2.0**16
GOOD_PASSES = 1000
"""Passes without an overflow after which a scale is doubled."""


@dataclass
class LossScale:
    """One adapter's."""

    value: float = FIRST
    good: int = 0
    """Passes since it last changed."""

    def saw(self, finite: bool) -> None:
        """Take a pass into account."""
        self.good += 1
        if not finite:
            self.value, self.good = max(self.value / 2, SMALLEST / 2), 0
        elif self.good >= GOOD_PASSES:
            self.value, self.good = min(self.value * 2, LARGEST), 0


class LossScales:
    """The scales of all adapters. Whether a pass overflowed is looked at when the next one begins: nothing waits for it."""

    def __init__(self) -> None:
        self._scales: dict[str, LossScale] = {}
        self._unseen: list[tuple[Sequence[str], Callable[[], Sequence[float]]]] = []

    def __getitem__(self, name: str) -> LossScale:
        """An adapter's scale, with every pass so far taken into account."""
        for names, read in self._unseen:
            for one, largest in zip(names, read(), strict=True):
                self._scales.setdefault(one, LossScale()).saw(largest < float("inf"))  # False for NaN too
        self._unseen = []
        return self._scales.setdefault(name, LossScale())

    def exhausted(self, name: str) -> bool:
        """Whether even the smallest scale overflows: then it isn't the scale."""
        return self[name].value < SMALLEST

    def divide(self, leaves: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Divide the gradients of adapters' leaves, fresh from backward, by their scales, and note which overflowed."""
        largest = []
        for name, mine in leaves.items():
            gradients = [leaf.grad for leaf in mine if leaf.grad is not None]
            if not gradients:
                largest.append(torch.zeros(()))
                continue
            largest.append(torch.nn.utils.get_total_norm(gradients, float("inf")))
            torch._foreach_mul_(gradients, 1 / self[name].value)  # pyright: ignore[reportPrivateImportUsage]
        if leaves:
            device = next((norm.device for norm in largest if norm.device.type != "cpu"), torch.device("cpu"))
            self._unseen.append((list(leaves), read_later(torch.stack([norm.to(device) for norm in largest]))))

    def state(self) -> dict[str, tuple[float, int]]:
        """Adapter to (scale, passes since it changed): what a resumed run needs."""
        return {name: (self[name].value, self[name].good) for name in sorted(self._scales)}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what `state` gave."""
        self._unseen = []
        self._scales = {name: LossScale(float(value), int(good)) for name, (value, good) in state.items()}
