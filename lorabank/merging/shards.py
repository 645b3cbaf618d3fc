"""`merge_folder`: an adapter into a model folder, tensor by tensor, for models that don't fit into memory.

What is in memory at a time is the adapter, one weight and what adding to it needs: about 40 bytes a number of the largest weight
that the adapter changes. Everything else is copied in pieces. The numbers are those of `merge`, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.fit import misfit, other_weight
from lorabank.bank.multihead import weight_name
from lorabank.bank.targets import adaptable_layers
from lorabank.errors import AdapterFileError, FingerprintError, MergeError, ModelError, OutputError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.extras import extras_by_path
from lorabank.formats.files import TORCH_DTYPES
from lorabank.formats.fingerprint import Fingerprint, positions
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import sliced, without_slices
from lorabank.merging.checkpoint import INDEX, Names, Shard, names_in_model, read_shards, write_shard
from lorabank.merging.layer import merge_tensor, with_norms
from lorabank.merging.merge import FORCE, MERGED_DTYPES, check_mergeable, storage_in_training, warn_unresolved
from lorabank.merging.outputs import map_of
from lorabank.merging.quantized import rounded
from lorabank.merging.report import LayerLoss, MergeReport

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".pb")
UNTIE = (
    "The adapter changes one of them: untie the weights first (a model saved with tie_word_embeddings=false), or serve the "
    "adapter unmerged."
)
Busy = Callable[[str, int, int], object]


def merge_folder(
    folder: str | Path,
    adapter: Adapter,
    output: str | Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    force: bool = False,
    say: Callable[[str], object] | None = print,
    busy: Busy = lambda activity, done, total: None,
) -> MergeReport:
    """Write the model of `folder` with `adapter` merged into the new or empty folder `output`, one tensor at a time.

    folder: a transformers model in safetensors, of one file or many; config, tokenizer and what else is there are copied.
    dtype: of every floating tensor; None keeps each as it is stored. force, strength, say: as `merge` has them.
    busy: gets (activity, tensors done, tensors in all).
    Raises ModelError for a folder that can't be read, MergeError where a layer's weight isn't stored as it is in the model
    (stacked or permuted at load, tied, quantised), FingerprintError for another base, OutputError for a full disk; nothing is
    left then.
    """
    folder, output, fused = Path(folder), Path(output), sliced(adapter.layers)
    adapter = without_slices(adapter, any_norms)  # norms come with the weights
    if not math.isfinite(strength):
        raise MergeError(f"merge: strength should be a number, got {strength}")
    if strength != 1 and any(layer.magnitude is not None for layer in adapter.layers.values()):
        raise MergeError("merge: a decomposed adapter (DoRA) is merged whole; leave strength out")
    if adapter.modules:
        raise MergeError(
            f"merge: {next(iter(adapter.modules))!r} was trained in full, which isn't merged tensor by tensor. Load the model "
            "and use merge."
        )
    if dtype is not None and dtype not in MERGED_DTYPES:
        raise MergeError(f"merge: dtype should be float32, float64, bfloat16 or float16, got {dtype}")
    for path, what in extras_by_path(adapter).items():
        raise MergeError(f"merge: of {path!r} {what}, which isn't merged tensor by tensor yet. Load the model and use merge.")
    shards, model = read_shards(folder), _skeleton(folder)
    owners = {name: shard for shard in shards for name in shard.tensors}
    names = names_in_model(model, iter(owners))
    if not force:
        _check_base(adapter, names, owners)
    places = _places(model, adapter, names, owners, force)
    written = _Written(shards, output, dtype)
    work = _Work(adapter=adapter, places=places, strength=strength, force=force, fused=fused)
    try:
        written.begin()
        done, total = 0, sum(len(shard.tensors) for shard in shards)
        for shard in shards:
            busy("merging", done, total)
            written.shard(shard, places, work.change)
            done += len(shard.tensors)
        busy("merging", done, total)
        _copy_others(folder, output, dtype, written.size)
    except BaseException as error:  # an interrupt too: a folder that is half written is nobody's model
        written.undo()
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{output}: can't be written: {error.strerror or error}. Nothing is left of it.") from error
        raise
    merged_in = {str(written.dtypes[key]).removeprefix("torch.") for key in places}
    losses = {path: work.losses[path] for path in adapter.layers}
    report = MergeReport(layers=losses, dtypes=tuple(sorted(merged_in)), trained_in=work.storage)
    warn_unresolved(report)
    if say is not None:
        say(str(report))
    return report


def check_folder_base(folder: Path, adapter: Adapter) -> None:
    """Raise FingerprintError where the model in `folder` isn't the adapter's base; without a fingerprint or weights nothing."""
    if adapter.fingerprint is None or not any(folder.glob("*.safetensors")):
        return
    owners = {name: shard for shard in read_shards(folder) for name in shard.tensors}
    _check_base(adapter, names_in_model(_skeleton(folder), iter(owners)), owners)


def _skeleton(folder: Path) -> nn.Module:
    """The model that the folder's config describes, on the meta device: its modules' classes, and no weight."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # wrong values surface as whatever the model's config class happens to raise
        raise ModelError(f"model {str(folder)!r}: its config.json can't be used ({str(error)[:200]}).") from error
    if getattr(config, "quantization_config", None):
        raise MergeError(f"merge: {str(folder)!r} holds quantised weights; use the model's bf16 or fp32 release")
    named = (config.architectures or ["?"])[0]
    known: Any = getattr(transformers, named, None)
    if known is None:
        raise ModelError(
            f"model {str(folder)!r}: its class {named!r} isn't one of transformers', so what its tensors are isn't known. "
            "Load it and use merge."
        )
    with torch.device("meta"):
        model: nn.Module = known._from_config(config)
    return model


def _check_base(adapter: Adapter, names: Names, owners: Mapping[str, Shard]) -> None:
    """Compare the fingerprint's samples with the stored numbers, which also shows that names mean what they mean in the model."""
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


_Places = dict[str, tuple[str, nn.Module]]
"""Stored tensor → (the layer's path, the layer)."""


def _places(model: nn.Module, adapter: Adapter, names: Names, owners: Mapping[str, Shard], force: bool) -> _Places:
    """Where each layer's weight is stored; all is checked before anything is written."""
    if not adapter.layers:
        raise MergeError("merge: the adapter has no layers")
    check_mergeable(adapter)
    layers = adaptable_layers(model)
    users: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(value), []).append(name)
    places: _Places = {}
    for path, layer in adapter.layers.items():
        if layer.stack:
            raise MergeError(
                f"merge: {path} is an expert of a stack, which isn't merged tensor by tensor. Load the model and use merge."
            )
        if path not in layers:
            raise MergeError(f"merge: the model has no layer {path!r} that can be merged into{closest(path, layers)}")
        module, name = layers[path], weight_name(path, layers[path])
        if wrong := misfit(path, layer, module):
            raise MergeError(f"merge: {wrong}; the adapter belongs to another base")
        if not (all(bool(tensor.isfinite().all()) for tensor in layer.tensors.values()) and math.isfinite(layer.scaling)):
            raise AdapterFileError(f"merge: layer {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
        weight = module.get_parameter("weight")
        others = [other for other in users[id(weight)] if other != name]
        if others:
            raise MergeError(
                f"merge: {name} is tied to {', '.join(others)}, which isn't merged tensor by tensor. "
                + ("Load the model and use merge." if adapter.config.ensure_weight_tying else UNTIE)
            )
        places[_stored_key(name, tuple(weight.shape), names, owners)] = (path, module)
    return places


def _stored_key(name: str, shape: tuple[int, ...], names: Names, owners: Mapping[str, Shard]) -> str:
    key = names.stored.get(name)
    if key is None:
        made = names.converted.get(name)
        how = f"made of {made!r} and maybe others when the model is loaded" if made else "not among the checkpoint's tensors"
        raise MergeError(f"merge: {name} is {how}, so it can't be merged tensor by tensor. Load the model and use merge.")
    entry = owners[key].tensors[key]
    if entry.shape != shape:
        raise MergeError(
            f"merge: {name} is {shape} in the model and {entry.shape} in {owners[key].path.name} (as {key!r}), so it isn't "
            "stored as it is. Load the model and use merge."
        )
    if TORCH_DTYPES[entry.dtype] not in MERGED_DTYPES:
        raise MergeError(
            f"merge: {name} is stored as {entry.dtype}; expected float32, float64, bfloat16 or float16. Use the model's bf16 or "
            "fp32 release."
        )
    return key


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Adds the adapter's changes as tensors come by, and keeps what was lost."""

    adapter: Adapter
    places: _Places
    strength: float
    force: bool
    fused: Mapping[str, Mapping[str, AdapterLayer]]
    """Path of each layer that is adapted by its slices → these."""
    losses: dict[str, LayerLoss] = field(default_factory=dict)
    """By path, filled as it goes."""

    @property
    def storage(self) -> str | None:
        """How the base was quantised while the adapter was trained."""
        return storage_in_training(self.adapter)

    def change(self, key: str, value: Tensor) -> Tensor:
        """The tensor to write, in `value`'s dtype."""
        if key not in self.places:
            return value
        path, module = self.places[key]
        self._check_brought(path, module, value)
        layer_map = map_of(module)
        layer = self.adapter.layers[path]
        if path in self.fused:
            layer = with_norms(path, layer, self.fused[path], layer_map.flat(value))
        merged, loss, change = merge_tensor(path, value, layer, layer_map, self.strength)
        if self.storage is not None and self.adapter.layers[path].A.ndim == 2 and not self.adapter.layers[path].looks_up:
            weight_OI = layer_map.flat(change.before).float()
            loss = replace(loss, moved=float(torch.linalg.vector_norm(weight_OI - rounded(weight_OI, self.storage))))
        self.losses[path] = loss
        return merged

    def _check_brought(self, path: str, module: nn.Module, value: Tensor) -> None:
        """The base's own weight, where the adapter's file brings it, must be this one."""
        if path not in self.adapter.base_weights:
            return
        empty = module.get_parameter("weight")
        module._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        try:
            wrong = other_weight(path, self.adapter, module, force=self.force)
        finally:
            module._parameters["weight"] = empty
        if wrong:
            raise MergeError(f"merge: {wrong}; the adapter belongs to another base")


class _Written:
    """The new folder: what is in it so far, and the way back."""

    def __init__(self, shards: list[Shard], output: Path, dtype: torch.dtype | None) -> None:
        self.output = output
        self.dtypes = {
            name: _new_dtype(TORCH_DTYPES[entry.dtype], dtype) for shard in shards for name, entry in shard.tensors.items()
        }
        sizes = ((name, math.prod(entry.shape)) for shard in shards for name, entry in shard.tensors.items())
        self.size = sum(numbers * self.dtypes[name].itemsize for name, numbers in sizes)
        self._created = False

    def begin(self) -> None:
        """Make the folder. Raises OutputError where it isn't empty or the disk has no room."""
        if self.output.is_file() or (self.output.is_dir() and any(self.output.iterdir())):
            raise OutputError(f"{self.output}: exists already and isn't empty. Choose another folder.")
        self.output.mkdir(parents=True, exist_ok=True)
        self._created = True
        free = shutil.disk_usage(self.output).free
        if free < self.size:
            raise OutputError(
                f"{self.output}: the merged weights take {self.size / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB "
                "left. Free some space or choose another disk."
            )

    def shard(self, shard: Shard, places: _Places, change: Callable[[str, Tensor], Tensor]) -> None:
        """One file of the model anew."""
        converted = {name for name, entry in shard.tensors.items() if self.dtypes[name] != TORCH_DTYPES[entry.dtype]}
        write_shard(
            shard,
            self.output / shard.path.name,
            {name: self.dtypes[name] for name in shard.tensors},
            lambda name, value: change(name, value.to(self.dtypes[name])),
            converted | (places.keys() & shard.tensors.keys()),
        )

    def undo(self) -> None:
        """Remove what was written."""
        if self._created:
            for path in self.output.iterdir():
                path.unlink()


def _new_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return stored if wanted is None or stored not in MERGED_DTYPES else wanted


def _copy_others(folder: Path, output: Path, dtype: torch.dtype | None, size: int) -> None:
    """Config, tokenizer and the like; not weights in other forms. What says a dtype or a size says the new one."""
    for path in sorted(folder.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith(WEIGHT_FILES) and path.name != INDEX
        if not path.is_file() or weights or path.name.startswith("."):
            continue
        if path.name in ("config.json", INDEX) and dtype is not None:
            said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if path.name == INDEX:
                said["metadata"] = {**said.get("metadata", {}), "total_size": size}
            else:
                said.pop("torch_dtype", None)
                said["dtype"] = str(dtype).removeprefix("torch.")
            (output / path.name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, output / path.name)
