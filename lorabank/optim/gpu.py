"""AdamW of many slots together on a GPU, without waiting for it: kernels/gpu/adamw.py over all their leaves.

What a step needs of the host is the addresses of fresh gradients and a few numbers a slot; norm, clipping and step counts stay on
the device. Slots that don't suit, and other rules, take `plain.py`, which waits once a slot.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorabank.kernels.gpu import runtime
from lorabank.optim.slots import Placement, Slot, SlotStep

if TYPE_CHECKING:
    from lorabank.kernels.gpu.adamw import AdamWTable

KEPT_TABLES = 8
"""Sets of slots that step together and are remembered: adapters with other accumulations are due in other passes."""

_Key = tuple[tuple[Placement, int, int, int], ...]
"""Per slot its leaves' placement and the addresses of its moments and step count."""


def suits(slot: Slot) -> bool:
    """Whether the kernels take this slot, as it is placed: AdamW on contiguous fp32 leaves on a GPU that Triton compiles for."""
    kernels = slot.config.rule == "adamw" and on_kernels(slot.placement.device)
    return kernels and slot.placement.fp32 and _all_fp32(slot.state)


def on_kernels(device: torch.device) -> bool:
    """Whether the kernels are for tensors on `device`. Not a CPU's, though tests run them there."""
    return device.type == "cuda" and runtime.available(device)


class GpuSteps:
    """Steps of slots that were placed and that `suits` let through. Keeps the tables of the sets of slots that it met last."""

    def __init__(self) -> None:
        self._tables: OrderedDict[_Key, AdamWTable] = OrderedDict()

    def step(self, slots: Sequence[Slot], rates: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, SlotStep]:
        """One step of slots on one device, put on its current stream. Gradients are cleared."""
        from lorabank.kernels.gpu.adamw import SlotNumbers  # here, since it imports Triton

        table = self._table(slots)
        gradients = _gradients(slots)
        results = table.step(
            _addresses(gradients),
            [
                SlotNumbers(
                    learning_rate=float(rates[slot.name]),
                    loraplus_ratio=slot.config.loraplus_ratio,
                    weight_decay=slot.config.weight_decay,
                    beta1=slot.config.betas[0],
                    beta2=slot.config.betas[1],
                    eps=slot.config.eps,
                    tokens=float(tokens[slot.name]),
                    max_grad_norm=slot.config.max_grad_norm,
                )
                for slot in slots
            ],
        )
        done = {slot.name: SlotStep.later(functools.partial(results.of, i)) for i, slot in enumerate(slots)}
        for slot in slots:
            slot.clear()  # after the launch, since the host then has time
            slot.counts_itself(done[slot.name])
        return done

    def _table(self, slots: Sequence[Slot]) -> AdamWTable:
        key = tuple(_key(slot) for slot in slots)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = _made(slots, key)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return table


def _key(slot: Slot) -> tuple[Placement, int, int, int]:
    slot.ready_state()
    first, second = slot.state
    return slot.placement, first.data_ptr(), second.data_ptr(), slot.count_on(slot.placement.device).data_ptr()


def _made(slots: Sequence[Slot], key: _Key) -> AdamWTable:
    from lorabank.kernels.gpu.adamw import AdamWTable, SlotPlaces

    places = [
        SlotPlaces(
            leaves=placement.addresses,
            sizes=slot.sizes,
            is_b=[name.endswith(".B") for name in slot.leaves],
            first=first,
            second=second,
            step=step,
        )
        for slot, (placement, first, second, step) in zip(slots, key, strict=True)
    ]
    return AdamWTable(places, key[0][0].device)


def _gradients(slots: Sequence[Slot]) -> list[Tensor | None]:
    """The leaves' gradients as the kernels read them, over the slots in order."""
    gradients = [leaf.grad for slot in slots for leaf in slot.parameters]
    present = [g for g in gradients if g is not None]
    # both as a whole: one look at each of tens of thousands of leaves costs milliseconds
    if all(map(Tensor.is_contiguous, present)) and _all_fp32(present):
        return gradients
    return [None if g is None else g.to(torch.float32).contiguous() for g in gradients]


def _addresses(gradients: Sequence[Tensor | None]) -> list[int]:
    return [0 if g is None else g.data_ptr() for g in gradients]  # the kernels take 0 for zeros


def _all_fp32(tensors: Sequence[Tensor]) -> bool:
    return set(map(operator.attrgetter("dtype"), tensors)) <= {torch.float32}
