"""`LoRAExperts`: an experts module with the bank's slots beside its stacked weights.

What the module computes is computed here, by what transformers' interface for experts says of it, with the slots' changes inside
(expert_products.py). Rows of the base alone are the base's own in a mixed batch where the route asks for that.
Shapes: T tokens, K experts a token, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Router
from lorabank.bank.owners import OwnerWatch
from lorabank.bank.routing import Routing
from lorabank.bank.stacked.expert_products import Products, plain_products, table_products
from lorabank.bank.stacked.expert_routes import SlotTokens, same_rows, tokens_of
from lorabank.bank.stacked.stack_carrier import StackCarrier
from lorabank.bank.stacked.stacks import stacks_of
from lorabank.bank.wrapping import Adapted
from lorabank.errors import LorabankError, RoutingError
from lorabank.kernels.grouped import SortedPairs


class LoRAExperts(Adapted):
    """An experts module with the bank's slots beside its stacked weights."""

    def __init__(self, base: nn.Module, path: str, router: Router) -> None:
        stacks = stacks_of(base)
        carriers = {name: StackCarrier(stack, f"{path}.{name}", router) for name, stack in stacks.items()}
        super().__init__(base, path, {f"{name}_": carrier.store for name, carrier in carriers.items()})
        self.__dict__.update(carriers=carriers, router=router, above=None)
        for carrier in carriers.values():
            carrier.shown = self._slot_parameters.refresh  # nothing of this wrapper, which a cycle would keep alive

    carriers: dict[str, StackCarrier]
    """By the name of the parameter, the one that widens first."""
    router: Router
    above: OwnerWatch | None
    """Of the module that calls this one: it gets the batch's rows apart from their tokens."""

    def extra_repr(self) -> str:
        return f"slots={sorted({name for carrier in self.carriers.values() for name in carrier.slots})}"

    def watch(self, above: OwnerWatch) -> None:
        """Read the rows of a batch off the module above."""
        self.__dict__["above"] = above

    def _apply(self, fn: Any, recurse: bool = True) -> LoRAExperts:
        self.base._apply(fn, recurse)
        for name, carrier in self.carriers.items():
            carrier.store.to(self.base.get_parameter(name).device)
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The module's output (T, H) and the changes of the adapters that each token is routed to."""
        return self._eager(hidden_states, top_k_index, top_k_weights)

    def _adapted(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        for name, carrier in self.carriers.items():
            carrier.reached = True
            carrier.stack._parameters["weight"] = self.base._parameters[name]  # whoever has put another there
        routing = self.router.route_in_force(self.path)
        if routing is None or x_TH.numel() == 0:
            return self.base(x_TH, experts_TK, weights_TK)
        here = {name for carrier in self.carriers.values() for name in carrier.slots}
        if not routing.names & here:
            return self.base(x_TH, experts_TK, weights_TK)
        self._check_plain()
        units = self._units(routing, len(x_TH))
        if not any(rows.slot in here for rows in routing.plans[units]):
            return self.base(x_TH, experts_TK, weights_TK)
        pairs = SortedPairs.of(experts_TK, next(iter(self.carriers.values())).stack.count)
        whole = routing.per == "all" or not routing.exact
        if whole and (products := table_products(self.carriers.values(), pairs, routing, units, x_TH)) is not None:
            return self._computed(x_TH, weights_TK, pairs, products)
        if routing.tensors_only:
            raise RoutingError(f"experts {self.path!r} take their plain path, which a captured pass can't follow")
        used = [tokens_of(rows, units, len(x_TH), routing, x_TH.device) for rows in routing.plans[units] if rows.slot in here]
        if whole:
            return self._computed(x_TH, weights_TK, pairs, plain_products(used, pairs, routing, len(x_TH)))
        return self._beside_base(x_TH, experts_TK, weights_TK, used, routing)

    # which tokens reach an expert is Python's work here: under torch.compile each module is a graph break, and right
    _eager: Any = torch.compiler.disable(_adapted)

    def _beside_base(
        self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, used: Sequence[SlotTokens], routing: Routing
    ) -> Tensor:
        """Base rows as the base's own call computes them, which sees the whole batch as without adapters; then the others."""
        (chosen,) = torch.stack([_among(part.tokens, len(x_TH)) for part in used]).any(0).nonzero(as_tuple=True)
        place = torch.zeros(len(x_TH), dtype=torch.int64, device=x_TH.device)
        place[chosen] = torch.arange(len(chosen), device=x_TH.device)
        among = [replace(part, tokens=place[part.tokens]) for part in used]
        x, experts, weights = x_TH[chosen], experts_TK[chosen], weights_TK[chosen]
        pairs = SortedPairs.of(experts, next(iter(self.carriers.values())).stack.count)
        changed = self._computed(x, weights, pairs, plain_products(among, pairs, routing, len(x)))
        if len(chosen) == len(x_TH):
            return changed
        return self.base(x_TH, experts_TK, weights_TK).index_copy(0, chosen, changed)

    def _computed(self, x_TH: Tensor, weights_TK: Tensor, pairs: SortedPairs, products: Products) -> Tensor:
        """What the module computes, with the slots' changes in it."""
        base: Any = self.base
        widen, narrow = self.carriers.values()
        h = products(widen, x_TH, by_token=True)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y_PH = products(narrow, h, by_token=False)
        if vars(base).get("has_post_expert_norm"):
            y_PH = base.post_expert_norm(y_PH)
        return pairs.summed(y_PH * weights_TK.reshape(-1)[pairs.order_P].unsqueeze(-1)).to(x_TH.dtype)

    def _units(self, routing: Routing, tokens: int) -> int:
        """How many units the tokens are. An experts module gets rows and tokens in one dimension, each row's tokens in turn."""
        if routing.per == "all":
            return 1
        each, rows = routing.per == "token", None if self.above is None else self.above.rows
        if not each and rows is not None:
            fitting = [rows] if rows in routing.plans and tokens % rows == 0 else []
        else:
            fitting = [units for units in sorted(routing.plans) if (units == tokens if each else tokens % units == 0)]
        if not fitting or any(not same_rows(routing.plans, fitting[0], units) for units in fitting[1:]):
            expected = " or ".join(str(units) for units in sorted(routing.plans))
            got = f"{tokens} tokens" + ("" if rows is None else f" of {rows} rows")
            raise RoutingError(
                f"experts {self.path!r} got {got}, and the route has {expected} {routing.per}s. Give one route a row of the "
                'batch (repeat=("interleave", k) or ("tile", k) where a library multiplies rows), or bank.route(tokens=[...]).'
            )
        return fitting[0]

    def _check_plain(self) -> None:
        """Raise LorabankError for hooks on the base module, which wouldn't be called."""
        base = self.base
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            raise LorabankError(
                f"experts {self.path!r} carry hooks that were there before the bank, and an adapted pass can't call them. Take "
                "them off, register them after attach, or leave the experts out of targets."
            )


def _among(tokens: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool, device=tokens.device).index_fill_(0, tokens, True)
