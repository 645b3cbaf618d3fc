"""A batch's routing as small tensors on the device: what a grouped kernel needs to know which tokens use which slot.

Made once for a batch on the host, shared by every layer, never read back. Shapes are all that compiled code depends on.
Shapes: N entries (one for each token of the batch), S tiles, C chunks, P slot numbers (a slot keeps its number while it lives).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

TILE = 32
"""Tokens that one program of the products with A and B takes, or twice as many where ranks are (kernels/gpu/runs.py)."""
CHUNKS = 8
"""Into at least so many parts the tokens are cut for the gradients of A and B, so that a GPU has enough to do at once."""
SHORTEST_CHUNK, LONGEST_CHUNK = 64, 512


@dataclass(frozen=True)
class RouteTables:
    """Where each slot's tokens are. All int32."""

    order_N: Tensor
    """Token of each entry: those of one slot together in their order, those without a slot behind them."""
    tiles_S4: Tensor
    """(slot, first entry, entries ≤ TILE, 0) of each tile. Slot −1: tokens without a slot."""
    chunks_C4: Tensor
    """(slot, first entry, entries, 1 if it is the slot's only chunk) of each chunk; those that share a slot come first.

    Slot −1: tokens without a slot.
    """
    spans_P2: Tensor
    """(first chunk, chunks) of each slot; chunks = 0 for a slot without tokens."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return self.order_N, self.tiles_S4, self.chunks_C4, self.spans_P2

    @property
    def summed(self) -> int:
        """No fewer than the chunks that share a slot: what a kernel needs room for, as only these are summed afterwards.

        A slot of t tokens that is cut after every L has fewer than 2t/L of them, however many slots there are. From shapes
        alone, so that a size that torch.compile leaves open stays open.
        """
        most = torch.sym_max(2 * CHUNKS, self.order_N.shape[0] * 2 // LONGEST_CHUNK)
        return cast(int, torch.sym_min(self.chunks_C4.shape[0], most))

    def to(self, device: torch.device) -> RouteTables:
        """The same on another device, without waiting for it."""
        return RouteTables(*(send(table, device) for table in self.tensors))


@dataclass(frozen=True)
class DropTables:
    """What a batch's dropout masks are drawn from, besides each layer's own numbers. int32, whose bits are unsigned numbers."""

    steps_P: Tensor
    """Optimizer step of each slot."""
    draws_N2: Tensor
    """(example, place of the token in it) of each entry of `RouteTables.order_N`."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return self.steps_P, self.draws_N2


def drop_tables(
    order_N: Tensor, tokens: int, steps_P: Sequence[int], examples: Tensor, places_UT: Tensor | None = None
) -> DropTables:
    """Tables on order_N's device. `tokens`: of each unit. `examples`: int64, the identity of each unit's example.

    Where units are packed: of each token's, (U, T), with its place in it.
    """
    device = order_N.device
    steps = send(bits32(torch.tensor(steps_P, dtype=torch.int64)), device)
    if places_UT is None:
        unit_N = order_N // tokens
        example_N, place_N = send(examples, device).index_select(0, unit_N), order_N - unit_N * tokens
    else:
        example_N, place_N = (send(each.reshape(-1), device).index_select(0, order_N) for each in (examples, places_UT))
    return DropTables(steps, torch.stack([bits32(example_N), bits32(place_N.long())], 1))


def bits32(numbers: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers as int32, which is what kernels read."""
    return (((numbers & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def send(table: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for a GPU's queue."""
    if device.type != "cuda" or table.device.type != "cpu":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def route_tables(rows: Mapping[int, Sequence[int]], units: int, tokens: int, slots: int) -> RouteTables:
    """Tables on the CPU for a batch of `units` × `tokens` tokens.

    `rows`: slot number to its units, none of which belongs to another slot. `slots`: slot numbers in all.
    """
    routed = {unit for mine in rows.values() for unit in mine}
    total = len(routed) * tokens
    longest = min(LONGEST_CHUNK, max(SHORTEST_CHUNK, _power_of_two(total // CHUNKS)))
    parts: list[Tensor] = []
    tiles: list[tuple[int, int, int, int]] = []
    shared: list[tuple[int, int, int, int]] = []
    alone: list[tuple[int, int, int, int]] = []
    spans = [(0, 0)] * slots
    first = 0
    for slot, mine in {**rows, -1: [unit for unit in range(units) if unit not in routed]}.items():
        parts.append((torch.tensor(sorted(mine), dtype=torch.int32)[:, None] * tokens + torch.arange(tokens)).reshape(-1))
        count = len(mine) * tokens
        tiles += [(slot, first + i, min(TILE, count - i), 0) for i in range(0, count, TILE)]
        pieces = range(0, count, longest)
        chunks = shared if len(pieces) > 1 and slot >= 0 else alone
        if slot >= 0:
            spans[slot] = (len(chunks), len(pieces))
        chunks += [(slot, first + i, min(longest, count - i), int(len(pieces) == 1)) for i in pieces]
        first += count
    spans = [(len(shared) + begin, count) if count == 1 else (begin, count) for begin, count in spans]
    # torch.compile would make a form of its own for one tile or chunk, and be asked for the next when there are two
    tiles_S4, chunks_C4 = (_table(rows, 4, least=2) for rows in (tiles, shared + alone))
    return RouteTables(torch.cat(parts).to(torch.int32), tiles_S4, chunks_C4, _table(spans, 2))


def slots_of_tokens(tables: RouteTables) -> Tensor:
    """int64 slot of each token, −1 for none, (N,), on the tables' device and without waiting for it."""
    order, (slot, first, count, _) = tables.order_N.long(), tables.tiles_S4.long().unbind(1)
    within = torch.arange(TILE, device=order.device)
    tokens = order[(first[:, None] + within).clamp(max=len(order) - 1)]
    tokens = tokens.masked_fill(within >= count[:, None], len(order))  # what a tile lacks goes into a place behind them all
    found = torch.full((len(order) + 1,), -1, device=order.device)
    found[tokens.reshape(-1)] = slot[:, None].expand_as(tokens).reshape(-1)
    return found[:-1]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _table(rows: Sequence[tuple[int, ...]], columns: int, least: int = 1) -> Tensor:
    """The rows as int32, filled up with zeros, for which kernels do nothing: they can't be started for no row."""
    return torch.tensor([*rows, *[(0,) * columns] * (least - len(rows))], dtype=torch.int32)
