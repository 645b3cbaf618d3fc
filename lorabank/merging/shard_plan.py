"""What a merge by shard makes of each tensor of a folder, and every check of it: all is known before a byte is written.

The model is its skeleton on the meta device, once as the base's configuration has it and once as the merged folder's: the
adapter's task may be another class than the base's, its head may have other labels, and a tied head may part from the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.fit import misfit
from lorabank.bank.missing import missing_layers, warn_missing
from lorabank.bank.multihead import weight_name
from lorabank.bank.task_class import skeleton_of, task_model
from lorabank.bank.tied import shared_in
from lorabank.errors import AdapterFileError, FingerprintError, MergeError, ModelError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import TORCH_DTYPES
from lorabank.formats.fingerprint import Fingerprint, positions
from lorabank.formats.saved import check_modules
from lorabank.merging.checkpoint import Names, Shard, Target, names_in_model
from lorabank.merging.extras import biased, check_extras
from lorabank.merging.folder_config import as_config, merged_settings, read_config
from lorabank.merging.merge import FORCE, MERGED_DTYPES, check_mergeable
from lorabank.merging.saved import values_for
from lorabank.merging.ties import groups

LOAD = "Load the model and use merge."


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor of the new folder that isn't one of the old folder's as it stands."""

    name: str
    """The model's parameter."""
    source: str | None
    """The stored tensor that it is made of; None for one that is the adapter's alone."""
    layer: str | None = None
    """Path of the layer whose A and B are added."""
    bias: str | None = None
    """Path of the module whose bias it is."""
    rows: str | None = None
    """Path of the table whose rows the adapter has."""
    whole: Tensor | None = None
    """The adapter's values, of a module in full. With none of these it is a copy: of a weight that was tied and isn't now."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The new folder, before it is written."""

    model: nn.Module
    """The merged model on the meta device."""
    settings: Mapping[str, Any]
    """Its config.json."""
    made: Mapping[str, Made]
    """By the new tensor's name in the checkpoint."""
    targets: Mapping[str, Target]
    """Every tensor of the new folder."""


def plan(
    folder: Path, settings: Mapping[str, Any], shards: list[Shard], adapter: Adapter, *, dtype: torch.dtype | None, force: bool
) -> Plan:
    """All that `merge_folder` is to do. settings: the folder's config.json. Raises what it raises of adapter and folder."""
    if not adapter.layers:
        raise MergeError("merge: the adapter has no layers")
    check_mergeable(adapter)
    check_modules(adapter.modules, adapter.layers)
    config = read_config(folder)
    task = task_model(config, adapter, repr(str(folder)))
    before = skeleton_of(task.kind, config)
    owners = {name: shard for shard in shards for name in shard.tensors}
    names = names_in_model(before, iter(owners))
    if not force:
        check_base(adapter, names, owners)
    new = merged_settings(settings, config, task, adapter)
    model = skeleton_of(task.kind, as_config(config, new)) if new != settings else before
    checkpoint = _Checkpoint(owners, names, groups(before), groups(model))
    made = _made(model, adapter, checkpoint)
    known = set(model.state_dict())
    apart = new.get("architectures") != settings.get("architectures")
    dropped = {key for name, key in names.stored.items() if apart and name not in known}
    kept = [name for name in owners if name not in dropped]
    _check_all_there(model, checkpoint, made, kept)
    usual = _usual_dtype(shards)
    targets = {name: _kept(owners[name], name, made.get(name), dtype) for name in kept}
    for key, one in made.items():
        if key not in targets:
            held = usual if one.source is None else TORCH_DTYPES[owners[one.source].tensors[one.source].dtype]
            targets[key] = Target(dtype=new_dtype(held, dtype), shape=tuple(model.get_parameter(one.name).shape))
    return Plan(model=model, settings=new, made=made, targets=targets)


def new_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """A stored tensor's dtype in the new folder."""
    return stored if wanted is None or stored not in MERGED_DTYPES else wanted


def check_base(adapter: Adapter, names: Names, owners: Mapping[str, Shard]) -> None:
    """Compare the fingerprint's samples with the stored numbers, which also shows that names mean what they mean in the model.

    Raises FingerprintError for another base.
    """
    if adapter.fingerprint is None:
        return
    here = {}
    for name, sample in adapter.fingerprint.tensors.items():
        key = names.stored.get(name)
        if key is not None and owners[key].tensors[key].shape:
            shape = owners[key].tensors[key].shape
            numbers = owners[key].values(key, positions(shape))
            values = tuple(number if math.isfinite(number) else None for number in numbers)
            here[name] = replace(sample, shape=shape, values=values)
    difference = adapter.fingerprint.compare(Fingerprint(tensors=here))
    if difference:
        base = f" ({adapter.base_model})" if adapter.base_model else ""
        raise FingerprintError(
            f"the adapter was trained on another base{base}: {difference}. Name that base's folder, or pass ",
            FORCE,
            " if you know that it fits.",
        )


class _Checkpoint:
    """Where the folder has each parameter of the merged model."""

    def __init__(self, owners: Mapping[str, Shard], names: Names, before: list[list[str]], after: list[list[str]]) -> None:
        self.owners, self.names = owners, names
        self._before = {name: group for group in before for name in group}
        self._after = {name: group for group in after for name in group}

    def together(self, name: str) -> list[str]:
        """The parameters that are one with it in the merged model, itself among them."""
        return self._after.get(name, [name])

    def source(self, name: str) -> str | None:
        """The stored tensor that is the base's value of a parameter, by its own name or by one that it was tied to."""
        near = (name, *self.together(name), *self._before.get(name, ()))
        return next((self.names.stored[other] for other in near if other in self.names.stored), None)

    def keys(self, name: str) -> list[str]:
        """The tensors of the new folder that hold it: those that do so now, or one of its own name."""
        stored = [self.names.stored[other] for other in self.together(name) if other in self.names.stored]
        return stored or [name]

    def was_tied(self, name: str) -> bool:
        """Whether another parameter held its value before."""
        return name in self._before

    def check(self, name: str, shape: tuple[int, ...], *, shaped: bool = True) -> None:
        """Raise MergeError where a parameter isn't stored as it is. `shaped`: in its own shape, too."""
        key = self.source(name)
        if key is None:
            made = self.names.converted.get(name)
            how = f"made of {made!r} and maybe others when the model is loaded" if made else "not among the checkpoint's tensors"
            raise MergeError(f"merge: {name} is {how}, so it can't be merged tensor by tensor. {LOAD}")
        entry = self.owners[key].tensors[key]
        if shaped and entry.shape != shape:
            raise MergeError(
                f"merge: {name} is {shape} in the model and {entry.shape} in {self.owners[key].path.name} (as {key!r}), so it "
                f"isn't stored as it is. {LOAD}"
            )
        if TORCH_DTYPES[entry.dtype] not in MERGED_DTYPES:
            raise MergeError(
                f"merge: {name} is stored as {entry.dtype}; expected float32, float64, bfloat16 or float16. Use the model's bf16 "
                "or fp32 release."
            )


def _made(model: nn.Module, adapter: Adapter, checkpoint: _Checkpoint) -> dict[str, Made]:
    """Every tensor that changes or is new, by its name in the new folder, all checked."""
    found = [*_layers(model, adapter, checkpoint), *_whole(model, adapter, checkpoint), *_extras(model, adapter, checkpoint)]
    made: dict[str, Made] = {}
    for one in found:
        for key in checkpoint.keys(one.name):
            if key in made and (one.whole is None) != (made[key].whole is None):
                raise MergeError(f"merge: {one.name} is trained in full by the adapter, and changed otherwise as well")
            made[key] = replace(one, source=one.source and key) if key in checkpoint.owners else one
    for name, _ in model.named_parameters():
        keys, source = checkpoint.keys(name), checkpoint.source(name)
        if checkpoint.was_tied(name) and keys[0] not in made and keys[0] not in checkpoint.owners and source is not None:
            made[keys[0]] = Made(name=name, source=source)
    return made


def _layers(model: nn.Module, adapter: Adapter, checkpoint: _Checkpoint) -> Iterable[Made]:
    layers = adaptable_layers(model)
    warn_missing("merge", missing_layers(model, adapter))
    shared = shared_in(adapter, {path: layer for path, layer in layers.items() if path in adapter.layers})
    for path, layer in adapter.layers.items():
        if layer.stack:
            raise MergeError(f"merge: {path} is an expert of a stack, which isn't merged tensor by tensor. {LOAD}")
        if path not in layers:
            raise MergeError(f"merge: the model has no layer {path!r} that can be merged into{closest(path, layers)}")
        module, name = layers[path], weight_name(path, layers[path])
        if wrong := misfit(path, layer, module):
            raise MergeError(f"merge: {wrong}; the adapter belongs to another base")
        if not (all(bool(tensor.isfinite().all()) for tensor in layer.tensors.values()) and math.isfinite(layer.scaling)):
            raise AdapterFileError(f"merge: layer {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
        checkpoint.check(name, tuple(module.get_parameter("weight").shape))
        if path not in shared:
            yield Made(name=name, source=checkpoint.source(name), layer=path)


def _whole(model: nn.Module, adapter: Adapter, checkpoint: _Checkpoint) -> Iterable[Made]:
    for path, values in adapter.modules.items():
        for key, value in values_for(model, path, values, unloaded=True).items():
            name = f"{path}.{key}"
            if checkpoint.names.made_at_load(name) and name not in checkpoint.names.stored:
                raise MergeError(
                    f"merge: {name} is made of other tensors when the model is loaded, so it can't be merged tensor by tensor. "
                    f"{LOAD}"
                )
            if name in checkpoint.names.stored:
                checkpoint.check(name, tuple(value.shape), shaped=False)
            yield Made(name=name, source=None, whole=value)


def _extras(model: nn.Module, adapter: Adapter, checkpoint: _Checkpoint) -> Iterable[Made]:
    check_extras(model, adapter)
    biases = [Made(name=f"{path}.bias", source=None, bias=path) for path in biased(adapter)]
    rows = [Made(name=f"{path}.weight", source=None, rows=path) for path in adapter.token_rows]
    for one in (*biases, *rows):
        checkpoint.check(one.name, tuple(model.get_parameter(one.name).shape))
        yield replace(one, source=checkpoint.source(one.name))


def _check_all_there(model: nn.Module, checkpoint: _Checkpoint, made: Mapping[str, Made], kept: list[str]) -> None:
    """Raise where the folder would load with a weight that isn't there, or is of another shape."""
    here = {*kept, *made}
    added = {key: one.name for key, one in made.items() if key not in checkpoint.owners}
    again = names_in_model(model, iter(sorted(here)))
    for key, name in added.items():
        if again.stored.get(name) != key:
            raise MergeError(f"merge: a tensor {key!r} that is added would be another's when the model is loaded. {LOAD}")
    missing: list[str] = []
    for name, value in model.named_parameters():
        key = next((again.stored[other] for other in checkpoint.together(name) if other in again.stored), None)
        if key is None:
            missing += [] if again.made_at_load(name) else [name]
            continue
        source = made[key].source if key in made else key
        if source is not None:
            shard = checkpoint.owners[source]
            if shard.tensors[source].shape != value.shape:
                raise MergeError(
                    f"merge: {name} is {tuple(shard.tensors[source].shape)} in {shard.path.name} and {tuple(value.shape)} in the "
                    "merged model, and the adapter hasn't got it in full. Load the model as it was in training and use merge."
                )
    if missing:
        raise ModelError(
            f"model {str(next(iter(checkpoint.owners.values())).path.parent)!r}: its files lack {len(missing)} of the weights of "
            f"{type(model).__name__} ({', '.join(missing[:3])}), and the adapter hasn't got them either, so random ones would "
            "take their place. Name the base that it was trained on."
        )


def _kept(shard: Shard, name: str, made: Made | None, dtype: torch.dtype | None) -> Target:
    entry = shard.tensors[name]
    shape = tuple(made.whole.shape) if made is not None and made.whole is not None else entry.shape
    return Target(dtype=new_dtype(TORCH_DTYPES[entry.dtype], dtype), shape=shape)


def _usual_dtype(shards: list[Shard]) -> torch.dtype:
    """What most numbers are stored in, as far as a model can be loaded in it."""
    sizes: dict[torch.dtype, int] = {}
    for shard in shards:
        for entry in shard.tensors.values():
            sizes[TORCH_DTYPES[entry.dtype]] = sizes.get(TORCH_DTYPES[entry.dtype], 0) + entry.end - entry.begin
    most = max(sizes, key=lambda held: sizes[held], default=torch.float32)
    return most if most in MERGED_DTYPES else torch.float32
