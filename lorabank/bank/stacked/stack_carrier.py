"""One stacked parameter of an experts module, with the adapters' parts in it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorabank.bank.carrier import Carrier, LayerSlot, Router, SlotValues
from lorabank.bank.fused import table_width
from lorabank.bank.init import initial_A
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.storage import RankStore
from lorabank.bank.wrapping import check_loaded
from lorabank.config.adapter import AdapterConfig
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.stacks import joined
from lorabank.kernels.gpu import runtime
from lorabank.kernels.segments import drop_threshold
from lorabank.kernels.stacked import StackTables
from lorabank.kernels.tables import bits32

READ_ON_GPU = ((9, 0), (10, 0))
"""Compute capabilities for which torch's grouped product reads nothing on the host: of bf16, rows of multiples of 16 bytes."""


class StackCarrier(Carrier):
    """One stacked parameter with its slots: an adapter's A (E · rank, in) and B (E · rank, out), one expert behind the other."""

    in_turn = True

    def __init__(self, stack: ExpertStack, path: str, router: Router) -> None:
        weight = stack.get_parameter("weight")
        check_loaded(path, weight)
        self.stack, self.path, self.base, self.router = stack, path, stack.experts, router
        self.store = RankStore(*stack.size, weight.device)
        self.slots: dict[str, LayerSlot] = {}
        self.reached = False
        self.shown: Callable[[], None] | None = None
        """Called when the leaves are others."""
        self.path_seed = zlib.crc32(path.encode())
        self._made_for: tuple[int, torch.device] | None = None
        self._tables: dict[tuple[tuple[str, ...], bool], StackTables] = {}

    @property
    def fusable(self) -> bool:
        """Never: which tokens reach an expert is known when they do."""
        return False

    @property
    def follows(self) -> bool:
        """Where the grouped kernels run, and torch's grouped product reads where experts end on the GPU."""
        weight = self.stack.get_parameter("weight")
        if weight.device.type != "cuda" or weight.dtype != torch.bfloat16 or any(size % 8 for size in self.stack.size):
            return False
        return torch.cuda.get_device_capability(weight.device) in READ_ON_GPU and runs_kernels(weight)

    def fresh(self, config: AdapterConfig, rank: int, scaling: float, seed: int) -> SlotValues:
        """What changes nothing yet: an A of each expert's own, B zero."""
        size = self.store.in_features
        A = torch.cat([initial_A(config.init, rank, size, seed, part) for part in self.parts])
        return SlotValues(A, None, None, False, rank, scaling)

    @property
    def parts(self) -> list[str]:
        """Each expert's path in an adapter."""
        return part_paths(self.path, self.stack)

    def values_of(self, layers: Mapping[str, AdapterLayer]) -> SlotValues:
        """A trained adapter's, as `joined` makes one rank and scaling of its experts'."""
        A, B, scaling = joined([layers.get(path) for path in self.parts])
        return SlotValues(A.flatten(0, 1), B.transpose(0, 1).flatten(1), None, False, A.shape[1], scaling)

    def tables(self, names: Sequence[str], *, dropping: bool) -> StackTables:
        """Where the experts of these slots are, and what their dropout is drawn from; kept while the bank is as it is."""
        key, now = (tuple(names), dropping), (self.router.structure, self.store.device)
        if self._made_for != now:
            self._made_for, self._tables = now, {}
        if key not in self._tables:
            self._tables[key] = self._make_tables(names, dropping)
        return self._tables[key]

    def _make_tables(self, names: Sequence[str], dropping: bool) -> StackTables:
        count, slots = self.stack.count, [self.slots.get(name) for name in names]
        ranks = torch.zeros(len(names), count, 2, dtype=torch.int64)
        scaling, odds = torch.zeros(len(names), count), torch.zeros(len(names), count, 2, dtype=torch.int64)
        for i, slot in enumerate(slots):
            if slot is not None:
                ranks[i, :, 0] = slot.tensors.start + torch.arange(count) * slot.rank
                ranks[i, :, 1] = slot.rank
                scaling[i] = slot.scaling / (1.0 - slot.dropout) if dropping else slot.scaling
                odds[i, :, 0], odds[i, :, 1] = (slot.seed ^ self.path_seed) & 0xFFFFFFFF, drop_threshold(slot.dropout)
        device, present = self.store.device, [slot for slot in slots if slot is not None]
        numbers = torch.tensor([self.router.slot_numbers[name] for name in names])
        places = torch.full((self.router.table_slots + 1,), -1)
        places[numbers] = torch.arange(len(names))
        return StackTables(
            ranks_V2=ranks.view(-1, 2).to(torch.int32).to(device),
            scaling_V=scaling.view(-1).to(device),
            odds_V2=bits32(odds.view(-1, 2)).to(device),
            numbers_V=numbers.repeat_interleave(count).to(device),
            places_S=places.to(device),
            width=table_width(max((slot.rank for slot in present), default=1)),
            ranges=tuple((slot.tensors.start, slot.tensors.stop) for slot in present),
        )

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """A copy of an adapter's present values, a layer an expert, on the CPU."""
        slot, parts = self.slots[name], self.parts
        A = slot.tensors.A_RI.detach().cpu().view(len(parts), slot.rank, -1)
        B = slot.tensors.B_RO.detach().cpu().view(len(parts), slot.rank, -1).transpose(1, 2)
        return {
            path: AdapterLayer(A[i].clone(), B[i].clone(memory_format=torch.contiguous_format), slot.scaling, stack=len(parts))
            for i, path in enumerate(parts)
        }

    def _refresh(self) -> None:
        if self.shown is not None:
            self.shown()


def part_paths(path: str, stack: ExpertStack) -> list[str]:
    """The paths by which an adapter's layers name a stack's experts."""
    return [f"{path}.{expert}" for expert in range(stack.count)]


def runs_kernels(weight: Tensor) -> bool:
    """Whether the grouped kernels run for experts of these weights: on a GPU. Triton's interpreter is for tests that ask."""
    return weight.is_cuda and runtime.available(weight.device) and runtime.refused(weight.device, weight.dtype) is None
