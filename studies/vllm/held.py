"""What vLLM holds of an adapter (a file that hold_vllm.py wrote) beside what it should: every weight that it adapts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lorabank as lb
from lorabank.formats.slices import without_slices

TOLERANCE = 1e-6
"""Of the largest number of a weight's change: vLLM's B holds the scaling in float32, ΔW here is a product in float64."""
PACKED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "experts.w13": ("experts.gate_up_proj",),
    "experts.w2": ("experts.down_proj",),
}
"""What vLLM has in one weight → transformers' weights, in its order."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the base, a stack of experts' (experts, out, in)."""

    value: torch.Tensor
    delta: torch.Tensor
    """The adapter's change of it, float64; zeros where it leaves it alone."""


def wanted(model: torch.nn.Module, adapter: lb.Adapter) -> dict[str, Weight]:
    """Every weight of the base by its path in transformers."""
    parameters = model.named_parameters(remove_duplicate=False)  # a tied head has a name of its own
    weights = {name.removesuffix(".weight"): value.detach() for name, value in parameters if value.ndim > 1}
    if getattr(model.config, "model_type", "") == "gpt_oss":  # which alone keeps its experts as (experts, in, out)
        weights = {path: value.mT if value.ndim == 3 else value for path, value in weights.items()}
    deltas = {path: torch.zeros_like(value, dtype=torch.float64) for path, value in weights.items()}
    for path, layer in without_slices(adapter).layers.items():
        delta = layer.scaling * layer.B.double() @ layer.A.double()
        if layer.stack:
            parameter, _, expert = path.rpartition(".")
            deltas[parameter][int(expert)] = delta
        else:
            deltas[path] += delta.T if layer.looks_up else delta
    return {path: Weight(value=value, delta=deltas[path]) for path, value in weights.items()}


def sources(path: str, known: Mapping[str, Weight]) -> list[str]:
    """The weights of transformers that are in vLLM's weight of a path."""
    path = path.replace(".block_sparse_moe.", ".mlp.").replace(".attn.", ".self_attn.")
    for packed, parts in PACKED.items():
        if path not in known and path.endswith(packed):
            return [path.removesuffix(packed) + part for part in parts]
    return [path]


def compare(known: Mapping[str, Weight], file: Path) -> dict[str, Any]:
    """Paths of weights whose change isn't the adapter's (dropped: it is zero), and how far the others' are from it."""
    tensors = load_file(file)
    dropped, wrong, base, farthest, seen = [], [], 0.0, 0.0, set()
    paths = sorted(name.removesuffix(".delta") for name in tensors if name.endswith(".delta"))
    for path in paths:
        names = sources(path, known)
        seen.update(names)
        if f"{path}.base" in tensors:
            weight = torch.cat([known[name].value for name in names], dim=-2)
            base = max(base, float((tensors[f"{path}.base"] - weight).abs().max()))
        delta = torch.cat([known[name].delta for name in names], dim=-2)
        found = tensors[f"{path}.delta"]
        distance = float((found - delta).abs().max() / delta.abs().max().clamp(min=torch.finfo(delta.dtype).tiny))
        if distance <= TOLERANCE:
            farthest = max(farthest, distance)
        else:
            (wrong if found.any() else dropped).append(path)
    changed = {path for path, part in known.items() if part.delta.any()}
    return {
        "modules": len(paths),
        "farthest_expert_weight": base,
        "farthest_relative_change": farthest,
        "dropped": dropped,
        "wrong": wrong,
        "not_there": sorted(changed - seen),
    }


def equal(found: Mapping[str, Any]) -> bool:
    """Whether `compare` found every change where it belongs, and the experts' own weights beside it."""
    return not (found["dropped"] or found["wrong"] or found["not_there"] or found["farthest_expert_weight"])
