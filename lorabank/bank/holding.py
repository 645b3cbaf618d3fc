"""`Holding`: what a bank holds, read: adapters as values, their parameters, a summary."""

from __future__ import annotations

from collections.abc import Collection, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import linear_layers, output_head_paths, unsupported_linear_maps
from lorabank.bank.carrier import Carrier, SlotValues
from lorabank.bank.extra.extras import BIAS, ROWS
from lorabank.bank.fit import task_type
from lorabank.bank.fused import SLOTS
from lorabank.bank.fused_layers import Slices
from lorabank.bank.in_full.heads import head_parameters, peft_task
from lorabank.bank.in_full.saved_bank import SavedModules
from lorabank.bank.owners import Owners
from lorabank.bank.reach import ReachCheck
from lorabank.bank.routed import Routed
from lorabank.bank.slices import SliceCarrier, norms_beside
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.bank.storages.quantized import count_parameters, storage_of
from lorabank.bank.summary import AdapterSummary, BankSummary, count_kinds
from lorabank.bank.wrapped import Wrapped
from lorabank.bank.wrappers import base_path, base_prefix
from lorabank.bank.wrapping import unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterNameError, LorabankError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.token_rows import TokenRows


@dataclass(frozen=True)
class HeldSlot:
    """One adapter of a bank: what it was made or loaded with, and the places that it is in."""

    config: AdapterConfig
    seed: int
    paths: tuple[str, ...]
    shared: Mapping[str, str] = field(default_factory=dict)
    """Paths among them that read another's numbers → whose."""
    base_model: str | None = None
    task_type: str | None = None
    base_storage: str | None = None
    """How the base was stored where a loaded adapter was trained, if in fewer than 16 bits."""
    start: AdapterStart | None = None
    """What it was made with, where that was prepared."""
    num_labels: int | None = None
    """Of the head that was made for it."""
    loaded: bool = False
    """Whether its first values were a trained adapter's, which are kept nowhere here."""


def fresh(place: Carrier, slot: HeldSlot, rank: int, scaling: float) -> SlotValues:
    """What an untrained adapter has in a place."""
    if slot.start is not None and rank:
        return slot.start.values(place.path, rank, (place.store.in_features, place.store.out_features), scaling)
    return place.fresh(slot.config, rank, scaling, slot.seed)


class Holding(Routed):
    """The state of a bank, and what can be asked of it without changing it."""

    def __init__(
        self,
        model: nn.Module,
        kept: Collection[str] = (),
        fused: Mapping[str, Slices] | None = None,
        head: str | None = None,
    ) -> None:
        """`kept`: names of the model's own parameters that go on training. `fused`: slices that were declared of layers. `head`:
        a classifier's, declared."""
        super().__init__()
        self.model, self.fused, self.head = model, dict(fused or {}), head
        self.kept = frozenset(kept)
        self.structure = 0
        self._slots: dict[str, HeldSlot] = {}
        self._numbers: dict[str, int] = {}
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._fingerprint: Fingerprint | None = None
        self._heads = head_parameters(model, head)
        self._detached = False
        self._reach = ReachCheck(model, self)
        self._owners = Owners(model)
        self._wrapped = Wrapped(model, self._reach, self._owners)
        self._layers = self._wrapped.layers
        self._saved = SavedModules(model, self._reach, self._owners, head)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.kept)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank, in the order in which they were added."""
        return tuple(self._slots)

    @property
    def _known(self) -> KeysView[str]:
        return self._slots.keys()

    @property
    def slot_numbers(self) -> Mapping[str, int]:
        """Each adapter's number in tables on the device. It keeps it while it is in the bank."""
        return self._numbers

    @property
    def table_slots(self) -> int:
        """Slots that tables of this bank are made for."""
        return -(-(max(self._numbers.values(), default=0) + 1) // SLOTS) * SLOTS

    @property
    def device(self) -> torch.device:
        """Where the base model's first parameter lives."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the base model, taken once."""
        if self._fingerprint is None:
            prefix = base_prefix(self.model)
            without = self.kept | self._heads
            self._fingerprint = Fingerprint.of(
                self.model, without=without, named=lambda name: base_path(name, prefix), unwrapped=unwrapped
            )
        return self._fingerprint

    def config(self, name: str) -> AdapterConfig:
        """The configuration of an adapter."""
        return self._slot(name).config

    def adapter(self, name: str) -> Adapter:
        """A copy of an adapter's present values, on the CPU, apart from the bank."""
        slot, prefix = self._slot(name), base_prefix(self.model)
        layers: dict[str, AdapterLayer] = {}
        biases: dict[str, Tensor] = {}
        rows: dict[str, TokenRows] = {}
        norms: dict[str, Tensor] = {}
        for path in slot.paths:
            place = self._layers[path]
            if isinstance(place, SliceCarrier) and (fused := base_path(place.layer.path, prefix)) not in norms:
                beside = norms_beside(place.layer, name)
                norms |= {} if beside is None else {fused: beside}
            layers |= {base_path(part, prefix): layer for part, layer in place.adapter_layers(name).items()}
            extras, ids = place.adapter_extras(name), place.slots[name].ids
            if BIAS in extras:
                biases[base_path(path, prefix)] = extras[BIAS]
            if ROWS in extras and ids is not None:
                rows[base_path(path, prefix)] = TokenRows(ids.ids, extras[ROWS])
        base_model = slot.base_model or getattr(getattr(self.model, "config", None), "_name_or_path", None) or None
        storage = storage_of(self.model) or slot.base_storage
        return Adapter(
            config=slot.config,
            layers=layers,
            base_norms=norms,
            biases=biases,
            token_rows=rows,
            fingerprint=self.fingerprint,
            base_model=base_model,
            task_type=slot.task_type or task_type(self.model) or peft_task(self.model, self._saved.paths(name)),
            modules=self._saved.values(name),
            metadata={} if storage is None else {BASE_STORAGE: storage},
        )

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The trainable leaves of one adapter, or of all: A (rank, in) and B (rank, out) of each layer in turn."""
        return [p for _, p in self.named_parameters(name)]

    def named_parameters(self, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """`<layer path>.A`, `.B`, `.magnitude` (DoRA's), `.bias`, `.lora_bias`, `.rows` (of a table), and the leaf.

        With name=None `<adapter>:<layer path>.A` and so on. Then `<module path>.<parameter's name>` of what `modules_to_save`
        trains in full.
        """
        for adapter in [name] if name is not None else list(self._slots):
            prefix = "" if name is not None else f"{adapter}:"
            slot = self._slot(adapter)
            for path in (path for path in slot.paths if path not in slot.shared):
                tensors = self._layers[path].slots[adapter].tensors
                for role, leaf in tensors.by_role.items():
                    yield f"{prefix}{path}.{role}", leaf
            for key, leaf in self._saved.leaves(adapter):
                yield f"{prefix}{key}", leaf

    def frozen_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """`<layer path>.A` / `.B` and the tensor of where an adapter started, of one whose change is a difference from there."""
        for path in self._slot(name).paths:
            frozen = self._layers[path].slots[name].frozen
            if frozen is not None:
                yield from frozen.named(path)

    def token_ids(self, name: str) -> dict[str, tuple[int, ...]]:
        """`<layer path>.rows` of each table that an adapter trains rows of, and the ids that these are of, in order."""
        slot = self._slot(name)
        own = ((path, self._layers[path].slots[name].ids) for path in slot.paths if path not in slot.shared)
        return {f"{path}.{ROWS}": ids.ids for path, ids in own if ids is not None}

    def parameter_groups(self, name: str, learning_rate: float, loraplus_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Groups for any torch optimizer: A with `learning_rate`, B with `loraplus_ratio` times it (LoRA+, arXiv:2402.12354)."""
        named = list(self.named_parameters(name))
        return [
            {"params": [p for key, p in named if not key.endswith(".B")], "lr": learning_rate},
            {"params": [p for key, p in named if key.endswith(".B")], "lr": learning_rate * loraplus_ratio},
        ]

    def summary(self) -> BankSummary:
        """What is adapted, what is not, and each adapter's parameters. Print it."""
        heads = output_head_paths(self.model)
        base = [p for name, p in self.model.named_parameters() if name in self._required_grad]
        low_rank = {name: [p for p in slot.paths if self._layers[p].slots[name].rank] for name, slot in self._slots.items()}
        adapted = {path for paths in low_rank.values() for path in paths}
        adapted |= {
            self._layers[path].path.rpartition(".")[0] for path in adapted if isinstance(self._layers[path], SliceCarrier)
        }
        whole = tuple(f"{path}." for path, module in self._saved.modules.items() if module.slots)
        return BankSummary(
            base_parameters=count_parameters(self.model, base),
            adapters={
                name: AdapterSummary(
                    rank=slot.config.rank,
                    alpha=slot.config.alpha,
                    parameters=sum(p.numel() for p in self.parameters(name)),
                    layers=len(low_rank[name]),
                    kinds=count_kinds(low_rank[name]),
                    saved=self._saved.paths(name),
                )
                for name, slot in self._slots.items()
            },
            adapted_layers=sum(not isinstance(place, SliceCarrier) for place in self._layers.values()),
            unadapted=count_kinds(
                [p for p in linear_layers(self.model) if p not in adapted and p not in heads and not f"{p}.".startswith(whole)]
            ),
            unsupported=unsupported_linear_maps(self.model),
        )

    def _slot(self, name: str) -> HeldSlot:
        self._check_alive()
        if name not in self._slots:
            have = ", ".join(self._slots) or "none"
            raise AdapterNameError(f"no adapter {name!r} in the bank; it has: {have}{closest(name, self._slots)}")
        return self._slots[name]

    def _check_alive(self) -> None:
        if self._detached:
            raise LorabankError("this bank was detached from its model; call lorabank.attach(model) for a new one")
