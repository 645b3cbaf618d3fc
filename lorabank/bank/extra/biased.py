"""`BiasedModule`: a norm where it stands in the model, with the adapters' own biases. Only biases change there (`bias="all"`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, Router, SlotValues
from lorabank.bank.extra.extras import add_shifts, fill
from lorabank.bank.owners import OwnerWatch
from lorabank.bank.routing import Routing
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import Adapted, check_loaded
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import RoutingError
from lorabank.formats.adapter import AdapterLayer

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS: Mapping[type[nn.Module], bool] = {
    nn.LayerNorm: False,
    nn.GroupNorm: True,
    **dict.fromkeys((*_BATCH_NORMS, nn.SyncBatchNorm), True),
}
"""Modules with a bias that aren't layers for A and B → whether their channels come right behind the rows, and not last."""


def is_norm(module: nn.Module) -> bool:
    """Whether the module's bias is added to what it gives, as the table says."""
    return any(isinstance(module, known) and type(module).forward is known.forward for known in NORMS)


class BiasedModule(Adapted, Carrier):
    """A norm with the bank's slots beside it. Their only leaf is a bias."""

    def __init__(self, base: nn.Module, path: str, router: Router, rows_lost: str | None) -> None:
        bias = base.get_parameter("bias")
        check_loaded(path, bias)
        store = RankStore(0, bias.numel(), bias.device)
        super().__init__(base, path, {"": store})
        own = vars(self)
        own["store"], own["slots"], own["reached"] = store, {}, False
        own["router"], own["rows_lost"] = router, rows_lost
        own["folded"], own["called"] = None, None
        own["channels_first"] = next(first for known, first in NORMS.items() if isinstance(base, known))

    channels_first: bool
    rows_lost: str | None
    folded: OwnerWatch | None
    called: ContextVar[bool] | None

    def extra_repr(self) -> str:
        return f"{self.base!r}, slots={list(self.slots)}"

    @property
    def in_use(self) -> bool:
        """Whether an adapter has a bias here."""
        return bool(self.slots)

    @property
    def asks(self) -> bool:
        """Whether a call needs the rows that the module above was given."""
        return self.in_use

    def watch(self, folded: OwnerWatch | None, called: ContextVar[bool] | None) -> None:
        """Note what the modules above tell of its input, and where its calls are to be told."""
        vars(self).update(folded=folded, called=called)

    @property
    def fusable(self) -> bool:
        """Never: a compiled block leaves the norm to this wrapper."""
        return False

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """The base's own bias."""
        return SlotValues(torch.zeros(0, 0), None, None, False, 0, 1.0)

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """No layer has anything here."""
        return SlotValues(torch.zeros(0, 0), None, None, False, 0, 1.0)

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaf."""
        slot = self.slots[name]
        fill(self.base, slot.extras, values.extras.values, slot.ids)

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """None: a bias is no layer."""
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm's output and the biases of the adapters that each row is routed to."""
        return self._eager(*args, **kwargs)

    def _shifted(self, *args: Any, **kwargs: Any) -> Tensor:
        vars(self)["reached"] = True
        if self.called is not None:
            self.called.set(True)
        y: Tensor = self.base(*args, **kwargs)
        routing = self.router.route_in_force(self.path)
        if routing is None or y.numel() == 0 or not any(name in self.slots for name in routing.names):
            return y
        if routing.tensors_only and not routing.rows_follow:
            raise RoutingError(f"norm {self.path!r} is read past its tables, which a captured pass can't follow")
        units = self._units(routing, y)
        used = [(rows, slot) for rows in routing.plans[units] if (slot := self.slots.get(rows.slot)) is not None]
        if not used:
            return y
        bias = self.base.get_parameter("bias")
        shape = (units, -1, *y.shape[1:]) if self.channels_first else (units, -1, *y.shape[y.ndim - bias.ndim :])
        return add_shifts(y, used, bias, shape, self.channels_first)

    # routing is Python's work: under torch.compile a norm with slots is a graph break, and right
    _eager: Any = torch.compiler.disable(_shifted)

    def _units(self, routing: Routing, y: Tensor) -> int:
        if routing.per == "all":
            return 1
        if self.rows_lost is not None:
            raise RoutingError(
                f"norm {self.path!r} can't tell the rows apart: {self.rows_lost}. Route all rows alike (bank.use(name), or "
                "bank.route(name)), or train fewer biases (bias='lora_only')."
            )
        if self.folded is not None and routing.per == "row" and (rows := self.folded.rows) is not None:
            return routing.units_folded(rows, y, self.path)
        if routing.per == "token" and self.channels_first and y.ndim > 2:
            raise RoutingError(
                f"norm {self.path!r} has its channels ahead of its places, so tokens can't be routed one by one there. Give one "
                "route a row, or train fewer biases (bias='lora_only')."
            )
        return routing.units_of(y, self.path)

    def _apply(self, fn: Any, recurse: bool = True) -> BiasedModule:
        self.base._apply(fn, recurse)  # into the dictionaries that are this module's too
        self.store.to(self.base.get_parameter("bias").device)
        return self

    def _refresh(self) -> None:
        self._slot_parameters.refresh()
