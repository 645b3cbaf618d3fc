"""What writing GGUF needs to know of a base: llama.cpp's name of its architecture, heads, blocks, and the shapes of its weights.

Read from a transformers folder (`config.json` and the headers of its weights) or from a GGUF file; no weight is loaded.
llama.cpp keeps the rows of q and k in another order than transformers in some architectures, so that rotary pairs are
neighbours: `interleaved` is that order. Which architectures do was read off llama.cpp's own converter and checked against it,
tensor by tensor, for every line of `ARCHITECTURES` (`scripts/check_llama_cpp.py convert`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabank.errors import AdapterFileError, FingerprintError, MissingExtraError, ModelError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.files import read_header
from lorabank.formats.fingerprint import Fingerprint, SampledTensor, sampled

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt2": "gpt2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""transformers' `model_type` → llama.cpp's name of the architecture. Others are refused: their rows' order isn't known."""
INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures of llama.cpp whose rows of q and k alternate between the halves of a head."""


@dataclass(frozen=True, kw_only=True)
class GgufBase:
    """A base as llama.cpp sees it."""

    name: str
    """As it was named, for messages and metadata."""
    architecture: str
    """llama.cpp's name."""
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """(out, in) of its weights by llama.cpp's name (`blk.0.attn_q.weight`); empty where they aren't known."""
    experts: int = 0
    """How many there are in each stack of them."""
    complete: bool = False
    """Whether `shapes` has every weight: a folder's experts may be stored one by one."""

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.shapes) and "output.weight" not in self.shapes

    def tensor_name(self, path: str) -> str | None:
        """llama.cpp's name for the weight of a module of transformers, or None where there is none."""
        stem = _name_map(self.architecture, self.blocks).get_name(path)
        return None if stem is None else f"{stem}.weight"

    def heads_of(self, tensor: str) -> int | None:
        """Heads whose rows are interleaved in this tensor; None where its rows stay as they are."""
        if self.architecture not in INTERLEAVED:
            return None
        part = tensor.rpartition(".weight")[0].rpartition(".")[2]
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(part)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, …) of q or k in llama.cpp's order: within each head, row i of the first half, then row i of the second."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def require_gguf() -> None:
    """Raise MissingExtraError without the `gguf` library."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF files needs 'gguf', which isn't installed: pip install 'lorabank[gguf]'")


def read_base(path: Path, *, name: str | None = None) -> GgufBase:
    """The base in a transformers folder or a GGUF file. Raises ModelError, or MissingExtraError without the `gguf` library."""
    require_gguf()
    return _from_gguf(path, name or path.name) if path.is_file() else _from_folder(path, name or path.name)


SHIFTED_NORMS = ("gemma", "gemma2", "gemma3")
"""Architectures whose norms llama.cpp keeps with 1 added."""


def check_base(adapter: Adapter, file: Path, *, where: str) -> None:
    """Raise FingerprintError where a GGUF base isn't the one that the adapter was trained on.

    Its norms and biases are compared, which GGUF keeps as they are; matrices may be quantised. Says nothing without a
    fingerprint, or where the architecture changes its norms.
    """
    base = read_base(file)
    if adapter.fingerprint is None or base.architecture in SHIFTED_NORMS:
        return
    stored = {tensor.name: tensor for tensor in open_gguf(file, base.name).tensors}
    here: dict[str, SampledTensor] = {}
    for name in adapter.fingerprint.tensors:
        path, _, suffix = name.rpartition(".")
        tensor = stored.get(f"{_name_map(base.architecture, base.blocks).get_name(path)}.{suffix}")
        if tensor is None or len(tensor.shape) != 1 or tensor.tensor_type.name != "F32" or base.heads_of(tensor.name):
            continue
        values = torch.from_numpy(np.array(tensor.data))
        here[name] = sampled(values, vocabulary=adapter.fingerprint.tensors[name].vocabulary)
    difference = adapter.fingerprint.compare(Fingerprint(tensors=here)) if here else None
    if difference:
        raise FingerprintError(
            f"{where}: the adapter was trained on another base than {base.name!r}: {difference}. Name its own base with --base, "
            "or pass --force if you know that it fits."
        )


def _from_folder(folder: Path, name: str) -> GgufBase:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"base {name!r}: no config.json with a model_type in {folder} ({error}). Name its folder.") from error
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"base {name!r}: how llama.cpp keeps the weights of a {kind!r} model isn't known here{closest(kind, ARCHITECTURES)}. "
            f"Known: {', '.join(ARCHITECTURES)}. Merge the adapter (lorabank merge), then use llama.cpp's convert_hf_to_gguf.py."
        )
    heads, blocks = (
        _number(config, name, *keys) for keys in (("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"))
    )
    base = GgufBase(
        name=name,
        architecture=ARCHITECTURES[kind],
        blocks=blocks,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        experts=next((config[key] for key in ("num_local_experts", "num_experts") if isinstance(config.get(key), int)), 0),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(file)
        except AdapterFileError as error:
            raise ModelError(f"base {name!r}: {error}") from error
        for key, entry in header.tensors.items():
            tensor = base.tensor_name(key.removesuffix(".weight")) if key.endswith(".weight") else None
            if tensor is not None and len(entry.shape) > 1:
                shapes[tensor] = entry.shape[::-1] if kind == "gpt2" and ".h." in f".{key}" else entry.shape
    return replace(base, shapes=shapes)


def _number(config: Mapping[str, Any], name: str, *keys: str) -> int:
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
    if found is None:
        raise ModelError(f"base {name!r}: its config.json has no {keys[0]}. Use the model's own config.json.")
    return found


def open_gguf(file: Path, name: str) -> Any:
    """A `gguf.GGUFReader`. Raises ModelError for a file that isn't one, or is damaged."""
    import gguf

    try:
        return gguf.GGUFReader(str(file))
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"base {name!r}: no GGUF file that can be read ({error}). Copy or download it again.") from error


def _from_gguf(file: Path, name: str) -> GgufBase:
    reader = open_gguf(file, name)

    def value(key: str) -> Any:
        entry = reader.get_field(key)
        return None if entry is None else entry.contents()

    architecture = value("general.architecture")
    if value("general.type") == "adapter":
        raise ModelError(f"base {name!r}: this GGUF is an adapter, not a model. Name the base model's file.")
    if architecture not in ARCHITECTURES.values():
        raise ModelError(
            f"base {name!r}: how llama.cpp keeps the weights of a {architecture!r} model isn't known here. "
            f"Known: {', '.join(sorted(set(ARCHITECTURES.values())))}."
        )
    blocks, heads = value(f"{architecture}.block_count"), value(f"{architecture}.attention.head_count")
    kv_heads = value(f"{architecture}.attention.head_count_kv") or heads
    if not all(isinstance(number, int) for number in (blocks, heads, kv_heads)):
        raise ModelError(f"base {name!r}: this GGUF has no one number of blocks and heads ({blocks}, {heads}, {kv_heads}).")
    return GgufBase(
        name=name,
        architecture=architecture,
        blocks=blocks,
        heads=heads,
        kv_heads=kv_heads,
        experts=value(f"{architecture}.expert_count") or 0,
        complete=True,
        shapes={tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors},
    )


@cache
def _name_map(architecture: str, blocks: int) -> Any:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)
