"""The products of an experts module with its slots' changes: on plain torch, and with the grouped kernels where they run.

A token reaches its experts and its adapters' slots in one grouped product each. Shapes: T tokens, P pairs of a token and an
expert in the order of the experts, E experts, V = slots × experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorabank.bank.expert_routes import SlotPairs, SlotTokens, pairs_of
from lorabank.bank.routing import Routing
from lorabank.bank.stack_carrier import StackCarrier
from lorabank.errors import LorabankError
from lorabank.kernels.gpu import runtime
from lorabank.kernels.grouped import SortedPairs, frozen_product
from lorabank.kernels.segments import DropoutDraw
from lorabank.kernels.stacked import StackedPlan, StackedSegment, add_stacked
from lorabank.kernels.tables import drop_tables


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
    weight = next(iter(carriers)).stack.get_parameter("weight")
    if not runtime.available(x_TH.device) or runtime.refused(x_TH.device, weight.dtype) is not None:
        return None
    names = tuple(sorted(routing.names & {name for carrier in carriers for name in carrier.slots}))
    slot_U = routing.slot_of(units, names, x_TH.device)
    if slot_U is None:
        return None
    from lorabank.kernels.gpu.stacked import TableGuard, pair_tables, stacked_linear

    count, tokens = next(iter(carriers)).stack.count, len(x_TH)
    slot_P = slot_U.repeat_interleave(tokens // units, output_size=tokens)[pairs.token_P]
    tables = pair_tables(torch.where(slot_P < 0, -1, slot_P * count + pairs.experts_P), pairs.token_P, len(names) * count)
    draws: list[Tensor] = []
    dropout = routing.dropout
    if dropout is not None and any(slot.dropout > 0 for c in carriers for name, slot in c.slots.items() if name in names):
        steps = [dropout.steps.get(name, 0) for name in names for _ in range(count)]
        draws = list(drop_tables(tables.tokens.order_N, tokens // units, steps, dropout.examples, dropout.places).tensors)

    def product(carrier: StackCarrier, x: Tensor, *, by_token: bool) -> Tensor:
        _check_frozen(carrier)
        stack, odds = carrier.tables(names, dropping=bool(draws))
        router = carrier.router
        guard = TableGuard(
            route=routing.token,
            route_id=routing.id,
            layer=carrier.path,
            structure=router.structure,
            structure_now=lambda: router.structure,
            sorted=pairs,
            pairs=tables,
            stack=stack,
            drops=[*draws, odds] if draws else [],
            by_token=by_token,
        )
        leaves = [leaf for name in names if name in carrier.slots for leaf in carrier.slots[name].tensors.by_role.values()]
        return stacked_linear(x, carrier.stack.weight_EIO, _bias(carrier, pairs), carrier.store.buffers, guard, leaves)

    return product
