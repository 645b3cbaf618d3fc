"""Adapters of stacked experts with the grouped kernels: an expert of a slot is a slot to them.

V = slots × experts such slots, whose A and B lie one behind the other in the capacity buffers. Which tokens are whose isn't known
on the host, so the tables are made on the device, of a size that holds whatever comes. The plain twin is `stacked.add_stacked`.
Shapes: T tokens, P pairs of a token and an expert in the order of the experts, I inputs, O outputs, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels.gpu import lora
from lorabank.kernels.grouped import SortedPairs, product
from lorabank.kernels.ops import Guard, check_route, without_autocast
from lorabank.kernels.stacked import StackTables
from lorabank.kernels.tables import CHUNKS, LONGEST_CHUNK, SHORTEST_CHUNK, TILE, RouteTables


@dataclass(frozen=True)
class PairTables:
    """Which pairs are whose, and where a pair's input is."""

    pairs: RouteTables
    """About rows of y, and of an x that has a row a pair."""
    tokens: RouteTables
    """About rows of an x that has a row a token."""


def pair_tables(slots_P: Tensor, token_P: Tensor, count: int) -> PairTables:
    """Tables of pairs by their slot of V = `count`, −1 for none. Nothing waits for the device."""
    pairs, device = len(slots_P), slots_P.device
    keys = slots_P.masked_fill(slots_P < 0, count)  # torch.where would bring the number from the host, which captures refuse
    ordered, order = torch.sort(keys, stable=True)
    wanted = torch.arange(count, device=device, dtype=ordered.dtype)
    ends = torch.searchsorted(ordered, wanted, right=True)
    begins = torch.searchsorted(ordered, wanted)
    counts = ends - begins
    longest = min(LONGEST_CHUNK, max(SHORTEST_CHUNK, 1 << max(0, pairs // CHUNKS - 1).bit_length()))
    tiles, _ = _pieces(begins, counts, TILE, pairs, torch.arange(count, device=device))
    alone = (counts <= longest).to(torch.int8)
    chunks, spans = _pieces(begins, counts, longest, pairs, torch.argsort(alone, stable=True))
    made = RouteTables(order.to(torch.int32), tiles, chunks, spans)
    return PairTables(made, RouteTables(token_P[order].to(torch.int32), tiles, chunks, spans))


def _pieces(begins_V: Tensor, counts_V: Tensor, size: int, pairs: int, turn_V: Tensor) -> tuple[Tensor, Tensor]:
    """((slot, first entry, entries, 1 if it is the slot's only one) of each piece; (first piece, pieces) of each slot), int32.

    `turn_V`: the slots in the order in which their pieces come. Rows that are left over are zeros.
    """
    pieces_V = (counts_V + size - 1) // size
    ends_V = pieces_V[turn_V].cumsum(0)
    at = torch.arange(pairs // size + min(len(counts_V), pairs) + 1, device=begins_V.device)
    place = torch.searchsorted(ends_V, at, right=True).clamp_(max=len(counts_V) - 1)
    slot = turn_V[place]
    within = at - (ends_V[place] - pieces_V[slot])
    first = begins_V[slot] + within * size
    entries = (counts_V[slot] - within * size).clamp(max=size)
    rows = torch.stack([slot, first, entries, (pieces_V[slot] == 1).long()], 1) * (at < ends_V[-1])[:, None]
    starts = torch.empty_like(ends_V)
    starts[turn_V] = ends_V - pieces_V[turn_V]
    return rows.to(torch.int32), torch.stack([starts, pieces_V], 1).to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class TableGuard(Guard):
    """What backward is guarded by, and the tables of the pass."""

    sorted: SortedPairs
    pairs: PairTables
    stack: StackTables
    drops: Sequence[Tensor]
    by_token: bool
    """Whether x has a row a token, not a pair."""

    @property
    def of_x(self) -> RouteTables:
        """About rows of x."""
        return self.pairs.tokens if self.by_token else self.pairs.pairs


class _StackedLinear(torch.autograd.Function):
    """x · W of each pair's expert, + bias, + the slots' changes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_EIO: Tensor, bias_PO: Tensor | None, A: Tensor, B: Tensor, guard: TableGuard, *leaves: Tensor
    ) -> Tensor:
        stack, pairs = guard.stack, guard.pairs
        x = x.to(weight_EIO.dtype).contiguous()
        y_PO = product(x[guard.sorted.token_P] if guard.by_token else x, weight_EIO, guard.sorted.ends_E)
        if bias_PO is not None:
            y_PO += bias_PO
        with without_autocast(x):
            xa_PW = lora.shrink(x, A, guard.of_x, stack.ranks_V2, stack.scaling_V, stack.width, guard.drops, entries=len(y_PO))
            lora.expand_(y_PO, xa_PW, B, pairs.pairs, stack.ranks_V2)
        ctx.guard = guard
        ctx.save_for_backward(guard.route, x, xa_PW, weight_EIO, A, B)
        return y_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        guard: TableGuard = ctx.guard
        route, x, xa_PW, weight_EIO, A, B = ctx.saved_tensors
        check_route(guard, route)
        stack, pairs = guard.stack, guard.pairs
        dy_PO = grad_outputs[0].to(x.dtype).contiguous()
        with without_autocast(x):
            (dB,), (dxa_PW,) = lora.outer_and_shrink([xa_PW], [dy_PO], [B], pairs.pairs, [stack.ranks_V2], [stack.scaling_V])
            # a row a pair: a token that has an expert twice would look like tokens that follow each other
            x_PI = x[guard.sorted.token_P] if guard.by_token else x
            dA = lora.outer(dxa_PW, x_PI, A, pairs.pairs, stack.ranks_V2, guard.drops)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = product(dy_PO, weight_EIO.transpose(1, 2), guard.sorted.ends_E)
                lora.expand_(dx, dxa_PW, A, pairs.pairs, stack.ranks_V2, guard.drops)
                dx = guard.sorted.summed(dx) if guard.by_token else dx
        gradients = [grad[begin:end] for begin, end in stack.ranges for grad in (dA, dB)]
        return dx, None, dy_PO if ctx.needs_input_grad[2] else None, None, None, None, *gradients


def stacked_linear(
    x: Tensor,
    weight_EIO: Tensor,
    bias_PO: Tensor | None,
    buffers: tuple[Tensor, Tensor],
    guard: TableGuard,
    leaves: Sequence[Tensor],
) -> Tensor:
    """(P, O), differentiable in x and in the slots' leaves (A and B of each in turn, in the order of the tables' ranges).

    x: (T, I), or (P, I) where it isn't `by_token`.
    """
    return _StackedLinear.apply(x, weight_EIO, bias_PO, *buffers, guard, *leaves)
