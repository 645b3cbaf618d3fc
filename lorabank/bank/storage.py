"""Where a layer's slots keep their tensors: one capacity buffer a role, each slot a range of ranks in it.

A slot's leaf Parameters are views of its range, so an optimizer holds them like any others while a kernel sees one buffer.
Growth re-points the leaves; their identity, and with it their optimizer state, stays.
Shapes: A (capacity, I) and B (capacity, O), the slot's range [start, stop) along the first dimension of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorabank.errors import LorabankError

GRANULE = 16
"""Capacity grows in steps of at least this many ranks."""


@dataclass(frozen=True)
class SlotTensors:
    """One slot's part of a layer."""

    start: int
    stop: int
    A_RI: nn.Parameter
    B_RO: nn.Parameter
    magnitude_O: nn.Parameter | None = None
    """Of a decomposed slot: a tensor of its own."""
    extras: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """What it has beside those, by role (bank/extra/extras.py): tensors of their own."""

    @property
    def by_role(self) -> dict[str, nn.Parameter]:
        """The leaves, `A` and `B` first; a slot without ranks has neither."""
        found = {} if self.start == self.stop else {"A": self.A_RI, "B": self.B_RO}
        return {**found, **({} if self.magnitude_O is None else {"magnitude": self.magnitude_O}), **self.extras}


class RankStore:
    """The capacity buffers of one layer and the slots in them."""

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self.in_features, self.out_features, self.device = in_features, out_features, device
        self.slots: dict[str, SlotTensors] = {}
        self._A_RI = torch.zeros(0, in_features, device=device)
        self._B_RO = torch.zeros(0, out_features, device=device)

    @property
    def capacity(self) -> int:
        """Ranks that the buffers hold, in use or spare."""
        return self._A_RI.shape[0]

    @property
    def ranks_in_use(self) -> int:
        """Ranks that belong to a slot."""
        return sum(slot.stop - slot.start for slot in self.slots.values())

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The whole of A and B, spare ranks included."""
        return self._A_RI, self._B_RO

    def allocate(
        self, name: str, rank: int, *, decomposed: bool = False, extras: Mapping[str, Sequence[int]] | None = None
    ) -> SlotTensors:
        """Reserve `rank` rows for `name`; their content is left as it is. `decomposed`: and a magnitude for each output.

        `extras`: shapes of further leaves by role.
        """
        start = self._find(rank)
        if start + rank > self.capacity:
            self._grow(start + rank)
        stop = start + rank
        magnitude = nn.Parameter(torch.ones(self.out_features, device=self.device)) if decomposed else None
        A, B = nn.Parameter(self._A_RI[start:stop].data), nn.Parameter(self._B_RO[start:stop].data)
        more = {role: nn.Parameter(torch.zeros(*shape, device=self.device)) for role, shape in (extras or {}).items()}
        slot = SlotTensors(start, stop, A, B, magnitude, more)
        self.slots[name] = slot
        return slot

    def free(self, name: str) -> None:
        """Give the slot's ranks back; they are reused by a later slot."""
        del self.slots[name]

    def to(self, device: torch.device) -> None:
        """Move the buffers and re-point the leaves. Adapters keep their dtype: it doesn't follow the base's."""
        if device != self.device:
            self._check_move(device)
            self._replace(self._A_RI.to(device), self._B_RO.to(device))
            self.device = device

    def _check_move(self, device: torch.device) -> None:
        """Leaves keep their identity, and torch allows that between ordinary devices only."""
        try:
            nn.Parameter(torch.empty(0, device=self.device)).data = torch.empty(0, device=device)
        except RuntimeError as error:
            raise LorabankError(
                f"adapters can't be moved from {self.device} to {device}. Save them (bank.adapter(name).save(...)) and detach "
                "the bank before such a move."
            ) from error

    def _find(self, rank: int) -> int:
        """First gap of at least `rank` rows (after the last slot there is always one)."""
        start = 0
        # a slot without ranks, of token rows or a bias alone, takes no room and may stand where another one begins
        for slot in sorted((slot for slot in self.slots.values() if slot.start < slot.stop), key=lambda s: s.start):
            if slot.start - start >= rank:
                return start
            start = slot.stop
        return start

    def _grow(self, needed: int) -> None:
        # doubling keeps the number of re-pointings logarithmic when hundreds of adapters are added one by one
        target = max(needed, min(2 * self.capacity, self.capacity + 256))
        capacity = -(-target // GRANULE) * GRANULE
        a = torch.zeros(capacity, self.in_features, device=self.device)
        b = torch.zeros(capacity, self.out_features, device=self.device)
        a[: self.capacity] = self._A_RI
        b[: self.capacity] = self._B_RO
        self._replace(a, b)

    def _replace(self, a: Tensor, b: Tensor) -> None:
        self._A_RI, self._B_RO = a, b
        for slot in self.slots.values():
            places = {"A": a[slot.start : slot.stop], "B": b[slot.start : slot.stop]}
            for role, leaf in slot.by_role.items():
                leaf.data = places[role] if role in places else leaf.data.to(a.device)
                if leaf.grad is not None and leaf.grad.device != a.device:
                    leaf.grad = leaf.grad.to(a.device)
