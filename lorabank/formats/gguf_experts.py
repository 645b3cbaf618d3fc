"""Stacked experts in GGUF: llama.cpp keeps gate, up and down apart, a stack (experts, out, in) each, adapted with a stack each.

`<weight>.lora_a` is (experts, r, in) and `.lora_b` (experts, out, r) there (`build_lora_mm_id` in llama.cpp's llama-graph.cpp).
transformers has gate and up in one parameter, whose outputs are gate's, then up's: both get its A, and their half of its B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.gguf_base import GgufBase
from lorabank.formats.stacks import stacks

PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""transformers' stacked parameters → the parts that others keep apart, in the order of its outputs."""


@dataclass(frozen=True, kw_only=True)
class StackPart:
    """One stacked weight's change."""

    path: str
    """Of the part, as transformers would have it: `model.layers.0.mlp.experts.gate_proj`."""
    A: Tensor
    """(experts, r, in)"""
    B: Tensor
    """(experts, out, r)"""
    scaling: float

    @property
    def experts(self) -> list[AdapterLayer]:
        """As a layer for each."""
        return [AdapterLayer(A, B, self.scaling) for A, B in zip(self.A, self.B, strict=True)]


def parts(adapter: Adapter, *, where: str) -> list[StackPart]:
    """The changes of all stacked experts, part by part. Raises AdapterFileError for a parameter that isn't known."""
    found: list[StackPart] = []
    for path, (A, B, scaling) in stacks(adapter.layers).items():
        owner, _, name = path.rpartition(".")
        if name not in PARTS:
            raise AdapterFileError(
                f"{where}: stacked experts {path!r} are none of {', '.join(PARTS)}, so what they are in other tools isn't known. "
                "Merge it (lorabank merge)."
            )
        halves = B.chunk(len(PARTS[name]), dim=1)
        found += [
            StackPart(path=f"{owner}.{part}", A=A, B=half.contiguous(), scaling=scaling)
            for part, half in zip(PARTS[name], halves, strict=True)
        ]
    return found


def expert_places(adapter: Adapter, base: GgufBase, *, where: str) -> dict[str, StackPart]:
    """llama.cpp's name of the weight → its change. Raises AdapterFileError for a base without it, or of another size."""
    found: dict[str, StackPart] = {}
    for part in parts(adapter, where=where):
        name = base.tensor_name(part.path)
        shape = (len(part.A), part.B.shape[1], part.A.shape[2])
        here = base.shapes.get(name or "")
        counted = base.experts if here is None else here[0]
        if name is None or counted == 0 or (here is None and base.complete):
            raise AdapterFileError(
                f"{where}: {part.path!r} are experts, and base {base.name!r} ({base.architecture}) has none there. Is it the "
                "adapter's base?"
            )
        if counted != len(part.A) or (here is not None and here != shape):
            raise AdapterFileError(
                f"{where}: {part.path!r} changes {shape[0]} experts of {shape[1:]}, and base {base.name!r} has "
                f"{here or f'{counted} experts'} there: it was trained on another model. Name its own base with --base."
            )
        found[name] = part
    return found


def merged_experts(weight_EOI: Tensor, part: StackPart) -> Tensor:
    """W + ΔW of each expert, float64."""
    return weight_EOI.double() + part.scaling * torch.bmm(part.B.detach().double(), part.A.detach().double())
