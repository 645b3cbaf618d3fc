"""The routing verbs of a bank: which rows use which adapter, for one `with`, from now on, or because there is one alone."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, KeysView, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch

from lorabank.bank.routing import DropoutState, Repeat, Routing, RowRoute, all_rows, build_routing
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import RoutingError

_CAPTURE = (
    "Pass context_fn=bank.checkpoint_context to the checkpointing function (with use_reentrant=False), or choose the route "
    "with bank.use(name)."
)


class Routed(ABC):
    """Holds the routes of one bank."""

    def __init__(self) -> None:
        self._sticky: Routing | None = None
        self._only: Routing | None = None
        self._seen: dict[str, int] = {}
        self._warned_dropout: set[str] = set()
        self._current: ContextVar[Routing | None] = ContextVar("lorabank_routing", default=None)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the base model is."""

    @abstractmethod
    def config(self, name: str) -> AdapterConfig:
        """The configuration of an adapter."""

    @property
    @abstractmethod
    def _known(self) -> KeysView[str]:
        """The adapters in the bank."""

    @abstractmethod
    def _check_alive(self) -> None:
        """Raise LorabankError for a bank that was detached."""

    def routing(
        self,
        rows: RowRoute | Sequence[RowRoute] | None = None,
        *,
        tokens: Sequence[RowRoute] | None = None,
        repeat: Repeat | None = None,
        dropout: DropoutState | None = None,
        exact: bool = True,
    ) -> Routing:
        """Build a Routing: `rows` is one route for all rows or a list with one a row; `tokens` a list with one a packed token.

        `repeat` says how a library multiplies the rows: ("interleave", k) for beams, ("tile", k) for guidance. `exact=False`: the
        base's products may round otherwise than the base alone, where that is faster (the engine's own passes do so).
        """
        self._check_alive()
        known, device = tuple(self._known), self.device
        return build_routing(rows, known=known, device=device, tokens=tokens, repeat=repeat, dropout=dropout, exact=exact)

    @contextlib.contextmanager
    def route(
        self,
        rows: RowRoute | Sequence[RowRoute] | Routing | None = None,
        *,
        tokens: Sequence[RowRoute] | None = None,
        repeat: Repeat | None = None,
    ) -> Iterator[Routing]:
        """Put a route in force inside the `with`. Backward uses it too, wherever it is called."""
        self._check_alive()
        given = isinstance(rows, Routing)
        if given and (tokens is not None or repeat is not None):
            raise RoutingError("route: a Routing is complete; give tokens= and repeat= to bank.routing(...) when building it")
        routing = rows if given else self.routing(rows, tokens=tokens, repeat=repeat)
        if _in_backward():
            routing = replace(routing, set_in_backward=True)
        if (outer := self._current.get()) is not None:
            routing = outer.inside(routing)
        previous = self._current.set(routing)
        try:
            yield routing
        finally:
            self._current.reset(previous)

    def use(self, route: RowRoute | None) -> None:
        """A route for all rows that stays in force, in every thread, until changed; None takes it back.

        `with route(...)` goes first. Removing an adapter that it names takes it back, too.
        """
        self._check_alive()
        if route is not None and isinstance(route, Sequence) and not isinstance(route, str):
            raise RoutingError(f"use: one route for all rows, got {route!r}. One entry a row: `with bank.route([...])`.")
        self._sticky = None if route is None else self.routing(route)

    def route_in_force(self, layer: str = "") -> Routing | None:
        """The routing for this call, or None when the bank has no adapter. Raises RoutingError when it can't be known."""
        routing = self._chosen()
        recomputing = _in_backward()
        if routing is None:
            if not self._known:
                return None
            if recomputing:
                raise RoutingError(
                    f"layer {layer!r} is being recomputed in backward and no route was captured for it. {_CAPTURE}"
                )
            raise RoutingError(
                f"layer {layer!r}: the bank has {len(self._known)} adapters ({', '.join(self._known)}) and no route is in force. "
                "Call the model inside `with bank.route(...)`, or choose one with bank.use(name)."
            )
        if not routing.names <= self._known:
            gone = ", ".join(sorted(routing.names - self._known))
            raise RoutingError(f"the route in force names {gone}, which was removed from the bank. Build a new route.")
        if not recomputing:
            self._seen[layer] = routing.id
        elif not routing.set_in_backward and self._seen.get(layer) != routing.id:
            # reentrant checkpointing keeps nothing of its forward, so another route would give wrong gradients in silence
            raise RoutingError(
                f"layer {layer!r} is being recomputed in backward under another route than its forward saw. {_CAPTURE}"
            )
        if routing.dropout is None and torch.is_grad_enabled():
            self._warn_dropout(routing)
        return routing

    def checkpoint_context(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        """`context_fn` for `torch.utils.checkpoint.checkpoint(use_reentrant=False)`: recomputation gets the forward's route."""
        routing = self._chosen()
        if routing is None:
            return contextlib.nullcontext(), contextlib.nullcontext()
        return contextlib.nullcontext(), self.route(routing)

    def _chosen(self) -> Routing | None:
        """The routing in force, if any: of the innermost `with`, else `use`, else of the only adapter."""
        return self._current.get() or self._sticky or self._only

    def _keep_routes(self) -> None:
        """Forget what names adapters that are gone, and route all rows to one that is alone."""
        self._only = all_rows(next(iter(self._known)), self.device) if len(self._known) == 1 else None
        if self._sticky is not None and not self._sticky.names <= self._known:
            self._sticky = None

    def _warn_dropout(self, routing: Routing) -> None:
        for name in routing.names - self._warned_dropout:
            self._warned_dropout.add(name)
            dropout = self.config(name).dropout
            if dropout > 0:
                warnings.warn(
                    f"adapter {name!r} has dropout {dropout:g}, which is drawn only inside lorabank's own training step: "
                    "this forward pass with gradients runs without it",
                    stacklevel=2,
                )


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: a layer called now is being recomputed."""
    return torch._C._current_graph_task_id() != -1
