"""Tokens of one slot that follow each other, and what that spares.

Tiles that one program takes together: what it loads of A or B serves all their tokens. With 64 ranks, A or B is four times what
the 32 tokens of a tile are. Tokens that need no table, and narrow tensors that are read without a mask along ranks, are loaded
steps ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

MANY = 64
"""Ranks from which on it pays; with fewer, more programs do."""
TOGETHER = 2
"""Tiles that a program then takes at most: 64 rows are what tensor cores of a whole warp group multiply."""


def many(ranks: int, item: int) -> bool:
    """Whether a program that holds so many ranks turns its products; `item`: bytes of a number of x. fp32 lacks the registers."""
    return item == 2 and ranks >= MANY


def grouped(ranks: int, item: int) -> int:
    """Tiles that one program takes."""
    return TOGETHER if many(ranks, item) else 1


@triton.jit
def _run(tiles, tile, last, GROUP: tl.constexpr):
    """(slot, entries) of a tile and of the next ones in its group of GROUP that have its slot.

    No entries for a tile that another program has with it. `last`: tiles in all. The first entry is for callers to load: torch
    would think that what is stored there goes into the table.
    """
    slot, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 2)
    if GROUP > 1:
        at = tile // GROUP * GROUP + tl.arange(0, GROUP)
        mine = tl.load(tiles + at * 4, mask=at < last, other=-2) == slot
        counts = tl.load(tiles + at * 4 + 2, mask=at < last, other=0)
        before = tl.sum(tl.where(mine & (at < tile), counts, 0), 0)
        count = tl.where(before > 0, 0, tl.sum(tl.where(mine, counts, 0), 0))
    return slot, count


@triton.jit
def _straight(order, first, count):
    """(token of a chunk's first entry, whether the others follow it one by one).

    Entries of a slot are in the order of their tokens: where the last is as far off as there are entries, no table is needed.
    Then loads are started steps ahead, which compilers don't do through a table; hence two loops.
    """
    base = tl.load(order + first)
    return base, tl.load(order + first + count - 1) - base == count - 1


@triton.jit
def _entries(narrow, entry, inside, r, WIDTH: tl.constexpr):
    """Some entries of a narrow tensor, and beyond their slot's ranks whatever lies there: with a mask for that the load would
    wait in every step, which it doesn't started ahead.
    """
    return tl.load(narrow + entry[:, None] * WIDTH + r[None, :], mask=inside[:, None], other=0.0)
