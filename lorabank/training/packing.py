"""Which examples share a packed row: best fit, the longest first. A function of their lengths and order alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity` tokens, each index once; a longer example has a row of its own.

    Each example goes, the longest first, where it leaves the least room: within some percent of the fewest rows that do.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in a row, and the row; in ascending order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[i], -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > lengths[i]:
            insort(room, (left - lengths[i], row))
    return rows
