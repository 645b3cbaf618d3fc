"""An adapter in the one form that every vLLM reads right: one rank, one scaling of 1, no patterns.

PEFT's files may give each layer a rank and a scaling of its own; vLLM before `rank_pattern` was read takes one α/r for all.
So each layer's scaling goes into its B, and A and B are padded with zeros to one rank, which changes no product.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.files import read_header
from lorabank.formats.readers import VLLM_RANKS, refuse
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import without_slices
from lorabank.formats.vllm_experts import one_by_one
from lorabank.formats.vllm_families import family_obstacles


def vllm_adapter(adapter: Adapter, *, where: str = "the adapter", model_type: str | None = None) -> Adapter:
    """The same change as an adapter of one rank with α = r, float32 or wider; save it as any other.

    The rank is the smallest value of vLLM's `--max-lora-rank` that holds all layers. `where` names the adapter in messages;
    `model_type` is transformers', of the base: by it stacked experts get their names, and is known what vLLM adapts of a family.
    Raises AdapterFileError with every reason why vLLM can't read it (DoRA, convolutions, a rank above 512, NaN, …).
    """
    adapter = one_by_one(adapter, model_type, where=where)
    as_matrices = {path: replace(layer, stack=0) for path, layer in adapter.layers.items()}  # stacks that vLLM reads are left
    refuse(replace(adapter, layers=as_matrices), "vllm", where=where, also=family_obstacles(adapter, model_type))
    adapter = without_slices(adapter, any_norms)
    rank = vllm_rank(adapter)
    config = AdapterConfig(
        rank=rank, alpha=rank, targets=sorted(adapter.layers), dropout=adapter.config.dropout, init=adapter.config.init
    )
    layers = {path: folded(layer, rank) for path, layer in adapter.layers.items()}
    return replace(adapter, config=config, layers=layers, metadata={**adapter.metadata, "export": "vllm"})


def vllm_rank(adapter: Adapter) -> int:
    """The `--max-lora-rank` for an adapter that vLLM takes."""
    largest = max(layer.rank for layer in adapter.layers.values())
    return next(rank for rank in VLLM_RANKS if rank >= largest)


def folded(layer: AdapterLayer, rank: int) -> AdapterLayer:
    """A layer whose scaling is 1 and whose rank is `rank`: the scaling in B, zeros at the end of both. Float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(layer.A.dtype, layer.B.dtype), torch.float32)
    missing = rank - layer.rank
    A, B = layer.A.detach().to(dtype), layer.B.detach().to(dtype) * layer.scaling
    A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
    B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
    return replace(layer, A=A, B=B, scaling=1.0, frozen_rank=0)


def check_shapes(adapter: Adapter, folder: Path, *, where: str) -> None:
    """Raise AdapterFileError where a layer changes a weight of another shape than the one in a base's folder.

    Only headers are read. A weight that the folder has under another name isn't compared: vLLM renames some of them too. But it
    must have some of them, by the last names of their paths at least. A folder without safetensors tells nothing.
    """
    shapes = {
        name: entry.shape for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).tensors.items()
    }
    if not shapes and not (folder / "config.json").is_file():
        raise AdapterFileError(
            f"{where}: {folder} holds no model (no config.json, no weights). Name the base's folder with --base."
        )
    if (folder / "adapter_config.json").is_file():
        raise AdapterFileError(f"{where}: {folder} is an adapter, not a model. Name the base's folder with --base.")
    ends = {_end(name.removesuffix(".weight")) for name in shapes}
    if shapes and not any(_end(path) in ends for path in adapter.layers):
        first = next(iter(adapter.layers))
        raise AdapterFileError(
            f"{where}: none of its layers is in {folder}, such as {first!r}: it was trained on another model. Name its own base "
            "with --base."
        )
    for path, layer in adapter.layers.items():
        shape = layer.size if layer.looks_up else layer.size[::-1]
        found = shapes.get(f"{path}.weight", shape)
        if found != shape:
            raise AdapterFileError(
                f"{where}: layer {path!r} changes a weight of {shape}, and {path}.weight in {folder} is {found}: it was "
                "trained on another model. Name its own base with --base."
            )


def _end(path: str) -> str:
    """The last names of a path, `0.self_attn.q_proj`: what comes before differs between a model's classes."""
    return ".".join(path.split(".")[-3:])
