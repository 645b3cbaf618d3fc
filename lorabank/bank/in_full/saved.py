"""`SavedModule`: a module that adapters train in full (PEFT's `modules_to_save`), with each adapter's own copy of its parameters.

A copy is its leaves alone: a call puts them in the place of the base's parameters, so one module computes with any of them. Rows
are sent to their adapter's copy by the route, as in LoRA layers; a row's weights over several adapters mix what their copies
change of the base's output: y = base(x) + Σ w · (copy(x) − base(x)).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabank.bank.carrier import Router
from lorabank.bank.in_full.saved_rows import changed, first_tensor, places, put_together, rows_of
from lorabank.bank.owners import OwnerWatch
from lorabank.bank.places import ids_of_rows
from lorabank.bank.routing import Routing, SlotRows
from lorabank.bank.wrapping import Adapted
from lorabank.errors import RoutingError

_BY_TOKEN = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Identity,
    nn.Dropout,
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.Tanh,
)
"""Modules that compute each token by itself, along the last dimension."""

_Call = Callable[[str | None, Tensor | None], Any]
"""(adapter, or None for the base; rows, or None for all) → the output."""


@dataclass(frozen=True)
class SavedSlot:
    """One adapter's copy of a module."""

    leaves: Mapping[str, nn.Parameter]
    """By the parameter's name in the module; fp32."""


class SavedModule(Adapted):
    """A base module with each adapter's copy of its parameters beside it."""

    in_turn = False

    def __init__(self, base: nn.Module, path: str, router: Router, rows_lost: str | None, labels: str | None) -> None:
        """`rows_lost`: why the route can't follow its input to the batch's rows. `labels`: path in it of the layer of labels."""
        modes = [(module, module.training) for module in base.modules()]
        super().__init__(base, path, {})
        for module, training in modes:
            module.training = training
        own = vars(self)
        own["slots"], own["reached"], own["router"] = {}, False, router
        own["rows_lost"], own["labels"], own["folded"], own["called"] = rows_lost, labels, None, None
        own["_lock"] = threading.RLock()

    slots: dict[str, SavedSlot]
    reached: bool
    router: Router
    rows_lost: str | None
    labels: str | None
    folded: OwnerWatch | None
    called: ContextVar[bool] | None
    _lock: contextlib.AbstractContextManager[Any]

    def extra_repr(self) -> str:
        return f"saved by {list(self.slots)}"

    @property
    def in_use(self) -> bool:
        """Whether an adapter has a copy."""
        return bool(self.slots)

    @property
    def asks(self) -> bool:
        """Whether a call needs the rows that the module above was given."""
        return self.in_use

    def watch(self, folded: OwnerWatch | None, called: ContextVar[bool] | None) -> None:
        """Note what the modules above tell of the input, and where calls are to be told."""
        vars(self).update(folded=folded, called=called)

    # ---- copies ---------------------------------------------------------------------------------------------------

    def add_slot(self, name: str, values: Mapping[str, Tensor]) -> None:
        """An adapter's copy, which begins with `values`."""
        own = dict(self.base.named_parameters())
        leaves = {key: nn.Parameter(values[key].detach().to(p.device, torch.float32, copy=True)) for key, p in own.items()}
        self.slots[name] = SavedSlot(leaves)
        self._show()

    def remove_slot(self, name: str) -> None:
        """Forget an adapter's copy."""
        del self.slots[name]
        self._show()

    def write(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Copy values into an adapter's leaves."""
        with torch.no_grad():
            for key, leaf in self.slots[name].leaves.items():
                leaf.copy_(values[key])

    def values(self, name: str) -> dict[str, Tensor]:
        """All of the module's state for an adapter, on the CPU: its parameters, and the base's buffers that a file must have."""
        by_id = {id(p): key for key, p in self.base.named_parameters()}
        found: dict[str, Tensor] = {}
        for key, value in self.base.state_dict(keep_vars=True).items():
            mine = self.slots[name].leaves[by_id[id(value)]] if id(value) in by_id else value
            found[key] = mine.detach().to("cpu", copy=True).contiguous()
        return found

    def _show(self) -> None:
        child = self._slot_parameters
        child._parameters.clear()
        for name, slot in self.slots.items():
            for key, leaf in slot.leaves.items():
                child.register_parameter(f"{key}_{name}".replace(".", "%2E"), leaf)

    def _apply(self, fn: Any, recurse: bool = True) -> SavedModule:
        self.base._apply(fn, recurse)
        own = dict(self.base.named_parameters())
        for slot in self.slots.values():
            for key, leaf in slot.leaves.items():
                leaf.data = leaf.data.to(own[key].device)
                if leaf.grad is not None:
                    leaf.grad = leaf.grad.to(own[key].device)
        return self

    # ---- calls ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, each row from its adapter's copy."""
        return self._eager(*args, **kwargs)

    def _adapted(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["reached"] = True
        self.base.training = self.training
        if self.called is not None:
            self.called.set(True)
        routing, x = self.router.route_in_force(self.path), first_tensor(args, kwargs)
        nothing = x is not None and x.numel() == 0
        if routing is None or nothing or not routing.names & self.slots.keys():
            return self._call(None, args, kwargs)
        if routing.tensors_only and not routing.rows_follow:
            raise RoutingError(f"module {self.path!r} is trained in full, which a captured pass can't follow from batch to batch")
        if routing.per == "all":
            return self._for_all(routing.plans[1], args, kwargs)
        if self.rows_lost is not None or x is None:
            why = "it gets no tensor" if self.rows_lost is None else self.rows_lost
            raise RoutingError(
                f"module {self.path!r} can't tell the rows apart: {why}. Route all rows alike (bank.use(name), or "
                "bank.route(name)), or leave it out of modules_to_save."
            )
        if routing.per == "token":
            return self._by_token(routing, x, args, kwargs)
        if isinstance(self.base, nn.Embedding):
            x = ids_of_rows(self.path, x, routing.rows)
            args, kwargs = (x,), {}
        return self._by_rows(routing, x, args, kwargs)

    # routing is Python's work: under torch.compile each such module is a graph break, and right
    _eager: Any = torch.compiler.disable(_adapted)

    def _call(self, name: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The base module's own call, or with an adapter's parameters, in the base's dtypes, for it."""
        if name is None and not self.slots:
            return self.base(*args, **kwargs)
        with self._lock:  # of two threads one would see the other's parameters
            if name is None:
                return self.base(*args, **kwargs)
            leaves = self.slots[name].leaves
            own = {key: leaves[key].to(p.dtype) for key, p in self.base.named_parameters()}
            return torch.func.functional_call(self.base, own, tuple(args), dict(kwargs))

    def _for_all(self, plan: Sequence[SlotRows], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output where all rows are routed alike."""
        parts = [part for part in plan if part.slot in self.slots]
        if len(parts) == 1 and parts[0].weights_U is None:
            return self._call(parts[0].slot, args, kwargs)
        y = base = self._call(None, args, kwargs)
        for part in parts:
            weight = torch.ones(1) if part.weights_U is None else part.weights_U
            y = changed(y, base, self._call(part.slot, args, kwargs), weight, self.path)
        return y

    def _by_token(self, routing: Routing, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        alone = len(args) + len(kwargs) == 1
        if not alone or not all(isinstance(m, (*_BY_TOKEN, nn.Sequential)) for m in self.base.modules()):
            raise RoutingError(
                f"module {self.path!r} ({type(self.base).__name__}) isn't known to compute each token by itself, so tokens "
                "can't be routed one by one. Give one route a row, or leave it out of modules_to_save."
            )
        looks_up = isinstance(self.base, nn.Embedding)
        tokens, shape = (x.reshape(-1), x.shape) if looks_up else (x.reshape(-1, x.shape[-1]), x.shape[:-1])
        units = routing.units_of(tokens, self.path, features=not looks_up)

        def call(name: str | None, rows: Tensor | None) -> Any:
            if rows is None:  # as it was given: another shape may be rounded otherwise
                y = self._call(name, (x,), {})
                return y.reshape(-1, y.shape[-1])
            return self._call(name, (tokens.index_select(0, rows),), {})

        y = self._by_units(routing, units, len(tokens), x.device, call)
        return y.view(*shape, y.shape[-1])

    def _by_rows(self, routing: Routing, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        folded = None if self.folded is None else self.folded.rows
        units = routing.units_of(x, self.path) if folded is None else routing.units_folded(folded, x, self.path)

        def call(name: str | None, rows: Tensor | None) -> Any:
            if rows is None:
                return self._call(name, args, kwargs)
            mine = [rows_of(value, rows, x, self.path) for value in args]
            return self._call(name, mine, {key: rows_of(value, rows, x, self.path) for key, value in kwargs.items()})

        return self._by_units(routing, units, len(x), x.device, call)

    def _by_units(self, routing: Routing, units: int, count: int, device: torch.device, call: _Call) -> Any:
        """Units of one adapter through its copy, the rest through the base, with what weighted parts change of it."""
        parts = [part for part in routing.plans[units] if part.slot in self.slots]
        if routing.tensors_only:
            return self._following(parts, count, count // units, device, call)
        times = Counter(unit for part in parts for unit in part.units)
        alone = [(part.slot, [u for u in part.units if part.weights_U is None and times[u] == 1]) for part in parts]
        own = [(slot, mine) for slot, mine in alone if mine]
        taken = {unit for _, mine in own for unit in mine}
        left = [unit for unit in range(units) if unit not in taken]
        if len(own) == 1 and not left:
            return call(own[0][0], None)
        each = count // units
        rows = [places(mine, each, device) for _, mine in own]
        found = [call(slot, mine) for (slot, _), mine in zip(own, rows, strict=True)]
        whole = bool(left) and (routing.exact or not own)
        if left:
            here = list(range(units)) if whole else left
            base = y = call(None, None if whole else places(here, each, device))
            at = {unit: i for i, unit in enumerate(here)}
            for part in parts:
                mixed = [i for i, unit in enumerate(part.units) if unit not in taken]
                if not mixed:
                    continue
                mine = [part.units[i] for i in mixed]
                among = places([at[unit] for unit in mine], each, device)
                weights = torch.ones(len(part.units)) if part.weights_U is None else part.weights_U
                weights = weights.to(device)[places(mixed, 1, device)].repeat_interleave(each)
                y = changed(y, base, call(part.slot, places(mine, each, device)), weights, self.path, among)
            found, rows = [y, *found], [places(here, each, device), *rows]
        return put_together(found, count, rows, self.path, whole=whole, widens=self.labels is not None)

    def _following(self, parts: Sequence[SlotRows], count: int, each: int, device: torch.device, call: _Call) -> Any:
        """The same in a captured pass: of one adapter a row, which rows is read off tensors, and how many never changes."""
        within = torch.arange(each, device=device)
        units = [torch.arange(count // each, device=device)[part.rows] for part in parts]
        rows = [(mine[:, None] * each + within).reshape(-1) for mine in units]
        left = count - sum(map(len, rows))
        if len(parts) == 1 and not left:
            return call(parts[0].slot, None)
        found = [call(part.slot, mine) for part, mine in zip(parts, rows, strict=True)]
        if left:
            found, rows = [call(None, None), *found], [torch.arange(count, device=device), *rows]
        return put_together(found, count, rows, self.path, whole=left > 0, widens=self.labels is not None)
