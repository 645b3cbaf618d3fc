"""`Carrier`: a place of a model that adapters change, with each one's part in it: a layer, or a stack of experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorabank.bank.extra.extras import LORA_BIAS, Extras, TokenIds, copied
from lorabank.bank.routing import Routing
from lorabank.bank.starts.frozen import FrozenPart
from lorabank.bank.storage import RankStore, SlotTensors
from lorabank.config.adapter import AdapterConfig
from lorabank.formats.adapter import AdapterLayer


@dataclass(frozen=True)
class LayerSlot:
    """One adapter's part in one place."""

    tensors: SlotTensors
    rank: int
    scaling: float
    dropout: float
    seed: int
    shared: bool = False
    """Whether the numbers are another place's, turned (bank/tied.py)."""
    ids: TokenIds | None = None
    """Whose rows of the layer's table it trains."""

    @property
    def extras(self) -> Mapping[str, nn.Parameter]:
        """Its leaves beside A and B and a magnitude, by role."""
        return self.tensors.extras

    frozen: FrozenPart | None = None
    """Where it started, if its change is the difference from there."""


def vectors_of(slot: LayerSlot) -> dict[str, Tensor]:
    """A copy of its magnitude and lora_B's bias on the CPU, those that there are, by `AdapterLayer`'s names."""
    found = {"magnitude": slot.tensors.magnitude_O, LORA_BIAS: slot.extras.get(LORA_BIAS)}
    return {name: leaf.detach().to("cpu", copy=True) for name, leaf in found.items() if leaf is not None}


class SlotValues(NamedTuple):
    """What an adapter's part in a place begins with. R: the rank, or experts × rank."""

    A: Tensor
    """(R, in)"""
    B: Tensor | None
    """(out, R); None for zeros."""
    magnitude: Tensor | None
    """(out,)"""
    decomposed: bool
    rank: int
    scaling: float
    extras: Extras = Extras()
    frozen: tuple[Tensor, Tensor] | None = None
    """A₀ (R, in) and B₀ (out, R) that the change is a difference from."""


class Router(Protocol):
    """What a layer asks of its bank."""

    structure: int
    """Grows by one whenever adapters are added or removed."""

    @property
    def slot_numbers(self) -> Mapping[str, int]:
        """Each adapter's number in tables on the device."""
        ...

    @property
    def table_slots(self) -> int:
        """Slots that tables are made for."""
        ...

    def route_in_force(self, layer: str) -> Routing | None:
        """The routing for this call, or None when the bank has no adapter. `layer` is for messages."""
        ...


class SlotParameters(nn.Module):
    """Shows the slots' leaves to trainers (`model.named_parameters()`), and keeps them out of `state_dict` and `.to(dtype)`."""

    def __init__(self, stores: Mapping[str, RankStore]) -> None:
        """`stores`: by what their leaves' names begin with."""
        super().__init__()
        self.__dict__["stores"] = dict(stores)

    def show(self, prefix: str, store: RankStore) -> None:
        """Have one more store, under names that begin with `prefix`."""
        self.__dict__["stores"][prefix] = store

    def refresh(self) -> None:
        """Register the stores' present leaves, named `A_<adapter>`, `B_<adapter>` and so on."""
        self._parameters.clear()
        for prefix, store in self.__dict__["stores"].items():
            for name, slot in store.slots.items():
                safe = name.replace(".", "%2E")  # a parameter's name can't hold a dot
                for role, leaf in slot.by_role.items():
                    self.register_parameter(f"{prefix}{role}_{safe}", leaf)

    def _apply(self, fn: Any, recurse: bool = True) -> SlotParameters:
        return self  # the wrapper moves the stores as a whole

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class Carrier(ABC):
    """What the bank asks of every such place."""

    path: str
    """By which adapters name it."""
    base: nn.Module
    """The base model's module."""
    store: RankStore
    slots: dict[str, LayerSlot]
    router: Router
    reached: bool
    """Whether a forward pass has come by."""
    in_turn: bool = False
    """Whether every pass comes by, whatever a router chooses."""

    def add_slot(self, name: str, values: SlotValues, dropout: float, seed: int) -> SlotTensors:
        """Reserve room for an adapter's part; its values are written by `write`."""
        extras = values.extras
        shapes = extras.shapes(self.base, self.store.out_features) if extras else None
        tensors = self.store.allocate(name, len(values.A), decomposed=values.decomposed, extras=shapes)
        ids = TokenIds(extras.ids) if extras.ids else None
        frozen = None if values.frozen is None else FrozenPart(torch.zeros_like(tensors.A_RI), torch.zeros_like(tensors.B_RO))
        self.slots[name] = LayerSlot(tensors, values.rank, values.scaling, dropout, seed, ids=ids, frozen=frozen)
        self._refresh()
        return tensors

    def share_slot(self, name: str, of: LayerSlot, dropout: float) -> None:
        """Read the numbers of an adapter's part in another place, turned: its B as A, its A as B; rows of a table as they are."""
        tensors = SlotTensors(0, 0, of.tensors.B_RO, of.tensors.A_RI, extras=of.extras)
        self.slots[name] = LayerSlot(tensors, of.rank, of.scaling, dropout, of.seed, shared=True, ids=of.ids)

    def remove_slot(self, name: str) -> None:
        """Give the adapter's room back."""
        if not self.slots.pop(name).shared:
            self.store.free(name)
        self._refresh()

    @property
    @abstractmethod
    def fusable(self) -> bool:
        """Whether a compiled block may compute what is adapted here itself."""

    @property
    def follows(self) -> bool:
        """Whether what is computed here, outside of compiled code, reads nothing of a route but its tables."""
        return False

    @abstractmethod
    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet."""

    @abstractmethod
    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, out of its layers by path."""

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaves."""
        tensors = self.slots[name].tensors
        with torch.no_grad():
            tensors.A_RI.copy_(values.A)
            tensors.B_RO.zero_() if values.B is None else tensors.B_RO.copy_(values.B.t())
        frozen = self.slots[name].frozen
        if frozen is not None and values.frozen is not None:
            frozen.write(values.frozen[0], values.frozen[1].t())

    def move(self, device: torch.device) -> None:
        """Take the adapters' numbers to where the layer has gone."""
        self.store.to(device)
        for slot in self.slots.values():
            if slot.frozen is not None:
                slot.frozen.to(device)

    def pair(self, name: str) -> tuple[Tensor, Tensor, int]:
        """Copies on the CPU of an adapter's A (R, in) and B (out, R), with where it started behind; of how many ranks that is."""
        slot = self.slots[name]
        A_RI, B_RO = slot.tensors.A_RI.detach(), slot.tensors.B_RO.detach()
        if slot.frozen is not None:
            A_RI, B_RO = slot.frozen.joined(A_RI, B_RO)
        return A_RI.to("cpu", copy=True), B_RO.t().to("cpu", copy=True).contiguous(), len(A_RI) - len(slot.tensors.A_RI)

    @abstractmethod
    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values here, on the CPU, by path."""

    def adapter_extras(self, name: str) -> dict[str, Tensor]:
        """A copy of what an adapter has here beside its layers, on the CPU, by role; nothing where it reads another place's."""
        slot = self.slots[name]
        return {} if slot.shared else copied(slot.extras)

    @abstractmethod
    def _refresh(self) -> None:
        """Show the present leaves to trainers."""
