"""A wrapped layer that the forward never calls is an adapter that does nothing: found at the first forward, and an error."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorabank.bank.layers import LoRALayer
from lorabank.errors import UnreachedLayerError


class ReachCheck:
    """Watches newly wrapped layers through one forward pass of the whole model, then costs nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pending: list[LoRALayer] = []
        self._hook: Any = None

    def watch(self, layer: LoRALayer) -> None:
        """Expect `layer` to be called by the end of the model's next forward pass."""
        self._pending.append(layer)
        if self._hook is None:
            self._hook = self._model.register_forward_hook(_AfterForward(self))

    def check(self) -> None:
        """Raise UnreachedLayerError for watched layers that hold an adapter and were not called; they stay watched."""
        missed = [layer for layer in self._pending if layer.slots and not layer.reached]
        if not missed:
            self.close()
            return
        shown = ", ".join(f"{layer.path!r} ({type(layer.base).__name__})" for layer in missed[:5])
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        raise UnreachedLayerError(
            f"the model's forward pass never called {shown}{more}, so adapters there would do nothing: the model reads their "
            "weights past them, or this input doesn't use that part. Leave them out of targets (exclude=[...]), or call "
            "bank.skip_reach_check() if later inputs use them."
        )

    def close(self) -> None:
        """Stop watching."""
        self._pending = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class _AfterForward:
    """The hook on the model. A copied or pickled model is the plain base, so its hook does nothing."""

    def __init__(self, check: ReachCheck) -> None:
        self._check = check

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._check.check()

    def __reduce__(self) -> Any:
        return _inert, ()


def _inert() -> Any:
    return _nothing


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None
