"""`AdapterBank`: any number of adapters over one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.carrier import Carrier, SlotValues
from lorabank.bank.configs import as_adapter_config
from lorabank.bank.extra.extra_places import check_not_kept, merged, places_in, planned
from lorabank.bank.extra.extras import BIAS, ROWS
from lorabank.bank.fit import (
    at_home,
    check_decomposed,
    check_finite,
    check_fits,
    features,
    task_type,
    warn_empty_experts,
    warn_ranks,
    warn_storage,
)
from lorabank.bank.fused import SLOTS
from lorabank.bank.fused_layers import Slices, slices_of, with_slices
from lorabank.bank.in_full.heads import head_parameters, peft_task, with_head
from lorabank.bank.in_full.saved_bank import SavedModules, Values
from lorabank.bank.in_full.saved_paths import check_apart, check_extras_apart, saved_paths, warn_tied, without_saved
from lorabank.bank.keep import check_stacks_frozen, kept_modules
from lorabank.bank.missing import missing_layers, warn_missing
from lorabank.bank.multihead import patterned
from lorabank.bank.naming import check_new_name
from lorabank.bank.owners import Owners
from lorabank.bank.parts import paths_of
from lorabank.bank.reach import ReachCheck
from lorabank.bank.routed import Routed
from lorabank.bank.slices import FusedSlice, SliceCarrier, norms_beside
from lorabank.bank.starts.adapter_start import AdapterStart, check_prepared
from lorabank.bank.starts.spectral import check_start
from lorabank.bank.storages.quantized import count_parameters, storage_of
from lorabank.bank.summary import AdapterSummary, BankSummary, count_kinds
from lorabank.bank.targets import adaptable_layers, linear_layers, output_head_paths, resolve_targets, unsupported_linear_maps
from lorabank.bank.tied import in_turn, shared_in, tie
from lorabank.bank.wrapped import Wrapped
from lorabank.bank.wrappers import base_path, base_prefix, without_wrappers
from lorabank.bank.wrapping import unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError, AdapterNameError, FingerprintError, LorabankError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer, no_adapter
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.slices import sliced
from lorabank.formats.token_rows import TokenRows

_Start = Callable[[Carrier], SlotValues]
"""What a slot begins with in one place."""


@dataclass(frozen=True)
class _Slot:
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


def _fresh(place: Carrier, slot: _Slot, rank: int, scaling: float) -> SlotValues:
    """What an untrained adapter has in a place."""
    if slot.start is not None and rank:
        return slot.start.values(place.path, rank, (place.store.in_features, place.store.out_features), scaling)
    return place.fresh(slot.config, rank, scaling, slot.seed)


class AdapterBank(Routed):
    """Owns the trainable tensors of every adapter in every wrapped layer, and decides which rows use which adapter.

    Made by `lorabank.attach(model)`. A layer is wrapped when an adapter first needs it and stays until `detach`.
    """

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
        self._slots: dict[str, _Slot] = {}
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

    # ---- adapters -------------------------------------------------------------------------------------------------

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

    def add(self, name: str, config: AdapterConfig | AdapterStart | Any, *, seed: int = 0, num_labels: int | None = None) -> None:
        """A new, untrained adapter: A random, B zero, so outputs don't change yet.

        `config` is an AdapterConfig, a dict of its fields, a `peft.LoraConfig`, or what `lorabank.eva` or `lorabank.loftq` made.
        A random start depends on `seed`, the layer and the shape alone. `num_labels`: of a classifier's, or detector's,
        head of its own, which is random then. Raises TargetError, AdapterNameError or ConfigError; the bank is unchanged then.
        """
        self._check_alive()
        check_new_name(name, self._slots)
        prepared = config if isinstance(config, AdapterStart) else None
        config = as_adapter_config(config) if prepared is None else prepared.config
        if prepared is None:
            check_prepared(config)
        if num_labels is not None:
            config = with_head(self.model, config)
        chosen = resolve_targets(self.model, config, kept_modules(self.kept), self.fused)
        saved = saved_paths(self.model, config, chosen, self.kept, self.head)
        chosen = without_saved(chosen, saved)
        self._check_apart(saved, chosen)
        copies = self._saved.fresh(saved, num_labels, seed)
        warn_tied(name, self.model, saved, together=config.ensure_weight_tying)
        chosen, shared = tie(name, config, self._layers_and_slices(), chosen)
        check_decomposed(config, chosen, shared)
        shapes: dict[str, tuple[int, float]] = {}
        for path, layer in chosen.items():
            known = without_wrappers(path)
            rank = patterned(config.rank_pattern, known, layer, config.rank)
            shapes[path] = (rank, config.scaling(rank, patterned(config.alpha_pattern, known, layer, config.alpha)))
        elsewhere = self.kept | {f"{path}.{key}" for path, module in copies.items() for key in module}
        more = planned(name, self.model, config, chosen, shared, elsewhere)
        check_extras_apart(saved, more.modules)
        check_not_kept(self.model, self.kept, more)
        # the other end of tied weights, biases and rows, which `exclude` doesn't speak of alone
        self._check_apart(
            saved,
            {**chosen, **more.modules},
            way="leave out what means it here (ensure_weight_tying, bias, trainable_token_indices)",
        )
        check_start(config, chosen, {path: rank for path, (rank, _) in shapes.items()})
        warn_ranks(name, {path: rank for path, (rank, _) in shapes.items()}, chosen)
        layers = {**chosen, **more.modules}
        slot = _Slot(config=config, seed=seed, paths=tuple(layers), shared={**shared, **more.shared})
        slot = replace(slot, start=prepared, num_labels=num_labels)

        def start(place: Carrier) -> SlotValues:
            values = _fresh(place, slot, *shapes.get(place.path, (0, 1.0)))
            return values._replace(extras=more.of(place.path))

        self._install(name, slot, layers, start, copies)

    def load(self, name: str, adapter: Adapter, *, force: bool = False, seed: int = 0) -> None:
        """Put a trained adapter into the bank under `name`.

        Refuses (FingerprintError) an adapter of another base, and (AdapterFileError) one with NaN, unless `force`. Raises
        AdapterFileError, naming layers that the model lacks or whose shape differs; the bank is unchanged then.
        """
        self._check_alive()
        check_new_name(name, self._slots)
        if not isinstance(adapter, Adapter):
            raise AdapterFileError(no_adapter(adapter, f"bank.load({name!r}, …)"))
        difference = None if adapter.fingerprint is None else adapter.fingerprint.compare(self.fingerprint)
        if difference is not None and not force:
            of = f" ({adapter.base_model})" if adapter.base_model else ""
            raise FingerprintError(
                f"adapter {name!r} was trained on another base model{of}: {difference}. "
                "Load the base that it was trained on, or pass force=True to use it all the same."
            )
        adapter = at_home(self.model, adapter)
        check_fits(self.model, name, adapter, force=force, fused=self.fused)
        if not force:
            check_finite(name, adapter)
        warn_storage(name, adapter, self.model)
        warn_empty_experts(name, adapter, self.model)
        warn_missing(f"adapter {name!r}", missing_layers(self.model, adapter, self.kept, self.fused))
        # in the order that `add` has them, not the file's
        layers = self._layers_and_slices(adapter)
        in_order = tuple(path for path, each in layers.items() if any(part in adapter.layers for part in paths_of(path, each)))
        check_stacks_frozen(name, {path: layers[path] for path in in_order}, self.kept)
        told = adapter.metadata.get(BASE_STORAGE)
        more = places_in(self.model, adapter)
        check_not_kept(self.model, self.kept, more)
        paths = tuple(dict.fromkeys((*in_order, *more.modules)))
        shared = {**shared_in(adapter, layers), **more.shared}
        slot = _Slot(adapter.config, seed, paths, shared, adapter.base_model, adapter.task_type, told, loaded=True)
        copies = self._saved.fitting(name, adapter)
        self._check_apart(copies, paths)
        warn_tied(name, self.model, list(copies), together=False)

        def start(place: Carrier) -> SlotValues:
            values = place.values_of(adapter.layers)
            return values._replace(extras=merged(values.extras, more.of(place.path)))

        self._install(name, slot, {**layers, **more.modules}, start, copies)

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

    def remove(self, name: str) -> None:
        """Take an adapter out; its memory is reused by the next one."""
        slot = self._slot(name)
        for path in slot.paths:
            self._layers[path].remove_slot(name)
        self._saved.remove(name)
        del self._slots[name], self._numbers[name]
        self._changed()

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

    def restart(self, name: str) -> None:
        """Set an adapter that `add` made back to its first values. Raises LorabankError for one that was loaded."""
        slot = self._slot(name)
        if slot.loaded:
            raise LorabankError(
                f"restart: adapter {name!r} was loaded, and its first values are its file's. bank.remove({name!r}) and "
                f"bank.load({name!r}, adapter) bring them back."
            )
        for path in (path for path in slot.paths if path not in slot.shared):
            place = self._layers[path]
            mine = place.slots[name]
            place.write(name, _fresh(place, slot, mine.rank, mine.scaling))
        self._saved.write(name, self._saved.fresh(self._saved.paths(name), slot.num_labels, slot.seed))

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

    # ---- the end --------------------------------------------------------------------------------------------------

    def check_reached(self) -> None:
        """Raise UnreachedLayerError when a wrapped layer has not been called by any forward pass so far."""
        self._reach.check()

    def skip_reach_check(self) -> None:
        """Don't require that the first forward pass reaches every wrapped layer: some inputs use only a part of the model."""
        self._reach.skip()

    def detach(self) -> nn.Module:
        """Take every wrapper out: the untouched base model again, with its `requires_grad` as before. Ends the bank.

        Hooks that were registered on a wrapped layer while it was wrapped go with the wrapper.
        """
        self._check_alive()
        self._wrapped.take_out(self._saved.modules.values())
        self._reach.close()
        self._owners.close()
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._required_grad.get(name, p.requires_grad))
        self._saved.clear()
        self._slots.clear()
        self._numbers.clear()
        self.structure += 1
        self._detached = True
        return self.model

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LorabankError(
            "a bank can't be copied or pickled. copy.deepcopy(bank.model) gives the plain base, to which attach(...) and "
            "load(name, bank.adapter(name)) bring the adapters; an adapter is a value, which can be."
        )

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _slot(self, name: str) -> _Slot:
        self._check_alive()
        if name not in self._slots:
            have = ", ".join(self._slots) or "none"
            raise AdapterNameError(f"no adapter {name!r} in the bank; it has: {have}{closest(name, self._slots)}")
        return self._slots[name]

    def _layers_and_slices(self, adapter: Adapter | None = None) -> dict[str, nn.Module]:
        """What can be adapted, by path, in the model's order, with the slices that an adapter has for itself."""
        layers = adaptable_layers(self.model)
        known = slices_of(self.model, layers, self.fused)
        for path, parts in sliced(adapter.layers if adapter is not None else {}).items():
            size = features(layers[path])
            own = {name: FusedSlice(layers[path], part.outputs, size) for name, part in parts.items() if part.outputs is not None}
            known[path] = {**own, **known.get(path, {})}
        return with_slices(layers, known)

    def _check_alive(self) -> None:
        if self._detached:
            raise LorabankError("this bank was detached from its model; call lorabank.attach(model) for a new one")

    def _check_apart(self, saved: Collection[str], layers: Collection[str], *, way: str = "") -> None:
        wrapped = [path for path, place in self._layers.items() if place.slots]
        check_apart(saved, layers, wrapped, {path: module.in_use for path, module in self._saved.modules.items()}, way=way)

    def _install(self, name: str, slot: _Slot, layers: Mapping[str, nn.Module], start: _Start, copies: Values) -> None:
        """Reserve and fill the slot in every place; on any failure the bank is as before."""
        done: list[str] = []
        try:
            for path in in_turn(slot.paths, slot.shared):
                place = self._wrapped.wrap(path, layers[path], self)
                if path in slot.shared:
                    table = self._layers[slot.shared[path]]
                    place.share_slot(name, table.slots[name], slot.config.dropout)
                    done.append(path)
                    if not table.slots[name].rank:
                        self._reach.read_at(table, place)
                    continue
                values = start(place)
                place.add_slot(name, values, slot.config.dropout, slot.seed)
                done.append(path)
                place.write(name, values)
            self._saved.install(name, copies, self)
        except BaseException:
            for path in done:
                self._layers[path].remove_slot(name)
            raise
        self._slots[name] = slot
        self._numbers[name] = next(i for i in range(len(self._slots)) if i not in self._numbers.values())
        self._changed()

    def _changed(self) -> None:
        self.structure += 1
        self._keep_routes()


def all_layers(bank: AdapterBank) -> Iterable[Carrier]:
    """The places of a bank that adapters change, for engines and tests."""
    return bank._layers.values()


def saved_modules(bank: AdapterBank) -> SavedModules:
    """The modules of a bank that adapters train in full."""
    return bank._saved
