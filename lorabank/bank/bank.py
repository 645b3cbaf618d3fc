"""`AdapterBank`: any number of adapters over one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.carrier import Carrier, SlotValues
from lorabank.bank.configs import as_adapter_config
from lorabank.bank.extra.extra_places import check_not_kept, merged, places_in, planned
from lorabank.bank.fit import (
    at_home,
    check_decomposed,
    check_finite,
    check_fits,
    features,
    warn_empty_experts,
    warn_ranks,
    warn_storage,
)
from lorabank.bank.fused_layers import slices_of, with_slices
from lorabank.bank.holding import HeldSlot, Holding, fresh
from lorabank.bank.in_full.heads import with_head
from lorabank.bank.in_full.saved_bank import SavedModules, Values
from lorabank.bank.in_full.saved_paths import check_apart, check_extras_apart, saved_paths, warn_tied, without_saved
from lorabank.bank.keep import check_stacks_frozen, kept_modules
from lorabank.bank.missing import missing_layers, warn_missing
from lorabank.bank.multihead import patterned
from lorabank.bank.naming import check_new_name
from lorabank.bank.parts import paths_of
from lorabank.bank.slices import FusedSlice
from lorabank.bank.starts.adapter_start import AdapterStart, check_prepared
from lorabank.bank.starts.spectral import check_start
from lorabank.bank.targets import resolve_targets
from lorabank.bank.tied import in_turn, shared_in, tie
from lorabank.bank.wrappers import without_wrappers
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError, FingerprintError, LorabankError
from lorabank.formats.adapter import BASE_STORAGE, Adapter, no_adapter
from lorabank.formats.slices import sliced

_Start = Callable[[Carrier], SlotValues]
"""What a slot begins with in one place."""


class AdapterBank(Holding):
    """Owns the trainable tensors of every adapter in every wrapped layer, and decides which rows use which adapter.

    Made by `lorabank.attach(model)`. A layer is wrapped when an adapter first needs it and stays until `detach`.
    """

    # ---- adapters -------------------------------------------------------------------------------------------------

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
        slot = HeldSlot(config=config, seed=seed, paths=tuple(layers), shared={**shared, **more.shared})
        slot = replace(slot, start=prepared, num_labels=num_labels)

        def start(place: Carrier) -> SlotValues:
            values = fresh(place, slot, *shapes.get(place.path, (0, 1.0)))
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
                "Load the base that it was trained on, or use it all the same: bank.load(…, force=True)."
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
        slot = HeldSlot(adapter.config, seed, paths, shared, adapter.base_model, adapter.task_type, told, loaded=True)
        copies = self._saved.fitting(name, adapter)
        self._check_apart(copies, paths)
        warn_tied(name, self.model, list(copies), together=False)

        def start(place: Carrier) -> SlotValues:
            values = place.values_of(adapter.layers)
            return values._replace(extras=merged(values.extras, more.of(place.path)))

        self._install(name, slot, {**layers, **more.modules}, start, copies)

    def remove(self, name: str) -> None:
        """Take an adapter out; its memory is reused by the next one."""
        slot = self._slot(name)
        for path in slot.paths:
            self._layers[path].remove_slot(name)
        self._saved.remove(name)
        del self._slots[name], self._numbers[name]
        self._changed()

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
            place.write(name, fresh(place, slot, mine.rank, mine.scaling))
        self._saved.write(name, self._saved.fresh(self._saved.paths(name), slot.num_labels, slot.seed))

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

    def _layers_and_slices(self, adapter: Adapter | None = None) -> dict[str, nn.Module]:
        """What can be adapted, by path, in the model's order, with the slices that an adapter has for itself."""
        layers = adaptable_layers(self.model)
        known = slices_of(self.model, layers, self.fused)
        for path, parts in sliced(adapter.layers if adapter is not None else {}).items():
            size = features(layers[path])
            own = {name: FusedSlice(layers[path], part.outputs, size) for name, part in parts.items() if part.outputs is not None}
            known[path] = {**own, **known.get(path, {})}
        return with_slices(layers, known)

    def _check_apart(self, saved: Collection[str], layers: Collection[str], *, way: str = "") -> None:
        wrapped = [path for path, place in self._layers.items() if place.slots]
        check_apart(saved, layers, wrapped, {path: module.in_use for path, module in self._saved.modules.items()}, way=way)

    def _install(self, name: str, slot: HeldSlot, layers: Mapping[str, nn.Module], start: _Start, copies: Values) -> None:
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
