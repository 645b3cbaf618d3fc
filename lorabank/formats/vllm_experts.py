"""Stacked experts as vLLM reads them: a matrix an expert, under the names that the family's checkpoints have.

vLLM packs them (`PackedLoRALayerWeights.pack_moe`): gate, down and up of every expert must be there, of one rank. The names are
those of its models' `get_expert_mapping`. vLLM 0.32 loaded an adapter of each family here, and then held the adapter's
change, expert by expert (studies/vllm). Its kernels for them need a GPU: none was run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lorabank.errors import AdapterFileError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.gguf_experts import StackPart, parts
from lorabank.formats.stacks import stacks

PLAIN: Mapping[str, str] = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_SHORT: Mapping[str, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FAMILIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "deepseek_v3": ("mlp.experts", PLAIN),
    "ernie4_5_moe": ("mlp.experts", PLAIN),
    "exaone_moe": ("mlp.experts", PLAIN),
    "glm4_moe": ("mlp.experts", PLAIN),
    "minimax_m2": ("block_sparse_moe.experts", _SHORT),
    "mixtral": ("block_sparse_moe.experts", _SHORT),
    "olmoe": ("mlp.experts", PLAIN),
    "qwen2_moe": ("mlp.experts", PLAIN),
    "qwen3_moe": ("mlp.experts", PLAIN),
    "qwen3_next": ("mlp.experts", PLAIN),
}
"""transformers' `model_type` → (where the experts of a block are in vLLM, its names of their parts)."""
STACKED = ("gpt_oss",)
"""Families of which vLLM reads the stacks as PEFT writes them (`is_3d_moe_weight`), both of a block's or neither."""
OWNER = ".mlp.experts"
"""Where transformers has them in these families."""


def model_type_of(folder: Path) -> str | None:
    """What a model folder's config says it is; None without one."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def one_by_one(adapter: Adapter, model_type: str | None, *, where: str) -> Adapter:
    """The adapter with a layer for each part of each expert, or its whole stacks. Raises AdapterFileError for other families."""
    if not any(layer.stack for layer in adapter.layers.values()):
        return adapter
    if model_type in STACKED:
        return _whole_stacks(adapter, where)
    if model_type is None or model_type not in FAMILIES:
        known = sorted([*FAMILIES, *STACKED])
        why = (
            f"what those of a {model_type!r} model are called in vLLM isn't known here{closest(model_type, known)}"
            if model_type
            else "what they are called in vLLM depends on the family, and the base isn't here: name it with --base FOLDER"
        )
        raise AdapterFileError(
            f"{where}: it adapts stacked experts, and {why}. Known: {', '.join(known)}. Otherwise merge it (lorabank merge) "
            "and serve the merged model."
        )
    inside, names = FAMILIES[model_type]
    layers = {path: layer for path, layer in adapter.layers.items() if not layer.stack}
    for owner, found in _by_owner(adapter, where).items():
        if not owner.endswith(OWNER):
            raise AdapterFileError(f"{where}: experts at {owner!r}; expected them at …{OWNER} in a {model_type!r} model.")
        block = owner.removesuffix(OWNER)
        for part, change in _complete(found).items():
            for expert, layer in enumerate(change.experts):
                layers[f"{block}.{inside}.{expert}.{names[part]}"] = layer
    return replace(adapter, layers=layers)


def _whole_stacks(adapter: Adapter, where: str) -> Adapter:
    """Every block's stacks, gate with up and down; the one that the adapter leaves alone with a change of zero."""
    found: dict[str, dict[str, list[AdapterLayer]]] = {}
    for path, (A, B, scaling) in stacks(adapter.layers).items():
        owner, _, name = path.rpartition(".")
        if name not in ("gate_up_proj", "down_proj"):
            raise AdapterFileError(f"{where}: stacked experts {path!r}; expected gate_up_proj and down_proj there.")
        found.setdefault(owner, {})[name] = [AdapterLayer(a, b, scaling, stack=len(A)) for a, b in zip(A, B, strict=True)]
    layers = {path: layer for path, layer in adapter.layers.items() if not layer.stack}
    for owner, by_name in found.items():
        for name in ("gate_up_proj", "down_proj"):
            for expert, layer in enumerate(by_name[name] if name in by_name else _left_alone(name, by_name)):
                layers[f"{owner}.{name}.{expert}"] = layer
    return replace(adapter, layers=layers)


def _left_alone(name: str, by_name: Mapping[str, list[AdapterLayer]]) -> list[AdapterLayer]:
    """A change of zero of one of the two stacks, whose sizes follow from the other's."""
    other = next(iter(by_name.values()))
    rank, fan_in, fan_out = other[0].rank, other[0].A.shape[1], len(other[0].B)
    inputs, outputs = (fan_out // 2, fan_in) if name == "down_proj" else (fan_out, fan_in * 2)
    A, B = other[0].A.new_zeros(rank, inputs), other[0].B.new_zeros(outputs, rank)
    return [AdapterLayer(A.clone(), B.clone(), 1.0, stack=len(other)) for _ in other]


def _by_owner(adapter: Adapter, where: str) -> dict[str, dict[str, StackPart]]:
    found: dict[str, dict[str, StackPart]] = {}
    for part in parts(adapter, where=where):
        owner, _, name = part.path.rpartition(".")
        found.setdefault(owner, {})[name] = part
    return found


def _complete(found: Mapping[str, StackPart]) -> dict[str, StackPart]:
    """All three parts of a block's experts; those that the adapter leaves alone with a change of zero."""
    one = next(iter(found.values()))
    width, inner = (one.B.shape[1], one.A.shape[2]) if "down_proj" in found and len(found) == 1 else (0, 0)
    if not width:
        known = found.get("gate_proj") or found["up_proj"]
        width, inner = known.A.shape[2], known.B.shape[1]

    def zero(name: str) -> StackPart:
        fan_in, fan_out = (inner, width) if name == "down_proj" else (width, inner)
        A = torch.zeros(len(one.A), 1, fan_in, dtype=one.A.dtype)
        return StackPart(path=name, A=A, B=torch.zeros(len(one.A), fan_out, 1, dtype=one.B.dtype), scaling=1.0)

    return {name: found[name] if name in found else zero(name) for name in PLAIN}
