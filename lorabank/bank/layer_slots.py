"""`SlottedLayer`: a base layer where it stands in the model, with the adapters' numbers beside it: made, filled, read, moved."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, LayerSlot, Router, SlotParameters, SlotValues, vectors_of
from lorabank.bank.dense import dense_kind
from lorabank.bank.extra.extras import fill, lora_bias_of
from lorabank.bank.fused import LayerCall, LayerTables, table_width
from lorabank.bank.init import initial, path_generator
from lorabank.bank.kinds import EMBEDDING, LayerKind, layer_kind
from lorabank.bank.owners import OwnerWatch
from lorabank.bank.slices import SliceCarrier
from lorabank.bank.starts.frozen import split
from lorabank.bank.starts.spectral import start_of_difference
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import Adapted, check_loaded
from lorabank.config.adapter import AdapterConfig
from lorabank.config.inits import is_difference
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.output_slice import OutputSlice
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import output_norms
from lorabank.kernels.segments import Outputs, drop_threshold
from lorabank.kernels.tables import bits32


class SlottedLayer(Adapted, Carrier):
    """Holds the slots; what a call computes with them is `LoRALayer`'s."""

    def __init__(
        self, base: nn.Module, path: str, router: Router, rows_lost: str | None = None, *, beside_turned: bool = False
    ) -> None:
        """`rows_lost`: why the route can't follow this layer's input to the batch's rows, None when it can.

        `beside_turned`: attention beside this layer has its rows second, so this layer's input may have as well.
        """
        kind = layer_kind(base)
        if kind is None:
            raise TypeError(f"layer {path!r}: {type(base).__name__} can't be adapted")
        weight = base.get_parameter("weight")
        check_loaded(path, weight)
        store = RankStore(*kind.features(base), weight.device)
        super().__init__(base, path, {"": store})
        own = vars(self)
        own["kind"], own["store"] = kind, store
        own["held"] = kind.tensors(base._parameters) if kind.held else None
        own["slots"], own["slices"] = {}, {}
        own["reached"] = False
        own["read"] = 0
        own["call"] = None
        own["moved"] = False
        own["router"] = router
        own["rows_lost"], own["folded"], own["called"] = rows_lost, None, None
        own["beside_turned"] = beside_turned
        own["low_rank_map"] = kind.low_rank_map(base)
        own["_path_seed"] = zlib.crc32(path.encode())
        own["dense"] = False

    kind: LayerKind
    _path_seed: int
    slices: dict[str, SliceCarrier]
    """Projections of a fused layer that adapters change apart from the others, by name."""
    low_rank_map: LowRankMap
    dense: bool
    """Of a convolution in groups: whether the adapters' A sees all channels."""
    read: int
    """Identity of the last plain call's input, which layers of a module that read one x have in common."""
    rows_lost: str | None
    beside_turned: bool
    folded: OwnerWatch | None
    """Of the module that folds the batch's rows with what follows, ahead of this layer."""
    called: ContextVar[bool] | None
    """Set by a call, where the module above has other ways past this layer."""
    held: list[Tensor] | None
    """What the products take as their base, where that is made once."""
    moved: bool
    """Whether a compiled block keeps the base weight as a view of a wider tensor (engine/borders.py)."""
    call: LayerCall | None
    """Set by a compiled block around its call, for this layer's part in it."""

    def extra_repr(self) -> str:
        return f"{self.base!r}, slots={list(self.slots)}"

    def watch(self, folded: OwnerWatch | None, called: ContextVar[bool] | None) -> None:
        """Note what the modules above this layer tell of its input, and where its calls are to be told."""
        vars(self).update(folded=folded, called=called)

    def slot_tables(self, numbers: Mapping[str, int], slots: int) -> LayerTables:
        """Where each of the bank's slots is in this layer. `numbers`: adapter to its slot number, below `slots`."""
        ranks, scaling, kept = torch.zeros(slots, 2, dtype=torch.int32), torch.zeros(slots), torch.zeros(slots)
        odds = torch.zeros(slots, 2, dtype=torch.int64)
        for name, slot in self.slots.items():
            number = numbers[name]
            ranks[number, 0], ranks[number, 1] = slot.tensors.start, slot.rank
            scaling[number], kept[number] = slot.scaling, slot.scaling / (1.0 - slot.dropout)
            odds[number, 0], odds[number, 1] = (slot.seed ^ self._path_seed) & 0xFFFFFFFF, drop_threshold(slot.dropout)
        device, width = self.store.device, table_width(max(slot.rank for slot in self.slots.values()))
        return LayerTables(ranks.to(device), scaling.to(device), kept.to(device), bits32(odds).to(device), width)

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet."""
        if not rank:
            return self._without_ranks()
        self._take_form(dense=False)
        if is_difference(config.init):
            return self.difference(config, rank, scaling, path_generator(seed, self.path))
        size = self.store.in_features, self.store.out_features
        A, B = initial(config.init, rank, size, seed, self.path, looks_up=self.kind.storage == EMBEDDING)
        return SlotValues(A, B, None, config.use_dora, rank, scaling)

    def difference(
        self, config: AdapterConfig, rank: int, scaling: float, generator: torch.Generator, outputs: OutputSlice | None = None
    ) -> SlotValues:
        """Where an adapter of the layer, or of some of its outputs, begins whose change is the difference from there."""
        weight_OI = self.kind.weight_oi(self._parameters, torch.float32)
        if outputs is not None:
            weight_OI = weight_OI[outputs.rows.to(weight_OI.device)]
        A, B = start_of_difference(config, weight_OI, rank, scaling, generator)
        return SlotValues(A, B, None, False, rank, scaling, frozen=(A, B))

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, out of its layers by path."""
        if self.path not in layers:
            return self._without_ranks()
        mine = layers[self.path]
        self._take_form(dense=mine.dense)
        A, B, frozen = split(mine)
        decomposed, extras = mine.magnitude is not None, lora_bias_of(mine)
        return SlotValues(A, B, mine.magnitude, decomposed, len(A), mine.scaling, extras=extras, frozen=frozen)

    def _without_ranks(self) -> SlotValues:
        """Of an adapter that has only extras here."""
        return SlotValues(torch.zeros(0, self.store.in_features), None, None, False, 0, 1.0)

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaves. A magnitude that isn't given is the norm of what it has become."""
        super().write(name, values)
        slot = self.slots[name]
        tensors = slot.tensors
        with torch.no_grad():
            fill(self.base, tensors.extras, values.extras.values, slot.ids)
            if tensors.magnitude_O is not None:
                tensors.magnitude_O.copy_(self.norms(slot) if values.magnitude is None else values.magnitude)

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values here, on the CPU, by path."""
        slot, kernel, base = self.slots[name], self.kind.kernel(self.base), self.base
        if not slot.rank:
            return {}
        A, B, frozen_rank = self.pair(name)
        made = AdapterLayer(A, B, slot.scaling, looks_up=self.kind.storage == EMBEDDING, frozen_rank=frozen_rank)
        made = replace(made, **vectors_of(slot))
        if kernel:
            made = replace(made, A=A.view(len(A), -1, *kernel), groups=self.kind.groups(base), dense=self.dense)
        return {self.path: replace(made, attention=self.attends)}

    def _take_form(self, *, dense: bool) -> None:
        """Keep A of all channels, or of a group's. Raises AdapterFileError beside an adapter of the other form."""
        if dense == self.dense:
            return
        if self.slots:
            raise AdapterFileError(
                f"layer {self.path!r} is a convolution in groups. A of {', '.join(self.slots)} sees "
                f"{'all channels, as PEFT trains it, and' if self.dense else 'those of a group, and'} that of the new adapter "
                "doesn't see the same. Load them into banks of their own, over copies of the model."
            )
        own, plain = vars(self), layer_kind(self.base)
        assert plain is not None
        own["dense"], own["kind"] = dense, dense_kind(plain) if dense else plain
        own["low_rank_map"] = self.kind.low_rank_map(self.base)
        own["store"] = RankStore(*self.kind.features(self.base), self.store.device)
        self._modules["lora"] = SlotParameters({"": self.store})

    def _refresh(self) -> None:
        self._slot_parameters.refresh()

    def show(self) -> None:
        """Show the present leaves to trainers."""
        self._refresh()

    def slice(self, name: str, outputs: OutputSlice) -> SliceCarrier:
        """A projection of this layer, made when it is first asked for."""
        if name not in self.slices:
            self.slices[name] = SliceCarrier(self, name, outputs, self.router)
            self._slot_parameters.show(f"{name}_", self.slices[name].store)
        return self.slices[name]

    @property
    def attends(self) -> bool:
        """Whether it is a projection of an `nn.MultiheadAttention` that PEFT's files name by the module."""
        return False

    @property
    def in_use(self) -> bool:
        """Whether an adapter changes the layer, or a slice of it."""
        return bool(self.slots) or self._sliced

    @property
    def asks(self) -> bool:
        """Whether a call needs the rows that the module above was given; a compiled block's tables have them."""
        return self.call is None and self.in_use

    @property
    def _sliced(self) -> bool:
        return any(carrier.slots for carrier in self.slices.values())

    def bring_home(self) -> None:
        """Make a moved base weight a tensor of its own again."""
        if self.moved:
            weight = self.base.get_parameter("weight")
            if weight.untyped_storage().nbytes() > weight.numel() * weight.element_size():  # nobody else has replaced it
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            vars(self)["moved"] = False

    def _apply(self, fn: Any, recurse: bool = True) -> SlottedLayer:
        self.base._apply(fn, recurse)  # into the dictionaries that are this layer's too
        device = self.base.get_parameter("weight").device
        for place in (self, *self.slices.values()):
            place.move(device)
        if self.held is not None and self.held[0].device != device:
            vars(self)["held"] = self.kind.tensors(self._parameters)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.moved and not keep_vars:  # what saves a view saves the adapters beside it in the wider tensor
            weight: Tensor = destination[f"{prefix}weight"]
            destination[f"{prefix}weight"] = weight.clone(memory_format=torch.contiguous_format)

    def stored(self) -> list[Tensor]:
        """The frozen weight as its products take it."""
        return self.kind.tensors(self._parameters) if self.held is None else self.held

    def norms(self, slot: LayerSlot, outputs: Outputs | None = None) -> Tensor:
        """‖W + scaling · B A‖ of each output, or of a slice's."""
        weight_OI, tensors = self.kind.weight_oi(self._parameters, torch.float32), slot.tensors
        mine = weight_OI if outputs is None else outputs.rows_of(weight_OI)
        return output_norms(mine, tensors.A_RI, tensors.B_RO, slot.scaling)
