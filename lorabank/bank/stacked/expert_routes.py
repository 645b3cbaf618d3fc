"""A batch's routing as experts need it: which tokens, and then which pairs of a token and an expert, are a slot's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.bank.routing import Routing, SlotRows
from lorabank.kernels.grouped import SortedPairs, ends_of


@dataclass(frozen=True, kw_only=True)
class SlotTokens:
    """The tokens of one slot. Each tensor has a number a token."""

    slot: str
    tokens: Tensor
    """int64"""
    weights: Tensor | None
    examples: Tensor | None
    places: Tensor | None
    step: int


@dataclass(frozen=True, kw_only=True)
class SlotPairs:
    """The M pairs of one slot: what every stack of a module needs to know of them."""

    slot: str
    pairs_M: Tensor
    ends_E: Tensor
    weights_M: Tensor | None
    examples_M: Tensor | None
    places_M1: Tensor | None
    step: int


def same_rows(plans: Mapping[int, Sequence[SlotRows]], few: int, many: int) -> bool:
    """Whether a route of `many` rows is that of `few` with each row several times in turn."""
    times, left = divmod(many, few)
    expected = {part.slot: tuple(u * times + i for u in part.units for i in range(times)) for part in plans[few]}
    return not left and expected == {part.slot: part.units for part in plans[many]}


def tokens_of(rows: SlotRows, units: int, tokens: int, routing: Routing, device: torch.device) -> SlotTokens:
    """The tokens of a slot's units, of which there are `units` in all."""
    each = tokens // units
    unit_U = torch.arange(units, device=device)[rows.rows]
    within_T = torch.arange(each, device=device)
    examples = places = None
    if routing.dropout is not None and rows.examples_U is not None:
        given = rows.examples_U if rows.examples_U.ndim > 1 else rows.examples_U[:, None].expand(-1, each)
        examples = given.reshape(-1)
        places = (within_T.expand(len(unit_U), each) if rows.places_UT is None else rows.places_UT).reshape(-1)
    return SlotTokens(
        slot=rows.slot,
        tokens=(unit_U[:, None] * each + within_T).reshape(-1),
        weights=None if rows.weights_U is None else rows.weights_U.to(device).repeat_interleave(each),
        examples=examples,
        places=places,
        step=0 if routing.dropout is None else routing.dropout.steps.get(rows.slot, 0),
    )


def pairs_of(part: SlotTokens, pairs: SortedPairs, count: int, tokens: int) -> SlotPairs:
    """The pairs of a slot's tokens. `count`: experts; `tokens`: in all."""
    place_T = torch.full((tokens,), -1, dtype=torch.int64, device=pairs.token_P.device)
    place_T[part.tokens] = torch.arange(len(part.tokens), device=pairs.token_P.device)
    place_P = place_T[pairs.token_P]
    (pairs_M,) = (place_P >= 0).nonzero(as_tuple=True)
    place_M = place_P[pairs_M]
    return SlotPairs(
        slot=part.slot,
        pairs_M=pairs_M,
        ends_E=ends_of(pairs.experts_P[pairs_M], count),
        weights_M=None if part.weights is None else part.weights[place_M],
        examples_M=None if part.examples is None else part.examples[place_M],
        places_M1=None if part.places is None else part.places[place_M, None],
        step=part.step,
    )
