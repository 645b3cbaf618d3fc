"""`merge_folder`: an adapter into a model folder, tensor by tensor, for models that don't fit into memory.

What is in memory at a time is the adapter, one weight and what adding to it needs: about 40 bytes a number of the largest weight
that the adapter changes. Everything else is copied in pieces. The numbers are those of `merge`, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.fit import other_weight
from lorabank.bank.task_class import skeleton_of, task_model
from lorabank.errors import MergeError, ModelError, OutputError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.files import TORCH_DTYPES
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import sliced, without_slices
from lorabank.merging.arguments import an_adapter
from lorabank.merging.checkpoint import INDEX, Shard, Target, names_in_model, read_shards, write_shard
from lorabank.merging.extras import merged_bias, merged_rows
from lorabank.merging.folder_config import read_config, with_dtype
from lorabank.merging.layer import merge_tensor, with_norms
from lorabank.merging.merge import MERGED_DTYPES, check_strength, storage_in_training, warn_unresolved
from lorabank.merging.outputs import map_of
from lorabank.merging.quantized import rounded
from lorabank.merging.report import LayerLoss, MergeReport
from lorabank.merging.shard_plan import Made, Plan, check_base, plan

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".pb")
CONFIG = "config.json"
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

    folder: a transformers model in safetensors, of one file or many; config, tokenizer and what else is there are copied. The new
    folder is of the class that the adapter was trained on, and its config.json says so: that class, as many labels and tokens as
    the adapter has, and `tie_word_embeddings` false where it changes a tied head and its embedding apart.
    dtype: of every floating tensor; None keeps each as it is stored. force, strength, say: as `merge` has them.
    busy: gets (activity, tensors done, tensors in all).
    Raises ModelError for a folder that can't be read, MergeError where a weight isn't stored as it is in the model (stacked or
    permuted at load, quantised), FingerprintError for another base, OutputError for a full disk; nothing is left then.
    """
    folder, output, fused = Path(folder), Path(output), sliced(an_adapter(adapter, "merge").layers)
    adapter = without_slices(adapter, any_norms)  # norms come with the weights
    check_strength(adapter, strength)
    if dtype is not None and dtype not in MERGED_DTYPES:
        raise MergeError(f"merge: dtype should be float32, float64, bfloat16 or float16, got {dtype}")
    shards = read_shards(folder)
    settings = _settings(folder)
    planned = plan(folder, settings, shards, adapter, dtype=dtype, force=force)
    layers = adaptable_layers(planned.model)
    work = _Work(adapter=adapter, plan=planned, layers=layers, shards=shards, strength=strength, force=force, fused=fused)
    written = _Written(shards, output, planned)
    try:
        written.begin()
        done, total = 0, len(planned.targets)
        for shard in shards:
            busy("merging", done, total)
            done += written.shard(shard, work.tensor)
        busy("merging", done, total)
        _copy_others(
            folder, output, written, with_dtype(planned.settings, dtype) if planned.settings != settings or dtype else None
        )
    except BaseException as error:  # an interrupt too: a folder that is half written is nobody's model
        written.undo()
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{output}: can't be written: {error.strerror or error}. Nothing is left of it.") from error
        raise
    report = work.report()
    warn_unresolved(report)
    if say is not None:
        say(str(report))
    return report


def check_folder_base(folder: Path, adapter: Adapter) -> None:
    """Raise FingerprintError where the model in `folder` isn't the adapter's base; without a fingerprint or weights nothing."""
    if adapter.fingerprint is None or not any(folder.glob("*.safetensors")):
        return
    owners = {name: shard for shard in read_shards(folder) for name in shard.tensors}
    config = read_config(folder)
    model = skeleton_of(task_model(config, adapter, repr(str(folder))).kind, config)
    check_base(adapter, names_in_model(model, iter(owners)), owners)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {str(folder)!r}: its {CONFIG} can't be read ({error}). Copy or download it again.") from error
    return read


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Makes the tensors of the new folder one by one, and keeps what was lost."""

    adapter: Adapter
    plan: Plan
    layers: Mapping[str, nn.Module]
    """Of the plan's model, by path."""
    shards: list[Shard]
    strength: float
    force: bool
    fused: Mapping[str, Mapping[str, AdapterLayer]]
    """Path of each layer that is adapted by its slices → these."""
    losses: dict[str, LayerLoss] = field(default_factory=dict)
    """By the layer's path, filled as it goes."""
    extras: dict[str, LayerLoss] = field(default_factory=dict)
    """By parameter, of biases and tables."""

    def tensor(self, key: str) -> Tensor:
        """A tensor of the new folder."""
        made = self.plan.made.get(key)
        target, source = self.plan.targets[key], key if made is None else made.source
        if made is not None and made.whole is not None:
            return made.whole.to("cpu", target.dtype)
        shard = next(shard for shard in self.shards if source in shard.tensors)
        assert source is not None  # only the adapter's own values have none
        value = shard.read(source).to(target.dtype)
        return value if made is None else self._changed(made, value)

    def _changed(self, made: Made, value: Tensor) -> Tensor:
        if made.layer is not None:
            return self._merged(made.layer, value)
        if made.bias is not None:
            value, self.extras[made.name] = merged_bias(value, self.adapter, made.bias, self.strength)
        elif made.rows is not None:
            value, self.extras[made.name] = merged_rows(value, self.adapter, made.rows, self.strength)
        return value

    def _merged(self, path: str, value: Tensor) -> Tensor:
        module, storage = self.layers[path], storage_in_training(self.adapter)
        self._check_brought(path, module, value)
        layer, layer_map = self.adapter.layers[path], map_of(module)
        if path in self.fused:
            layer = with_norms(path, layer, self.fused[path], layer_map.flat(value))
        merged, loss, change = merge_tensor(path, value, layer, layer_map, self.strength)
        if storage is not None and layer.A.ndim == 2 and not layer.looks_up:
            weight_OI = layer_map.flat(change.before).float()
            loss = replace(loss, moved=float(torch.linalg.vector_norm(weight_OI - rounded(weight_OI, storage))))
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

    def report(self) -> MergeReport:
        """Of all that was made, in the adapter's order."""
        merged_in = {self.plan.targets[key].dtype for key, made in self.plan.made.items() if made.layer is not None}
        return MergeReport(
            layers={path: self.losses[path] for path in self.adapter.layers if path in self.losses},
            dtypes=tuple(sorted(str(dtype).removeprefix("torch.") for dtype in merged_in)),
            extras=self.extras,
            trained_in=storage_in_training(self.adapter),
        )


class _Written:
    """The new folder: what is in it so far, and the way back."""

    def __init__(self, shards: list[Shard], output: Path, planned: Plan) -> None:
        self.output, self.targets = output, planned.targets
        self.made = planned.made
        self.size = sum(target.size for target in planned.targets.values())
        self.files = {name: shard.path.name for shard in shards for name in shard.tensors if name in planned.targets}
        added = [name for name in planned.targets if name not in self.files]
        self.files |= dict.fromkeys(added, shards[-1].path.name)
        """Every tensor's file."""
        stored = {name: (shard.tensors[name].dtype, shard.tensors[name].shape) for shard in shards for name in shard.tensors}
        as_before = {name: (TORCH_DTYPES[code], shape) for name, (code, shape) in stored.items()}
        self.as_before = as_before == {name: (target.dtype, target.shape) for name, target in planned.targets.items()}
        """Whether the folder's index says the same as the base's."""
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

    def shard(self, shard: Shard, value: Callable[[str], Tensor]) -> int:
        """One file of the model anew; returns how many tensors are in it. One that holds nothing any more isn't written."""
        tensors: dict[str, Target] = {name: self.targets[name] for name, file in self.files.items() if file == shard.path.name}
        if not tensors:
            return 0
        other = {
            name
            for name, target in tensors.items()
            if name in self.made or target.dtype != TORCH_DTYPES[shard.tensors[name].dtype]
        }
        write_shard(shard, self.output / shard.path.name, tensors, value, other)
        return len(tensors)

    def index(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The base's index with the new folder's tensors."""
        about = {**said.get("metadata", {}), "total_size": self.size}
        if "total_parameters" in about:
            about["total_parameters"] = sum(target.numbers for target in self.targets.values())
        return {**said, "metadata": about, "weight_map": self.files}

    def undo(self) -> None:
        """Remove what was written."""
        if self._created:
            for path in self.output.iterdir():
                path.unlink()


def _copy_others(folder: Path, output: Path, written: _Written, settings: Mapping[str, Any] | None) -> None:
    """Tokenizer and the like; not weights in other forms. `settings`: the new config.json, None for the base's own."""
    for path in sorted(folder.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith(WEIGHT_FILES) and path.name != INDEX
        if not path.is_file() or weights or path.name.startswith("."):
            continue
        new: Mapping[str, Any] | None = settings if path.name == CONFIG else None
        if path.name == INDEX and not written.as_before:
            new = written.index(json.loads(path.read_text(encoding="utf-8")))
        if new is not None:
            (output / path.name).write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, output / path.name)
