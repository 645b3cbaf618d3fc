"""A wrapped layer that the forward never calls is an adapter that does nothing: found at the first forward, and an error."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lorabank.bank.inert import inert
from lorabank.errors import UnreachedLayerError


class Reached(Protocol):
    """What is asked of a wrapped layer here."""

    path: str
    base: nn.Module
    in_turn: bool

    @property
    def reached(self) -> bool:
        """Whether a forward pass has come by."""
        ...

    @property
    def slots(self) -> Mapping[str, Any]:
        """By adapter."""
        ...


class ReachCheck:
    """Watches newly wrapped layers through one forward pass of the whole model. Its hook also marks the model as attached."""

    def __init__(self, model: nn.Module, owner: object) -> None:
        """`owner`: the bank. The mark ends with it: a bank that nobody holds any more and that has no adapter is no bank."""
        self._pending: list[Reached] = []
        self._read_at: dict[str, list[Reached]] = {}
        self._hook = model.register_forward_hook(_AfterForward(self, owner))

    def watch(self, layer: Reached) -> None:
        """Expect `layer` to be called by the end of the model's next forward pass; an expert in a list may get no token."""
        if layer.in_turn or "experts" not in layer.path.split("."):
            self._pending.append(layer)

    def read_at(self, table: Reached, other: Reached) -> None:
        """Note that `other` reads the rows of `table`, so that a call of either will do for the table."""
        self._read_at.setdefault(table.path, []).append(other)

    def check(self) -> None:
        """Raise UnreachedLayerError for watched layers that hold an adapter and were not called; they stay watched."""
        missed = [
            layer
            for layer in self._pending
            if layer.slots and not any(place.reached for place in (layer, *self._read_at.get(layer.path, ())))
        ]
        if not missed:
            self.skip()
            return
        shown = ", ".join(f"{layer.path!r} ({type(layer.base).__name__})" for layer in missed[:5])
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        raise UnreachedLayerError(
            f"the model's forward pass never called {shown}{more}, so adapters there would do nothing: the model reads their "
            "weights past them, or this input doesn't use that part. Leave them out of targets (exclude=[...]), or call "
            "bank.skip_reach_check() if later inputs use them."
        )

    def skip(self) -> None:
        """Stop watching the layers of now."""
        self._pending = []

    def close(self) -> None:
        """Take the hook off the model."""
        self._pending = []
        self._read_at = {}
        self._hook.remove()


def is_attached(model: nn.Module) -> bool:
    """Whether a bank stands over `model` already, with or without adapters."""
    return any(isinstance(hook, _AfterForward) and hook.owner() is not None for hook in model._forward_hooks.values())


class _AfterForward:
    """The hook on the model. A copied or pickled model is the plain base, so its hook does nothing."""

    def __init__(self, check: ReachCheck, owner: object) -> None:
        self._check, self.owner = check, weakref.ref(owner)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._check.check()

    def __reduce__(self) -> Any:
        return inert, ()
