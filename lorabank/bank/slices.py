"""Slices of fused layers: q, k and v in one layer, or gate and up, each with an adapter and ranks of its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, LayerSlot, Router, SlotValues, vectors_of
from lorabank.bank.extra.extras import add_column_shifts, fill, lora_bias_of
from lorabank.bank.init import initial, path_generator
from lorabank.bank.routing import SlotRows
from lorabank.bank.starts.frozen import split
from lorabank.bank.storage import RankStore
from lorabank.config.adapter import AdapterConfig
from lorabank.config.inits import is_difference
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.output_slice import OutputSlice, others
from lorabank.kernels.norms import base_norms
from lorabank.kernels.segments import Outputs

if TYPE_CHECKING:
    from lorabank.bank.layer_slots import SlottedLayer


class FusedSlice(nn.Module):
    """One projection of a fused layer, as `targets` and adapters see it. It stands nowhere in the model."""

    def __init__(self, layer: nn.Module, outputs: OutputSlice, features: tuple[int, int]) -> None:
        """`features`: (in, out) of the whole layer."""
        super().__init__()
        self.__dict__["layer"], self.outputs, self.features = layer, outputs, (features[0], outputs.count)
        self._parameters["weight"] = layer.get_parameter("weight")

    layer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: the layer computes all its slices at once."""
        raise NotImplementedError


def whole_of(path: str, layer: nn.Module) -> tuple[str, nn.Module, OutputSlice | None]:
    """(path, layer) of the module that computes it, and which of its outputs it is; None for all of them."""
    if isinstance(layer, FusedSlice):
        return path.rpartition(".")[0], layer.layer, layer.outputs
    return path, layer, None


class SliceCarrier(Carrier):
    """One projection of a wrapped fused layer with the adapters' parts in it."""

    def __init__(self, layer: SlottedLayer, name: str, outputs: OutputSlice, router: Router) -> None:
        self.layer, self.outputs, self.router = layer, outputs, router
        self.path, self.base = f"{layer.path}.{name}", layer.base
        self.store = RankStore(layer.store.in_features, outputs.count, layer.store.device)
        self.slots: dict[str, LayerSlot] = {}
        self.path_seed = zlib.crc32(self.path.encode())
        self.changed = Outputs(outputs.start, outputs.width, outputs.period)
        self._columns: Tensor | None = None

    @property
    def reached(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a forward pass has come by the layer."""
        return self.layer.reached

    @property
    def fusable(self) -> bool:
        """Never: a compiled block's products are a whole layer's."""
        return False

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet. Spectra are those of the slice's own rows of the weight."""
        if is_difference(config.init):
            return self.layer.difference(config, rank, scaling, path_generator(seed, self.path), self.outputs)
        size = self.store.in_features, self.store.out_features
        A, B = initial(config.init, rank, size, seed, self.path, looks_up=False)
        return SlotValues(A, B, None, config.use_dora, rank, scaling)

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, out of its layers by path."""
        mine = layers[self.path]
        A, B, frozen = split(mine)
        decomposed, extras = mine.magnitude is not None, lora_bias_of(mine)
        return SlotValues(A, B, mine.magnitude, decomposed, len(A), mine.scaling, extras=extras, frozen=frozen)

    def write(self, name: str, values: SlotValues) -> None:
        """Copy values into an adapter's leaves. A magnitude that isn't given is the norm of what it has become."""
        super().write(name, values)
        slot = self.slots[name]
        fill(self.base, slot.extras, values.extras.values, slot.ids)
        if (magnitude := slot.tensors.magnitude_O) is not None:
            with torch.no_grad():
                magnitude.copy_(self.layer.norms(slot, self.changed) if values.magnitude is None else values.magnitude)

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values here, on the CPU, by path."""
        A, B, frozen_rank = self.pair(name)
        slot = self.slots[name]
        made = AdapterLayer(A, B, slot.scaling, outputs=self.outputs, frozen_rank=frozen_rank)
        return {self.path: replace(made, attention=self.layer.attends, **vectors_of(slot))}

    def columns(self, device: torch.device) -> Tensor:
        """int64: its outputs among the layer's."""
        if self._columns is None or self._columns.device != device:
            self._columns = self.outputs.rows.to(device)
        return self._columns

    def _refresh(self) -> None:
        self.layer.show()


def norms_beside(layer: SlottedLayer, name: str) -> Tensor | None:
    """‖W‖ of those outputs that no slice of a decomposed adapter has, in order; None where it has no such slice, or all."""
    parts = [each for each in layer.slices.values() if name in each.slots and each.slots[name].tensors.magnitude_O is not None]
    rest = others([each.outputs for each in parts]) if parts else ()
    return base_norms(layer.kind.weight_oi(layer._parameters, torch.float32))[rest].cpu() if len(rest) else None


def add_slice_biases(y: Tensor, carriers: Iterable[SliceCarrier], plan: Sequence[SlotRows], units: int) -> Tensor:
    """y with the biases of lora_B of the slots in a layer's slices."""
    used = [
        (rows, slot, carrier.columns(y.device))
        for carrier in carriers
        for rows in plan
        if (slot := carrier.slots.get(rows.slot)) is not None and slot.extras
    ]
    return add_column_shifts(y, used, units) if used else y
