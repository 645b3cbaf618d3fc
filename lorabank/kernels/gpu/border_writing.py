"""Fills the borders and shadows of frozen weights (bordered.py) from the adapters' capacity buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu.sums import four

STEP = 64
"""Borders are multiples of so many columns: rows stay aligned to 128 bytes."""
WIDEST = 128
"""Ranks of all slots together up to which a border pays: each costs a product a further column."""
MOST_SLOTS = 64
"""Slot numbers that `_write` compares every column with."""
WRITTEN = 64
"""Features that one program writes a border and a shadow for at once."""


@dataclass(frozen=True, kw_only=True)
class Border:
    """What `write` fills for one layer."""

    border: Tensor
    """(F, share): a part of the wide weight, further columns of it or further rows, turned."""
    leaf: Tensor
    """Capacity buffer (ΣR, F) that goes there: B for further columns, A for further rows."""
    shadow: Tensor
    """(share, G), contiguous."""
    other: Tensor
    """The other leaf's capacity buffer (ΣR, G), for the shadow."""
    ranks: Tensor
    poison: Tensor
    """fp32 (P, blocks), contiguous: NaN where a slot's part of `leaf` isn't finite at some features."""
    rows: int
    """Up to the last in use; places beyond are zero and stay so."""


def border_width(rows: int) -> int:
    """Columns of a border for so many rows of capacity buffers, up to the last in use; 0 where none pays."""
    width = -(-rows // STEP) * STEP
    return width if width <= WIDEST else 0


@triton.jit
def _write(
    w0, w1, w2, w3, t0, t1, t2, t3, v0, v1, v2, v3, u0, u1, u2, u3, k0, k1, k2, k3, p0, p1, p2, p3, f0, f1, f2, f3,
    g0, g1, g2, g3, length0, length1, length2, length3, turned0, turned1, turned2, turned3, share0, share1, share2, share3,
    blocks0, blocks1, blocks2, blocks3, slots,
    C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A layer's border and shadow at some features, and for each slot whether its border is all finite there."""
    block, layer = tl.program_id(0), tl.program_id(1)
    leaf, target, other, shadow, ranks, poison = w0, t0, v0, u0, k0, p0
    features, wide, length, turned, share, blocks = f0, g0, length0, turned0, share0, blocks0
    if C > 1:  # noqa: SIM102  decided by the compiler
        if layer == 1:
            leaf, target, other, shadow, ranks, poison = w1, t1, v1, u1, k1, p1
            features, wide, length, turned, share, blocks = f1, g1, length1, turned1, share1, blocks1
    if C > 2:  # noqa: SIM102  decided by the compiler
        if layer == 2:
            leaf, target, other, shadow, ranks, poison = w2, t2, v2, u2, k2, p2
            features, wide, length, turned, share, blocks = f2, g2, length2, turned2, share2, blocks2
    if C > 3:  # noqa: SIM102  decided by the compiler
        if layer == 3:
            leaf, target, other, shadow, ranks, poison = w3, t3, v3, u3, k3, p3
            features, wide, length, turned, share, blocks = f3, g3, length3, turned3, share3, blocks3
    j, s, f = tl.arange(0, ROWS), tl.arange(0, SLOTS), block * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(ranks + s * 2, mask=s < slots, other=0)
    rank = tl.load(ranks + s * 2 + 1, mask=s < slots, other=0)
    mine = ((start[None, :] <= j[:, None]) & (j[:, None] < (start + rank)[None, :])).to(tl.int32)
    taken, row = (tl.sum(mine, 1) > 0) & (j < share), j.to(tl.int64)[:, None]
    if block * BLOCK < features:
        inside = (j < share)[:, None] & (f < features)[None, :]
        value = tl.load(leaf + row * features + f[None, :], mask=taken[:, None] & inside, other=0.0)
        rounded = value.to(target.dtype.element_ty)
        back = rounded.to(tl.float32)
        finite = (back - back) == 0.0  # as it stands in the border: fp16 ends at 65,504
        spoiled = tl.sum(mine * tl.max(1 - finite.to(tl.int32), 1)[:, None], 0)
        tl.store(poison + s * blocks + block, tl.where(spoiled > 0, float("nan"), 0.0), mask=s < slots)
        clean = tl.where(finite, rounded, 0.0).to(target.dtype.element_ty)
        if turned == 0:  # further columns
            to = target + f.to(tl.int64)[:, None] * length + j[None, :]
            tl.store(to, tl.trans(clean), mask=(f < features)[:, None] & (j < share)[None, :])
        else:
            tl.store(target + row * length + f[None, :], clean, mask=inside)
    if block * BLOCK < wide:
        inside = taken[:, None] & (f < wide)[None, :]
        value = tl.load(other + row * wide + f[None, :], mask=inside, other=0.0)
        tl.store(shadow + row * wide + f[None, :], value.to(shadow.dtype.element_ty), mask=inside)


def poison_like(ranks_P2: Tensor, layers: int, features: int) -> Tensor:
    """Room for what `write` finds out about each slot of some layers with up to so many features: fp32 (C, P, blocks)."""
    return torch.zeros((layers, ranks_P2.shape[0], -(-features // WRITTEN)), device=ranks_P2.device)


def write(borders: Sequence[Border]) -> None:
    """Fill the borders and shadows of up to four layers in one start."""
    slots, sizes = borders[0].ranks.shape[0], [size for b in borders for size in (b.leaf.shape[1], b.other.shape[1])]
    turned = [int(b.border.stride(1) != 1) for b in borders]
    tensors = zip(*((b.leaf, b.border, b.other, b.shadow, b.ranks, b.poison) for b in borders), strict=True)
    numbers = zip(
        *(
            (b.leaf.shape[1], b.other.shape[1], b.border.stride(turn), turn, b.rows, b.poison.shape[-1])
            for b, turn in zip(borders, turned, strict=True)
        ),
        strict=True,
    )
    start: Any = _write  # never inside compiled code, which would see to the device: Triton starts kernels on the current GPU
    with torch.cuda.device_of(borders[0].poison):
        start[(-(-max(sizes) // WRITTEN), len(borders))](
            *(value for values in tensors for value in four(values)), *(value for values in numbers for value in four(values)),
            slots,
            C=len(borders), ROWS=triton.next_power_of_2(max(16, *(b.rows for b in borders))),
            SLOTS=triton.next_power_of_2(slots), BLOCK=WRITTEN, num_warps=4,
        )  # fmt: skip
