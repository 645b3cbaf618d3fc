"""A model folder of safetensors files, read tensor by tensor: what each stored tensor is called in the model, and its bytes.

A checkpoint's names needn't be the model's: transformers renames, stacks, splits and permutes at load. `names_in_model` asks its
own table of conversions; a tensor that is more than renamed has no name here, so that nobody takes it for the weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lorabank.errors import AdapterFileError, ModelError
from lorabank.formats.files import TORCH_DTYPES, TensorEntry, read_header

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 16 * 2**20
"""Bytes copied at a time."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file of a checkpoint."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    """Byte at which the tensors begin."""

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU."""
        entry = self.tensors[name]
        return torch.frombuffer(self._bytes(entry.begin, entry.end), dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def values(self, name: str, positions: list[tuple[int, ...]]) -> list[float]:
        """Single numbers of a tensor: no more is read."""
        entry, dtype = self.tensors[name], TORCH_DTYPES[self.tensors[name].dtype]
        found = []
        for position in positions:
            flat = 0
            for size, index in zip(entry.shape, position, strict=True):
                flat = flat * size + index
            begin = entry.begin + flat * dtype.itemsize
            found.append(float(torch.frombuffer(self._bytes(begin, begin + dtype.itemsize), dtype=dtype).float()))
        return found

    def copy(self, name: str, file: BinaryIO) -> None:
        """The tensor's bytes into `file`, in pieces."""
        entry = self.tensors[name]
        with open(self.path, "rb") as source:
            source.seek(self.data_start + entry.begin)
            left = entry.end - entry.begin
            while left:
                piece = source.read(min(CHUNK, left))
                if not piece:
                    raise ModelError(f"{self.path}: ends within {name!r}. Copy or download it again.")
                file.write(piece)
                left -= len(piece)

    def _bytes(self, begin: int, end: int) -> bytearray:
        held = bytearray(end - begin)
        with open(self.path, "rb") as source:
            source.seek(self.data_start + begin)
            if source.readinto(held) != len(held):
                raise ModelError(f"{self.path}: ends within its tensors. Copy or download it again.")
        return held


def read_shards(folder: Path) -> list[Shard]:
    """The safetensors files that transformers would load, their headers checked. Raises ModelError."""
    if (folder / WHOLE).is_file():
        return [_shard(folder / WHOLE)]
    if not (folder / INDEX).is_file():
        raise ModelError(f"model {str(folder)!r}: neither {WHOLE} nor {INDEX} in it. Name a model folder in safetensors.")
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model {str(folder)!r}: {INDEX} can't be read ({error}). Copy or download it again.") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or outside:
        raise ModelError(
            f"model {str(folder)!r}: {INDEX} names files that aren't in the folder: {', '.join((missing or outside)[:3])}. "
            "Copy or download it again."
        )
    shards = [_shard(folder / file) for file in files]
    held = {name: shard.path.name for shard in shards for name in shard.tensors}
    lost = [name for name, file in weight_map.items() if held.get(name) != file]
    if lost:
        raise ModelError(
            f"model {str(folder)!r}: {INDEX} places {lost[0]!r} in {weight_map[lost[0]]}, which doesn't hold it alone."
        )
    return shards


def _shard(path: Path) -> Shard:
    try:
        header = read_header(path)
    except AdapterFileError as error:
        raise ModelError(str(error)) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return Shard(path=path, tensors=header.tensors, metadata=header.metadata, data_start=8 + length)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint's tensors are in the model."""

    stored: Mapping[str, str]
    """Parameter of the model → the tensor that is it, under whatever name."""
    converted: Mapping[str, str]
    """Parameter (the first of several) → a tensor of which transformers makes it at load."""
    targets: tuple[str, ...] = ()
    """Patterns of all that the conversions in use make."""

    def made_at_load(self, name: str) -> bool:
        """Whether a conversion may make the parameter of other tensors."""
        return name in self.converted or any("\\" in target or target in name for target in self.targets)


def names_in_model(model: nn.Module, stored: Iterator[str]) -> Names:
    """Which parameter of `model` (a transformers model; it may be on the meta device) each stored tensor becomes at load."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    loaded: Any = model
    transforms = get_model_conversion_mapping(loaded)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known, prefix = set(model.state_dict()), getattr(loaded, "base_model_prefix", "")
    found: dict[str, str] = {}
    converted: dict[str, str] = {}
    targets: dict[str, None] = {}
    for key in sorted(stored):
        name = key
        for transform in renamings:
            name, _ = transform.rename_source_key(name)
        made = next(((t, new) for t in converters for new, source in [t.rename_source_key(name)] if source is not None), None)
        if made is not None:
            converted[_with_prefix(made[1], known, prefix)] = key
            targets |= dict.fromkeys(made[0].target_patterns)
            continue
        name = _with_prefix(name, known, prefix)
        if name in found:
            raise ModelError(f"the checkpoint holds {name!r} twice, as {found[name]!r} and {key!r}. Load and save it again.")
        found[name] = key
    return Names(stored=found, converted=converted, targets=tuple(targets))


def _with_prefix(name: str, known: set[str], prefix: str) -> str:
    """A base model's checkpoint lacks the prefix that a model with a head gives it, and the other way round."""
    if name in known or not prefix:
        return name
    if f"{prefix}.{name}" in known:
        return f"{prefix}.{name}"
    bare = name.removeprefix(f"{prefix}.")
    return bare if bare in known else name


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a tensor is in a new file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numbers * self.dtype.itemsize


def write_shard(
    shard: Shard, path: Path, tensors: Mapping[str, Target], value: Callable[[str], Tensor], changed: Collection[str]
) -> None:
    """A file of `tensors`, one in memory at a time: `value` gives those in `changed`, the others are `shard`'s own bytes."""
    codes = {dtype: code for code, dtype in TORCH_DTYPES.items()}
    last = max((entry.end for entry in shard.tensors.values()), default=0)
    begins = {name: shard.tensors[name].begin if name in shard.tensors else last for name in tensors}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, begins[name]))  # keeps them aligned
    header: dict[str, object] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    offset = 0
    for name in order:
        target = tensors[name]
        header[name] = {
            "dtype": codes[target.dtype],
            "shape": list(target.shape),
            "data_offsets": [offset, offset + target.size],
        }
        offset += target.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if name not in changed:
                shard.copy(name, file)
                continue
            held = value(name).contiguous().reshape(-1)
            file.write(held.view(torch.uint8).numpy().data if held.numel() else b"")
