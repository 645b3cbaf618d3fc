"""A batch's route in the form that the model's layers see: some models (OPT) fold rows and tokens into one dimension.

N rows × L tokens. A folded layer's input has N·L rows, each row's tokens in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import BASE, DropoutState, Routing, RowRoute
from lorabank.engine.head import logits_of
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import RoutingError

PROBE_TOKENS = 3


def single_slots(routes: Sequence[RowRoute]) -> list[str | None]:
    """Each row's adapter, None for BASE. Raises RoutingError for a mixture, which isn't trained."""
    names: list[str | None] = []
    for route in routes:
        if isinstance(route, Mapping):
            raise RoutingError(
                f"joint training takes one adapter a row, got the mixture {dict(route)!r}. Mixtures are for inference: give the "
                "row to one adapter, or call the model inside bank.route(...) in a loop of your own."
            )
        names.append(route if isinstance(route, str) else None)
    return names


def row_routing(bank: AdapterBank, routes: Sequence[RowRoute], length: int, *, exact: bool = True) -> Routing:
    """Routing for N rows of `length` tokens, whether a layer folds them or not; no dropout."""
    made = bank.routing(list(routes), repeat=("interleave", length) if length > 1 else None, exact=exact)
    return replace(made, rows=len(routes))


def dropout_routing(
    bank: AdapterBank,
    routes: Sequence[RowRoute],
    length: int,
    steps: Mapping[str, int],
    examples: Tensor,
    *,
    places_NL: Tensor | None = None,
    folded: bool,
) -> Routing:
    """Routing of a training pass, dropout drawn from each adapter's step, the token's example and its place in it.

    `examples`: one a row, (N,); of packed rows one a token, (N, L), with `places_NL`.
    """
    if not folded:
        return bank.routing(list(routes), dropout=DropoutState(steps=steps, examples=examples, places=places_NL), exact=False)
    # every token is its own example then: the same place of the same example gives the same mask, however long the padding
    places = torch.arange(length, device=examples.device) if places_NL is None else places_NL
    each = (examples.view(len(routes), -1) * 0x9E3779B1 + places).reshape(-1)
    tokens = [route for route in routes for _ in range(length)]
    return bank.routing(tokens=tokens, dropout=DropoutState(steps=steps, examples=each), exact=False)


def folds_tokens(bank: AdapterBank) -> bool:
    """Whether an adapted linear layer gets rows and tokens in one dimension, seen on a probe of one row of three tokens."""
    seen: list[int] = []

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].shape[0])

    linear = [m for m in bank.model.modules() if isinstance(m, LoRALayer) and m.kind.linear]
    handles = [m.register_forward_pre_hook(see) for m in linear]
    ids = torch.arange(PROBE_TOKENS, device=bank.device)[None]
    try:
        with torch.no_grad(), evaluation_mode(bank.model.modules()), bank.route(BASE):
            logits_of(bank.model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return PROBE_TOKENS in seen
