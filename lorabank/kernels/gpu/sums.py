"""Sums of what products left in parts, for up to four layers in one start: a step has hundreds of them, each of microseconds.

C, how many there are, is known to the compiler: what stands in for missing layers must not look as if it were written.

`fold` makes gradients of A and B out of the parts of a slot's chunks, `gather` narrow tensors out of the shares of a product's
splits. Parts are added in a fixed order. Shapes as in lora.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from lorabank.kernels.tables import TILE, RouteTables

MOST = 4
"""Layers in one start."""
SLOTS_AT_ONCE = 8
"""`fold` starts as many programs as so many slots need, shared by all slots: most have one chunk each and nothing to add, and a
program that finds that out still costs its start. With 64 slots of one chunk they would be 10 million a step."""
FOLD_BLOCK = 512
"""Numbers that a program of `fold` adds at once."""
T = TypeVar("T")


@triton.jit
def _gather(
    p0, p1, p2, p3, n0, n1, n2, n3, k0, k1, k2, k3, s0, s1, s2, s3, splits0, splits1, splits2, splits3, tiles, entries,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """narrow = scaling · Σ over the splits of parts, for the layer that the third index names."""
    tile, block, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, narrow, ranks, scaling, splits = p0, n0, k0, s0, splits0
    if C > 1:  # noqa: SIM102  decided by the compiler
        if layer == 1:
            parts, narrow, ranks, scaling, splits = p1, n1, k1, s1, splits1
    if C > 2:  # noqa: SIM102  decided by the compiler
        if layer == 2:
            parts, narrow, ranks, scaling, splits = p2, n2, k2, s2, splits2
    if C > 3:  # noqa: SIM102  decided by the compiler
        if layer == 3:
            parts, narrow, ranks, scaling, splits = p3, n3, k3, s3, splits3
    slot, first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if (count > 0) & (slot >= 0):
        rank = tl.load(ranks + slot * 2 + 1)
        e, s = tl.arange(0, BLOCK_M * BLOCK_R), tl.arange(0, BLOCK_S)
        m, r = e // BLOCK_R, block * BLOCK_R + e % BLOCK_R
        kept = (m < count) & (r < rank)
        total = tl.zeros((BLOCK_M * BLOCK_R,), dtype=tl.float32)
        for at in range(0, splits, BLOCK_S):
            row = (at + s).to(tl.int64)[:, None] * entries + (first + m)[None, :]
            inside = kept[None, :] & (at + s < splits)[:, None]
            total += tl.sum(tl.load(parts + row * WIDTH + r[None, :], mask=inside, other=0.0), 0)
        scaled = (total * tl.load(scaling + slot)).to(narrow.dtype.element_ty)
        tl.store(narrow + (first + m).to(tl.int64) * WIDTH + r, scaled, mask=kept)


@triton.jit
def _fold(
    p0, p1, p2, p3, g0, g1, g2, g3, k0, k1, k2, k3, features0, features1, features2, features3, spans,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = Σ over a slot's chunks of parts, for the layer that the third index names.

    Zero for a slot without tokens; nothing to do for one with a single chunk. Programs of a slot take turns at its blocks.
    """
    slot, block, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, grad, ranks, features = p0, g0, k0, features0
    if C > 1:  # noqa: SIM102  decided by the compiler
        if layer == 1:
            parts, grad, ranks, features = p1, g1, k1, features1
    if C > 2:  # noqa: SIM102  decided by the compiler
        if layer == 2:
            parts, grad, ranks, features = p2, g2, k2, features2
    if C > 3:  # noqa: SIM102  decided by the compiler
        if layer == 3:
            parts, grad, ranks, features = p3, g3, k3, features3
    first, count = tl.load(spans + slot * 2), tl.load(spans + slot * 2 + 1)
    start, rank = tl.load(ranks + slot * 2).to(tl.int64), tl.load(ranks + slot * 2 + 1)
    numbers = rank * features
    if count != 1:
        for begin in range(block * BLOCK, numbers, tl.num_programs(1) * BLOCK):
            e, c = begin + tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for at in range(0, count, BLOCK_C):
                row = (first + at + c).to(tl.int64) * WIDTH * features
                kept = (at + c < count)[:, None] & (e < numbers)[None, :]
                total += tl.sum(tl.load(parts + row[:, None] + e[None, :], mask=kept, other=0.0), 0)
            tl.store(grad + start * features + e, total, mask=e < numbers)


class _Start:
    """A compiled kernel that is started with [grid](...)."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self._run, grid)

    def _run(self, grid: Any, *args: Any, **constants: Any) -> Any:
        # a tensor of a compiler's stands for one: that start is noted. Noting costs the host more than starting, so only then
        plain = all(type(value) in _PLAIN or not isinstance(value, Tensor) for value in args)
        return (self._kernel if plain else wrap_triton(self._kernel))[grid](*args, **constants)


_PLAIN = (Tensor, torch.nn.Parameter)


def launch(kernel: Any) -> Any:
    """What is started with [grid](...): seen by torch.compile where it is a compiled kernel, run as it is by the interpreter."""
    return _Start(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel


def four(values: Sequence[T]) -> list[T]:
    """The values, the last of them again up to four: kernels have a place for each of `MOST` layers."""
    return [*values, *[values[-1]] * (MOST - len(values))]


def gather(
    narrow: Sequence[Tensor], parts: Sequence[Tensor], tables: RouteTables, ranks: Sequence[Tensor], scalings: Sequence[Tensor]
) -> None:
    """Fill each layer's narrow (N, W) from its parts, fp32 (splits, N, W)."""
    _, entries, width = parts[0].shape
    launch(_gather)[(tables.tiles_S4.shape[0], width // 16, len(narrow))](
        *four(parts), *four(narrow), *four(ranks), *four(scalings), *four([part.shape[0] for part in parts]),
        tables.tiles_S4, entries, C=len(narrow), WIDTH=width, BLOCK_M=TILE, BLOCK_R=16, BLOCK_S=8, num_warps=4,
    )  # fmt: skip


class Later:
    """Gradients in parts, folded together when there are no more to come: up to four in one start."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, grads: Sequence[Tensor], parts: Sequence[Tensor], ranks: Sequence[Tensor]) -> None:
        """What `fold` takes."""
        self._waiting += zip(grads, parts, ranks, strict=True)

    def fold(self, tables: RouteTables) -> None:
        """All that wait."""
        for start in range(0, len(self._waiting), MOST):
            grads, parts, ranks = zip(*self._waiting[start : start + MOST], strict=True)
            fold(grads, parts, tables, ranks)
        self._waiting = []


def fold_or_leave(
    grads: Sequence[Tensor], parts: Sequence[Tensor], tables: RouteTables, ranks: Sequence[Tensor], later: Later | None
) -> None:
    """`fold` now, or with others where the caller has some."""
    if later is None:
        fold(grads, parts, tables, ranks)
    else:
        later.add(grads, parts, ranks)


def fold(grads: Sequence[Tensor], parts: Sequence[Tensor], tables: RouteTables, ranks: Sequence[Tensor]) -> None:
    """Fill each layer's gradient (ΣR, F) from its parts, fp32 (`summed`, W, F), where a slot has more chunks than one."""
    width, features = parts[0].shape[1], [part.shape[2] for part in parts]
    slots, blocks = ranks[0].shape[0], -(-width * max(features) // FOLD_BLOCK)
    launch(_fold)[(slots, (SLOTS_AT_ONCE * blocks - 1) // slots + 1, len(grads))](
        *four(parts), *four(grads), *four(ranks), *four(features), tables.spans_P2,
        C=len(grads), WIDTH=width, BLOCK_C=8, BLOCK=FOLD_BLOCK, num_warps=4,
    )  # fmt: skip
