"""`LoRAExperts`: an experts module with the bank's slots beside its stacked weights.

A token reaches its experts and its adapters' slots in one grouped product each (kernels/stacked.py). What the module computes is
computed here, by what transformers' interface for experts says of it; rows of the base alone are the base's own in a mixed batch
where the route asks for that. Shapes: T tokens, K experts a token, P = T · K pairs in the order of their experts, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, LayerSlot, Router, SlotValues
from lorabank.bank.init import initial_A
from lorabank.bank.routing import Routing, SlotRows
from lorabank.bank.stacks import ExpertStack, stacks_of
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import Adapted, check_loaded
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import LorabankError, RoutingError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.stacks import joined
from lorabank.kernels.grouped import ends_of, frozen_product
from lorabank.kernels.segments import DropoutDraw
from lorabank.kernels.stacked import StackedPlan, StackedSegment, add_stacked


class StackCarrier(Carrier):
    """One stacked parameter with its slots: an adapter's A (E · rank, in) and B (E · rank, out), one expert behind the other."""

    def __init__(self, stack: ExpertStack, path: str, router: Router, owner: LoRAExperts) -> None:
        weight = stack.get_parameter("weight")
        check_loaded(path, weight)
        self.stack, self.path, self.base, self.router = stack, path, stack.experts, router
        self.store = RankStore(*stack.size, weight.device)
        self.slots: dict[str, LayerSlot] = {}
        self.reached = False
        self._owner = owner
        self._path_seed = zlib.crc32(path.encode())

    @property
    def fusable(self) -> bool:
        """Never: which tokens reach an expert is known when they do."""
        return False

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet: an A of each expert's own, B zero."""
        size = self.store.in_features
        A = torch.cat([initial_A(config.init, rank, size, seed, part) for part in self.parts])
        return SlotValues(A, None, None, False, rank, scaling)

    @property
    def parts(self) -> list[str]:
        """Each expert's path in an adapter."""
        return part_paths(self.path, self.stack)

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, as `joined` makes one rank and scaling of its experts'."""
        A, B, scaling = joined([layers.get(path) for path in self.parts])
        return SlotValues(A.flatten(0, 1), B.transpose(0, 1).flatten(1), None, False, A.shape[1], scaling)

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaves."""
        tensors = self.slots[name].tensors
        with torch.no_grad():
            tensors.A_RI.copy_(values.A)
            tensors.B_RO.zero_() if values.B is None else tensors.B_RO.copy_(values.B.t())

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values, a layer an expert, on the CPU."""
        slot, parts = self.slots[name], self.parts
        A = slot.tensors.A_RI.detach().cpu().view(len(parts), slot.rank, -1)
        B = slot.tensors.B_RO.detach().cpu().view(len(parts), slot.rank, -1).transpose(1, 2)
        return {
            path: AdapterLayer(A[i].clone(), B[i].clone(memory_format=torch.contiguous_format), slot.scaling, stack=len(parts))
            for i, path in enumerate(parts)
        }

    def segment(self, taken: _Taken) -> StackedSegment | None:
        """What the slot of some pairs does to them, None where it has no part here."""
        slot = self.slots.get(taken.slot)
        if slot is None:
            return None
        count = self.stack.count
        draw = None
        if slot.dropout > 0 and taken.examples_M is not None:
            draw = DropoutDraw(
                probability=slot.dropout,
                seed=slot.seed ^ self._path_seed,
                step=taken.step,
                examples_U=taken.examples_M,
                places_UT=taken.places_M1,
            )
        return StackedSegment(
            pairs_M=taken.pairs_M,
            ends_E=taken.ends_E,
            A_ERI=slot.tensors.A_RI.view(count, slot.rank, -1),
            B_ERO=slot.tensors.B_RO.view(count, slot.rank, -1),
            scaling=slot.scaling,
            weights_M=taken.weights_M,
            dropout=draw,
        )

    def _refresh(self) -> None:
        self._owner.refresh()


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The tokens of one slot."""

    slot: str
    tokens: Tensor
    """int64"""
    weights: Tensor | None
    examples: Tensor | None
    places: Tensor | None
    step: int


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """The pairs of one slot: what both stacks of a module need to know of them."""

    slot: str
    pairs_M: Tensor
    ends_E: Tensor
    weights_M: Tensor | None
    examples_M: Tensor | None
    places_M1: Tensor | None
    step: int


class LoRAExperts(Adapted):
    """An experts module with the bank's slots beside its stacked weights."""

    def __init__(self, base: nn.Module, path: str, router: Router) -> None:
        stacks = stacks_of(base)
        carriers = {name: StackCarrier(stack, f"{path}.{name}", router, self) for name, stack in stacks.items()}
        super().__init__(base, path, {f"{name}_": carrier.store for name, carrier in carriers.items()})
        self.__dict__["carriers"], self.__dict__["router"] = carriers, router

    carriers: dict[str, StackCarrier]
    """By the name of the parameter, the one that widens first."""
    router: Router

    def extra_repr(self) -> str:
        return f"slots={sorted({name for carrier in self.carriers.values() for name in carrier.slots})}"

    def refresh(self) -> None:
        """Show the present leaves to trainers."""
        self._slot_parameters.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> LoRAExperts:
        self.base._apply(fn, recurse)
        for name, carrier in self.carriers.items():
            carrier.stack._parameters["weight"] = self.base._parameters[name]
            carrier.store.to(self.base.get_parameter(name).device)
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The module's output (T, H) and the changes of the adapters that each token is routed to."""
        return self._eager(hidden_states, top_k_index, top_k_weights)

    def _adapted(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for carrier in self.carriers.values():
            carrier.reached = True
        routing = self.router.route_in_force(self.path)
        if routing is None or x_TH.numel() == 0:
            return self.base(x_TH, experts_TK, weights_TK)
        if routing.tensors_only:
            raise RoutingError(f"experts {self.path!r} sort their tokens anew in each pass, which a captured pass can't follow")
        used = [tokens for tokens in self._tokens(routing, x_TH) if any(tokens.slot in c.slots for c in self.carriers.values())]
        if not used:
            return self.base(x_TH, experts_TK, weights_TK)
        mine = torch.zeros(len(x_TH), dtype=torch.bool, device=x_TH.device)
        for tokens in used:
            mine[tokens.tokens] = True
        if not routing.exact or bool(mine.all()):
            return self._own(x_TH, experts_TK, weights_TK, used, routing)
        # base rows are the base's to the last bit: its own call sees the whole batch, as it does without adapters
        y_TH = self.base(x_TH, experts_TK, weights_TK)
        (chosen,) = mine.nonzero(as_tuple=True)
        place = torch.zeros(len(x_TH), dtype=torch.int64, device=x_TH.device)
        place[chosen] = torch.arange(len(chosen), device=x_TH.device)
        among = [replace(tokens, tokens=place[tokens.tokens]) for tokens in used]
        return y_TH.index_copy(0, chosen, self._own(x_TH[chosen], experts_TK[chosen], weights_TK[chosen], among, routing))

    # which tokens reach an expert is Python's work here: under torch.compile each module is a graph break, and right
    _eager: Any = torch.compiler.disable(_adapted)

    def _own(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, used: Sequence[_Tokens], routing: Routing) -> Tensor:
        """What the module computes of these tokens, with the slots' changes in it."""
        base: Any = self.base
        tokens, each = experts_TK.shape
        experts_P, order_P = torch.sort(experts_TK.reshape(-1), stable=True)
        token_P = order_P // each
        widen, narrow = self.carriers.values()
        ends_E = ends_of(experts_P, widen.stack.count)
        taken = [_taken(part, experts_P, token_P, widen.stack.count, tokens) for part in used]
        h = self._product(widen, x_TH[token_P], experts_P, ends_E, taken, routing)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y_PH = self._product(narrow, h, experts_P, ends_E, taken, routing)
        if vars(base).get("has_post_expert_norm"):
            y_PH = base.post_expert_norm(y_PH)
        y_PH = y_PH * weights_TK.reshape(-1)[order_P].unsqueeze(-1)
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return y_PH[back_P].view(tokens, each, -1).sum(1).to(x_TH.dtype)

    def _product(
        self,
        carrier: StackCarrier,
        x_PI: Tensor,
        experts_P: Tensor,
        ends_E: Tensor,
        taken: Sequence[_Taken],
        routing: Routing,
    ) -> Tensor:
        stack = carrier.stack
        if stack.get_parameter("weight").requires_grad:
            raise LorabankError(
                f"experts {carrier.path!r}: their base weight is trained as well, which isn't supported. Freeze it."
            )
        y_PO = frozen_product(x_PI, stack.weight_EIO, ends_E)
        if self.base.has_bias:
            y_PO = y_PO + self.base._parameters[f"{stack.name}_bias"][experts_P]  # pyright: ignore[reportOptionalSubscript]
        segments = tuple(segment for part in taken if (segment := carrier.segment(part)) is not None)
        if not segments:
            return y_PO
        plan = StackedPlan(
            segments=segments,
            route=routing.token,
            route_id=routing.id,
            layer=carrier.path,
            structure=self.router.structure,
            structure_now=lambda: self.router.structure,
        )
        return add_stacked(y_PO, x_PI.to(y_PO.dtype), plan)

    def _tokens(self, routing: Routing, x_TH: Tensor) -> list[_Tokens]:
        """Each slot's tokens. A module of experts gets rows and tokens in one dimension, each row's tokens in turn."""
        units = self._units(routing, len(x_TH))
        return [_tokens_of(rows, units, len(x_TH), routing, x_TH.device) for rows in routing.plans[units]]

    def _units(self, routing: Routing, tokens: int) -> int:
        if routing.per == "all":
            return 1
        fitting = [
            units for units in sorted(routing.plans) if (units == tokens if routing.per == "token" else tokens % units == 0)
        ]
        if not fitting or any(not _same_rows(routing.plans, fitting[0], units) for units in fitting[1:]):
            expected = " or ".join(str(units) for units in sorted(routing.plans))
            what = "which may be either" if fitting else "which isn't so many times anything"
            raise RoutingError(
                f"experts {self.path!r} got {tokens} tokens, {what}, and the route has {expected} {routing.per}s. Give one "
                "route a row of the batch, or bank.route(tokens=[...]) with one a token."
            )
        return fitting[0]


def part_paths(path: str, stack: ExpertStack) -> list[str]:
    """The paths by which an adapter's layers name a stack's experts."""
    return [f"{path}.{expert}" for expert in range(stack.count)]


def _same_rows(plans: Mapping[int, Sequence[SlotRows]], few: int, many: int) -> bool:
    """Whether a route of `many` rows is that of `few` with each row several times in turn."""
    times, left = divmod(many, few)
    expected = {part.slot: tuple(u * times + i for u in part.units for i in range(times)) for part in plans[few]}
    return not left and expected == {part.slot: part.units for part in plans[many]}


def _tokens_of(rows: SlotRows, units: int, tokens: int, routing: Routing, device: torch.device) -> _Tokens:
    each = tokens // units
    unit_U = torch.arange(units, device=device)[rows.rows]
    within_T = torch.arange(each, device=device)
    examples = places = None
    if routing.dropout is not None and rows.examples_U is not None:
        given = rows.examples_U if rows.examples_U.ndim > 1 else rows.examples_U[:, None].expand(-1, each)
        examples = given.reshape(-1)
        places = (within_T.expand(len(unit_U), each) if rows.places_UT is None else rows.places_UT).reshape(-1)
    return _Tokens(
        slot=rows.slot,
        tokens=(unit_U[:, None] * each + within_T).reshape(-1),
        weights=None if rows.weights_U is None else rows.weights_U.to(device).repeat_interleave(each),
        examples=examples,
        places=places,
        step=0 if routing.dropout is None else routing.dropout.steps.get(rows.slot, 0),
    )


def _taken(part: _Tokens, experts_P: Tensor, token_P: Tensor, count: int, tokens: int) -> _Taken:
    place_T = torch.full((tokens,), -1, dtype=torch.int64, device=token_P.device)
    place_T[part.tokens] = torch.arange(len(part.tokens), device=token_P.device)
    place_P = place_T[token_P]
    (pairs_M,) = (place_P >= 0).nonzero(as_tuple=True)
    place_M = place_P[pairs_M]
    return _Taken(
        slot=part.slot,
        pairs_M=pairs_M,
        ends_E=ends_of(experts_P[pairs_M], count),
        weights_M=None if part.weights is None else part.weights[place_M],
        examples_M=None if part.examples is None else part.examples[place_M],
        places_M1=None if part.places is None else part.places[place_M, None],
        step=part.step,
    )
