"""LoRA dropout in the kernels: a mask is never kept, it is drawn again wherever a product reads x or writes dx.

The definition is `segments.dropout_mask`, of which these are the hash's 32-bit operations one by one: the same numbers are
dropped on every device. What is divided by the keep probability is the slot's scaling, once for forward and backward.
Shapes as in lora.py. A kernel finds what it draws from in int32 tables, whose bits are unsigned numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

Drops = Sequence[Tensor]
"""[steps_P, draws_N2 (see `DropTables`), then each layer's odds_P2 (see `LayerTables`)]. Empty: nothing is dropped."""


CHECKED = tl.constexpr(False)
"""Numbers wrap around at 2³², which a debugging Triton would otherwise report."""


@triton.jit
def _mixed(h):
    """segments._mix32 of uint32."""
    h = tl.mul(h ^ (h >> 16), 0x7FEB352D, CHECKED)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, CHECKED)
    return h ^ (h >> 16)


@triton.jit
def _unsigned(pointer, inside):
    return tl.load(pointer, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _row_keys(odds, steps, draws, slot, entry, inside, DROP: tl.constexpr):
    """Hash of slot, layer, step, example and place for each of some entries."""
    keys = slot
    if DROP:
        seed, step = _unsigned(odds + slot * 2, slot >= 0), _unsigned(steps + slot, slot >= 0)
        start = tl.add(tl.mul(seed, 0x9E3779B1, CHECKED), tl.mul(step, 0x85EBCA77, CHECKED), CHECKED)
        example, place = _unsigned(draws + entry * 2, inside), _unsigned(draws + entry * 2 + 1, inside)
        keys = _mixed(_mixed(tl.add(start, 1, CHECKED)) ^ example)
        keys = _mixed(keys ^ _mixed(tl.add(place, 0x27D4EB2F, CHECKED)))
    return keys


@triton.jit
def _bar(odds, slot, DROP: tl.constexpr):
    """What an element's hash must reach to be kept: the slot's `segments.drop_threshold`."""
    bar = slot
    if DROP:
        bar = _unsigned(odds + slot * 2 + 1, slot >= 0)
    return bar


@triton.jit
def _column_keys(f, DROP: tl.constexpr):
    """Hash of each channel: one for all layers, slots and tokens."""
    columns = f
    if DROP:
        columns = _mixed(tl.add(f.to(tl.uint32), 0x165667B1, CHECKED))
    return columns


@triton.jit
def _kept(tile, otherwise, rows, columns, bar, DROP: tl.constexpr):
    """The tile's elements that dropout keeps, `otherwise` in the place of the others."""
    if DROP:
        tile = tl.where(_mixed(rows[:, None] ^ columns[None, :]) >= bar, tile, otherwise)
    return tile


def pointers(drops: Drops, count: int, anything: Tensor) -> list[Tensor]:
    """Each of `count` layers' odds, steps and draws as a kernel takes them; `anything` where there are none to read."""
    if not drops:
        return [anything] * (count + 2)
    steps, draws, *odds = drops
    return [*odds, *[odds[-1]] * (count - len(odds)), steps, draws]
