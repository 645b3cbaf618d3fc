"""The products of an experts module with its slots' changes: on plain torch, and with the grouped kernels where they run.

A token reaches its experts and its adapters' slots in one grouped product each. Shapes: T tokens, P pairs of a token and an
expert in the order of the experts, E experts, V = slots × experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorabank.bank.routing import Routing
from lorabank.bank.stacked.expert_routes import SlotPairs, SlotTokens, pairs_of
from lorabank.bank.stacked.stack_carrier import StackCarrier, runs_kernels
from lorabank.errors import LorabankError
from lorabank.kernels.grouped import SortedPairs, frozen_product
from lorabank.kernels.segments import DropoutDraw
from lorabank.kernels.stacked import StackedPlan, StackedSegment, add_stacked


class Products(Protocol):
    """A stack's product with its slots' changes."""

    def __call__(self, carrier: StackCarrier, x: Tensor, *, by_token: bool) -> Tensor:
        """(P, O) of x (T, I), or (P, I) where it isn't `by_token`."""
        ...


def _bias(carrier: StackCarrier, pairs: SortedPairs) -> Tensor | None:
    bias_EO = carrier.base._parameters.get(f"{carrier.stack.name}_bias")
    return None if bias_EO is None else bias_EO[pairs.experts_P]


def _check_frozen(carrier: StackCarrier) -> None:
    if carrier.stack.get_parameter("weight").requires_grad:
        raise LorabankError(f"experts {carrier.path!r}: their base weight is trained as well, which isn't supported; freeze it")


def plain_products(used: Sequence[SlotTokens], pairs: SortedPairs, routing: Routing, tokens: int) -> Products:
    """On plain torch, for any route."""
    taken: list[SlotPairs] = []

    def product(carrier: StackCarrier, x: Tensor, *, by_token: bool) -> Tensor:
        _check_frozen(carrier)
        if not taken:
            taken.extend(pairs_of(part, pairs, carrier.stack.count, tokens) for part in used)
        x_PI = x[pairs.token_P] if by_token else x
        y_PO, bias = frozen_product(x_PI, carrier.stack.weight_EIO, pairs.ends_E), _bias(carrier, pairs)
        y_PO = y_PO if bias is None else y_PO + bias
        segments = tuple(_segment(carrier, part) for part in taken if part.slot in carrier.slots)
        if not segments:
            return y_PO
        router = carrier.router
        plan = StackedPlan(
            segments=segments,
            route=routing.token,
            route_id=routing.id,
            layer=carrier.path,
            structure=router.structure,
            structure_now=lambda: router.structure,
        )
        return add_stacked(y_PO, x_PI.to(y_PO.dtype), plan)

    return product


def _segment(carrier: StackCarrier, part: SlotPairs) -> StackedSegment:
    slot, count = carrier.slots[part.slot], carrier.stack.count
    draw = None
    if slot.dropout > 0 and part.examples_M is not None:
        draw = DropoutDraw(
            probability=slot.dropout,
            seed=slot.seed ^ carrier.path_seed,
            step=part.step,
            examples_U=part.examples_M,
            places_UT=part.places_M1,
        )
    return StackedSegment(
        pairs_M=part.pairs_M,
        ends_E=part.ends_E,
        A_ERI=slot.tensors.A_RI.view(count, slot.rank, -1),
        B_ERO=slot.tensors.B_RO.view(count, slot.rank, -1),
        scaling=slot.scaling,
        weights_M=part.weights_M,
        dropout=draw,
    )


def table_products(
    carriers: Collection[StackCarrier], pairs: SortedPairs, routing: Routing, units: int, x_TH: Tensor
) -> Products | None:
    """With the grouped kernels; None where they don't run, or a token has several slots or weights."""
    first = next(iter(carriers))
    if not runs_kernels(first.stack.get_parameter("weight")):
        return None
    router, count, tokens = first.router, first.stack.count, len(x_TH)
    size = units, tokens // units, router.table_slots, x_TH.device
    routes = routing.tables(*size[:2], router.slot_numbers, *size[2:])
    if routes is None:
        return None
    from lorabank.kernels.gpu.stacked import TableGuard, pair_tables, stacked_linear

    here = {name for carrier in carriers for name in carrier.slots}
    names = sorted(routing.names & here, key=lambda name: router.slot_numbers[name])
    dropping = routing.dropout is not None and any(
        c.slots[name].dropout > 0 for c in carriers for name in names if name in c.slots
    )
    of_first = first.tables(names, dropping=dropping)
    place_P = of_first.places_S[routing.slots_of_tokens(size, routes)[pairs.token_P]]
    slots_P = (place_P * count + pairs.experts_P).masked_fill(place_P < 0, -1)
    tables = pair_tables(slots_P, pairs.token_P, len(names) * count)
    drops = routing.drops(*size[:2], router.slot_numbers, *size[2:]) if dropping else None
    draws: list[Tensor] = []
    if drops is not None:
        draws_T2 = torch.empty_like(drops.draws_N2)
        draws_T2[routes.order_N.long()] = drops.draws_N2
        draws = [drops.steps_P[of_first.numbers_V], draws_T2[tables.tokens.order_N.long()]]

    def product(carrier: StackCarrier, x: Tensor, *, by_token: bool) -> Tensor:
        _check_frozen(carrier)
        stack = carrier.tables(names, dropping=dropping)
        guard = TableGuard(
            route=routing.token,
            route_id=routing.id,
            layer=carrier.path,
            structure=router.structure,
            structure_now=lambda: router.structure,
            sorted=pairs,
            pairs=tables,
            stack=stack,
            drops=[*draws, stack.odds_V2] if draws else [],
            by_token=by_token,
        )
        leaves = [leaf for name in names if name in carrier.slots for leaf in carrier.slots[name].tensors.by_role.values()]
        return stacked_linear(x, carrier.stack.weight_EIO, _bias(carrier, pairs), carrier.store.buffers, guard, leaves)

    return product
