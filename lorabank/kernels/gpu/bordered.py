"""Kernels for frozen weights that carry A or B at their border, so that LoRA needs no pass over the wide side of a layer.

With B as further columns of W, [W, Bᵀ], the product of [x, s·xAᵀ] with it is y complete, and dy·[W, Bᵀ] gives dx and dy·B at
once; with A as further rows, [W; A], h·[W; A]ᵀ gives y and h·Aᵀ, and [dy, s·dyB]·[W; A] is dh complete. So only one side of a
layer, x and dx or y and dy, is touched beside the products: `widen` makes [x, s·xAᵀ] in one pass over x, `finish` adds what is
left to that side. The other leaf, by which those two multiply, stands in a layer's shadow, in the dtype of the weight: up to four
layers that read the same x have theirs below one another, so many rows each (`share`), and a border column for each such row;
`left` of these columns stand before x, the others behind it. border_writing.py fills borders and shadows.

A row of the shadow belongs to the slot whose ranks hold that row of the capacity buffers. Border columns of rows that no slot
has are zero, and so is x's border in other slots' columns. A slot's numbers that aren't finite would reach every row through
0 · NaN: the border has zeros for them and `poison` NaN for their slot, which `widen` and `finish` add to that slot's own rows.
Other shapes as in lora.py. The plain twin is the layers one after the other. What a gated MLP has besides: gated_mlp.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabank.kernels.gpu import sums
from lorabank.kernels.gpu.lora import SHARED_BYTES, _precision
from lorabank.kernels.gpu.sums import four
from lorabank.kernels.tables import TILE, RouteTables

SHORTEST = 1024
"""Features that a program of `widen` takes at least."""
SPLITS = 4
"""Programs at most that share a tile there."""
FINISHED = 512
"""Programs of `finish` at least: four a multiprocessor of an H100."""


@triton.jit
def _by_layer(layer, v0, v1, v2, v3, C: tl.constexpr):
    """Each place's value, which depends on its layer alone."""
    value = v0
    if C > 1:
        value = tl.where(layer == 1, v1, value)
    if C > 2:
        value = tl.where(layer == 2, v2, value)
    if C > 3:
        value = tl.where(layer == 3, v3, value)
    return value


@triton.jit
def _poison(poison, slot, blocks, BLOCKS: tl.constexpr):
    """0, or NaN where a number of the slot in that border isn't finite."""
    b = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(poison + slot * blocks + b, mask=b < blocks, other=0.0), 0)


@triton.jit
def _scale(total, layer, slot, s0, s1, s2, s3, p0, p1, p2, p3, blocks, C: tl.constexpr, BLOCKS: tl.constexpr):
    """total, a column a place, times the scaling of slot and layer, with its poison."""
    at = tl.maximum(slot, 0)
    scaling = _by_layer(layer, tl.load(s0 + at), tl.load(s1 + at), tl.load(s2 + at), tl.load(s3 + at), C)
    second, third, fourth = 0.0, 0.0, 0.0
    first = _poison(p0, at, blocks, BLOCKS)
    if C > 1:
        second = _poison(p1, at, blocks, BLOCKS)
    if C > 2:
        third = _poison(p2, at, blocks, BLOCKS)
    if C > 3:
        fourth = _poison(p3, at, blocks, BLOCKS)
    spoiled = _by_layer(layer, first, second, third, fourth, C) + tl.zeros_like(layer)
    return total * (scaling + tl.zeros_like(layer))[None, :] + spoiled[None, :]


@triton.jit
def _keep(value, layer, n0, n1, n2, n3, entry, r, kept, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store every layer's narrow."""
    at = entry[:, None] * WIDTH + r[None, :]
    tl.store(n0 + at, value, mask=kept & (layer == 0)[None, :])
    if C > 1:
        tl.store(n1 + at, value, mask=kept & (layer == 1)[None, :])
    if C > 2:
        tl.store(n2 + at, value, mask=kept & (layer == 2)[None, :])
    if C > 3:
        tl.store(n3 + at, value, mask=kept & (layer == 3)[None, :])


@triton.jit
def _lay(
    total, wide, rows, entry, inside, slot, n0, n1, n2, n3, b0, b1, b2, b3, r0, r1, r2, r3, s0, s1, s2, s3, p0, p1, p2, p3,
    features, width, blocks, share, left,
    C: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, PADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scale x·shadowᵀ of some rows, a column a place, and store it in each layer's narrow and in the border; zeros beside it."""
    j, q = tl.arange(0, PLACES), tl.arange(0, PADS)
    layer, r = j // WIDTH, j % WIDTH
    mine = (r < _by_layer(layer, r0, r1, r2, r3, C)) & (layer < C) & (slot >= 0)
    row = layer * share + _by_layer(layer, b0, b1, b2, b3, C) + r
    made = _scale(total, layer, slot, s0, s1, s2, s3, p0, p1, p2, p3, blocks, C, BLOCKS).to(wide.dtype.element_ty)
    kept = inside[:, None] & mine[None, :]
    _keep(made, layer, n0, n1, n2, n3, entry, r, kept, C, WIDTH)
    line = wide + rows[:, None] * width
    tl.store(line + (row + tl.where(row >= left, features, 0))[None, :], made, mask=kept)
    start, rank = _by_layer(q // share, b0, b1, b2, b3, C), _by_layer(q // share, r0, r1, r2, r3, C)
    own = (q % share >= start) & (q % share < start + rank) & (q // share < C) & (slot >= 0)
    others = inside[:, None] & ((q < width - features) & ~own)[None, :]
    to = line + (q + tl.where(q >= left, features, 0))[None, :]
    tl.store(to, tl.zeros((BLOCK_M, PADS), dtype=wide.dtype.element_ty), mask=others)


@triton.jit
def _widen(
    x, wide, parts, shadow, n0, n1, n2, n3, k0, k1, k2, k3, s0, s1, s2, s3, p0, p1, p2, p3, order, tiles, features, width, blocks,
    entries, each, share, left,
    C: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, PADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x into its place between borders, and x·shadowᵀ: with WHOLE into the border, else `each` features' share into parts.

    Places: WIDTH ranks of each layer.
    """
    tile, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if part * BLOCK_M < count:
        m, j = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PLACES)
        layer, r = j // WIDTH, j % WIDTH
        place = tl.maximum(slot, 0) * 2  # loaded here: torch doesn't see that a function loads
        b0, b1, b2, b3 = tl.load(k0 + place), tl.load(k1 + place), tl.load(k2 + place), tl.load(k3 + place)
        r0, r1, r2, r3 = tl.load(k0 + place + 1), tl.load(k1 + place + 1), tl.load(k2 + place + 1), tl.load(k3 + place + 1)
        mine = (r < _by_layer(layer, r0, r1, r2, r3, C)) & (layer < C) & (slot >= 0)
        row = layer * share + _by_layer(layer, b0, b1, b2, b3, C) + r
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_M, PLACES), dtype=tl.float32)
        end = tl.minimum(features, (split + 1) * each)
        for at in range(split * each, end, BLOCK_F):
            f = at + tl.arange(0, BLOCK_F)
            kept, taken = (m < count)[:, None] & (f < end)[None, :], mine[:, None] & (f < end)[None, :]
            x_tile = tl.load(x + rows[:, None] * features + f[None, :], mask=kept, other=0.0)
            w_tile = tl.load(shadow + row.to(tl.int64)[:, None] * features + f[None, :], mask=taken, other=0.0)
            tl.store(wide + rows[:, None] * width + left + f[None, :], x_tile, mask=kept)
            total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision=PRECISION)
        if WHOLE:
            _lay(
                total, wide, rows, (first + m).to(tl.int64), m < count, slot, n0, n1, n2, n3, b0, b1, b2, b3, r0, r1, r2, r3,
                s0, s1, s2, s3, p0, p1, p2, p3, features, width, blocks, share, left, C, WIDTH, PLACES, PADS, BLOCK_M, BLOCKS,
            )  # fmt: skip
        else:
            entry = split.to(tl.int64) * entries + first + m
            tl.store(parts + entry[:, None] * PLACES + j[None, :], total, mask=(m < count)[:, None])


@triton.jit
def _lay_parts(
    wide, parts, n0, n1, n2, n3, k0, k1, k2, k3, s0, s1, s2, s3, p0, p1, p2, p3, order, tiles, features, width, blocks, entries,
    splits, share, left,
    C: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, PADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The border of x from what `_widen` left in parts."""
    tile, part = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if part * BLOCK_M < count:
        m, j = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PLACES)
        place = tl.maximum(slot, 0) * 2
        b0, b1, b2, b3 = tl.load(k0 + place), tl.load(k1 + place), tl.load(k2 + place), tl.load(k3 + place)
        r0, r1, r2, r3 = tl.load(k0 + place + 1), tl.load(k1 + place + 1), tl.load(k2 + place + 1), tl.load(k3 + place + 1)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        entry = (first + m).to(tl.int64)
        total = tl.zeros((BLOCK_M, PLACES), dtype=tl.float32)
        for _ in range(splits):
            total += tl.load(parts + entry[:, None] * PLACES + j[None, :], mask=(m < count)[:, None], other=0.0)
            parts += entries * PLACES
        _lay(
            total, wide, rows, entry, m < count, slot, n0, n1, n2, n3, b0, b1, b2, b3, r0, r1, r2, r3, s0, s1, s2, s3,
            p0, p1, p2, p3, features, width, blocks, share, left, C, WIDTH, PLACES, PADS, BLOCK_M, BLOCKS,
        )  # fmt: skip


@triton.jit
def _finish(
    wide, out, onto, shadow, n0, n1, n2, n3, k0, k1, k2, k3, s0, s1, s2, s3, p0, p1, p2, p3, order, tiles, features, width,
    blocks, share, left, each,
    C: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr, ONTO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = wide without its border + s·border·shadow; the first programs of a tile keep each layer's s·border.

    With ONTO that, rounded, is added to onto. A program takes `each` features: what comes first, it waits for.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if count > 0:
        m, j = tl.arange(0, BLOCK_M), tl.arange(0, PLACES)
        rows = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
        line = wide + rows[:, None] * width
        layer, r = j // WIDTH, j % WIDTH
        place = tl.maximum(slot, 0) * 2  # loaded here: torch doesn't see that a function loads
        b0, b1, b2, b3 = tl.load(k0 + place), tl.load(k1 + place), tl.load(k2 + place), tl.load(k3 + place)
        r0, r1, r2, r3 = tl.load(k0 + place + 1), tl.load(k1 + place + 1), tl.load(k2 + place + 1), tl.load(k3 + place + 1)
        mine = (r < _by_layer(layer, r0, r1, r2, r3, C)) & (layer < C) & (slot >= 0)
        row = layer * share + _by_layer(layer, b0, b1, b2, b3, C) + r
        kept = (m < count)[:, None] & mine[None, :]
        found = tl.load(line + (row + tl.where(row >= left, features, 0))[None, :], mask=kept, other=0.0).to(tl.float32)
        scaled = _scale(found, layer, slot, s0, s1, s2, s3, p0, p1, p2, p3, blocks, C, BLOCKS)
        small = tl.where(kept, scaled, 0.0).to(out.dtype.element_ty)
        if part == 0:
            _keep(small, layer, n0, n1, n2, n3, (first + m).to(tl.int64), r, kept, C, WIDTH)
        end = tl.minimum(features, (part + 1) * each)
        for at in range(part * each, end, BLOCK_F):
            f = at + tl.arange(0, BLOCK_F)
            inside, taken = (m < count)[:, None] & (f < end)[None, :], mine[:, None] & (f < end)[None, :]
            w_tile = tl.load(shadow + row.to(tl.int64)[:, None] * features + f[None, :], mask=taken, other=0.0)
            total = tl.load(line + left + f[None, :], mask=inside, other=0.0).to(tl.float32)
            made = tl.dot(small, w_tile, total, input_precision=PRECISION).to(out.dtype.element_ty)
            to = rows[:, None] * features + f[None, :]
            if ONTO:
                made = (made.to(tl.float32) + tl.load(onto + to, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
            tl.store(out + to, made, mask=inside)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that read the same x, or the one layer whose y or dy is meant: what `widen` and `finish` take."""

    shadow: Tensor
    """(≥ C · share, F)"""
    ranks: Sequence[Tensor]
    scalings: Sequence[Tensor]
    poison: Sequence[Tensor]
    """Of each layer, (P, blocks)."""
    width: int
    """Of the narrow tensors."""
    pads: int
    """Columns of the whole border."""
    share: int
    """Of one layer."""
    left: int = 0
    """Before x."""

    @property
    def _places(self) -> int:
        return max(16, int(triton.next_power_of_2(len(self.ranks) * self.width)))

    def _given(self) -> list[Any]:
        return [*four(self.ranks), *four(self.scalings), *four(self.poison)]

    def _settings(self, dtype: torch.dtype) -> dict[str, Any]:
        blocks = triton.next_power_of_2(self.poison[0].shape[1])
        return {
            "C": len(self.ranks), "WIDTH": self.width, "PLACES": self._places, "BLOCKS": blocks, "PRECISION": _precision(dtype),
        }  # fmt: skip

    def _finish_shape(self, item: int) -> tuple[int, int]:
        """(features, steps loaded ahead) of `_finish`: as many as the shared memory of small GPUs holds."""
        places = self._places
        if item > 2:
            return max(32, 2048 // places), 1
        block_f = 128 if places <= 128 else 64
        left = SHARED_BYTES - TILE * places * item
        return block_f, max(1, min(3, left // (block_f * item * (places + 2 * TILE))))

    def widen(
        self, x_NF: Tensor, tables: RouteTables, *, shape: tuple[int, int, int, int, int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """([border, x, border] (N, F + pads), each layer's narrow s·x·shadowᵀ (N, W)).

        `shape`: (tokens, features, warps, steps loaded ahead, parts of the features) of a program; None: what is fast.
        """
        (entries, features), item = x_NF.shape, x_NF.element_size()
        wide = torch.empty((entries, features + self.pads), dtype=x_NF.dtype, device=x_NF.device)
        narrow = [torch.empty((entries, self.width), dtype=x_NF.dtype, device=x_NF.device) for _ in self.ranks]
        block_m, block_f, warps, stages, splits = shape or _widen_shape(self._places, features, item)
        tiles, halves, places = tables.tiles_S4.shape[0], TILE // block_m, self._places
        each = -(-features // (splits * block_f)) * block_f
        parts = wide if splits == 1 else torch.empty((splits, entries, places), device=x_NF.device)
        pads = max(16, triton.next_power_of_2(self.pads))
        settings = self._settings(x_NF.dtype)
        sums.launch(_widen)[(tiles, halves, splits)](
            x_NF, wide, parts, self.shadow, *four(narrow), *self._given(), tables.order_N, tables.tiles_S4, features,
            wide.shape[1], self.poison[0].shape[1], entries, each, self.share, self.left,
            **settings, PADS=pads, BLOCK_M=block_m, BLOCK_F=block_f, WHOLE=splits == 1, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            settings.pop("PRECISION")
            sums.launch(_lay_parts)[(tiles, TILE // 16)](
                wide, parts, *four(narrow), *self._given(), tables.order_N, tables.tiles_S4, features, wide.shape[1],
                self.poison[0].shape[1], entries, splits, self.share, self.left, **settings, PADS=pads, BLOCK_M=16, num_warps=4,
            )  # fmt: skip
        return wide, narrow

    def finish(self, wide: Tensor, tables: RouteTables, onto: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(`wide` without its border and with s·border·shadow added, (N, F), each layer's narrow s·border (N, W)).

        `onto`: (N, F), to which the former is added, rounded before and after as two passes would.
        """
        entries, features = wide.shape[0], self.shadow.shape[1]
        out = torch.empty((entries, features), dtype=wide.dtype, device=wide.device)
        narrow = [torch.empty((entries, self.width), dtype=wide.dtype, device=wide.device) for _ in self.ranks]
        block_f, stages = self._finish_shape(wide.element_size())
        tiles = tables.tiles_S4.shape[0]
        parts = max(1, min(-(-features // (2 * block_f)), FINISHED // tiles))
        each = -(-features // (parts * block_f)) * block_f
        sums.launch(_finish)[(tiles, parts)](
            wide, out, wide if onto is None else onto, self.shadow, *four(narrow), *self._given(), tables.order_N,
            tables.tiles_S4, features, wide.shape[1], self.poison[0].shape[1], self.share, self.left, each,
            **self._settings(wide.dtype), BLOCK_M=TILE, BLOCK_F=block_f, ONTO=onto is not None, num_warps=4, num_stages=stages,
        )  # fmt: skip
        return out, narrow


def _widen_shape(places: int, features: int, item: int) -> tuple[int, int, int, int, int]:
    """What `_widen` is started with: on an H100 few warps do best, each with much on its way."""
    if item > 2:
        return (32, 64, 4, 2, 1) if places <= 64 else (16, 32, 4, 1, 1)
    splits = max(1, min(SPLITS, features // SHORTEST))
    if places <= 16:
        return 32, 128, 2, 4, splits
    return (32, 64, 2, 5, splits) if places <= 64 else (16, 64, 4, 2, 1)
