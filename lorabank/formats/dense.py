"""A change of a convolution in groups that reaches from one group into another, as PEFT trains it.

PEFT's A (R, in, *kernel) sees all channels, and its B (out, R/groups) is a convolution in groups: each group of outputs reads
ranks of its own. So the change is a convolution without groups, which the base weight has no numbers for: it runs beside the
base and can't be merged. Here B is (out, R), zero where an output doesn't read a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabank.formats.adapter import Adapter, AdapterLayer

WHY = "its A reaches from one group of channels into another, as PEFT trains it, and the base weight has no numbers for that"
"""Of a convolution in groups, why it can't be merged."""


def from_file(A: Tensor, B: Tensor, scaling: float, groups: int) -> AdapterLayer:
    """The layer of PEFT's A (R, in, *kernel) and B (out, R/groups)."""
    return AdapterLayer(A, torch.block_diag(*B.chunk(groups)), scaling, groups=groups, dense=True)


def to_file(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """PEFT's A and B. Where an output reads ranks of other groups too (after training here), A stands in it once a group."""
    blocks = _blocks(layer)
    if blocks is not None:
        return layer.A, blocks
    return layer.A.repeat(layer.groups, *(1,) * (layer.A.ndim - 1)), layer.B


def file_rank(layer: AdapterLayer) -> int:
    """The rank that PEFT counts."""
    return layer.rank if _blocks(layer) is not None else layer.rank * layer.groups


def dense_layers(adapter: Adapter) -> tuple[str, ...]:
    """Paths of the layers of this kind."""
    return tuple(path for path, layer in adapter.layers.items() if layer.dense)


def _blocks(layer: AdapterLayer) -> Tensor | None:
    """B (out, R/groups) of the ranks that each group reads, None where it reads others'."""
    width, rest = divmod(layer.rank, layer.groups)
    if rest:
        return None
    own = [rows[:, i * width : (i + 1) * width] for i, rows in enumerate(layer.B.chunk(layer.groups))]
    kept = sum(int(block.count_nonzero()) for block in own)
    return torch.cat(own).contiguous() if kept == int(layer.B.count_nonzero()) else None
