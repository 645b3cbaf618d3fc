"""The longest single row whose whole training step fits the card: the item `longest` of gpu_training.py."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_model import GIB, Bases, Training, Work, at_most, peak_gib

from lorabank.errors import TooLargeError

LONGEST_GRANULE = 1024
CARD_GIB = 78.0
"""What tensors can have of an 80 GB card: 79.2 GiB, less what the driver and cuBLAS take. A larger card is held to it."""


def measure_longest(bases: Bases, args: argparse.Namespace) -> dict[str, Any]:
    """Longest single row whose whole training step fits a card of 80 GB, with recomputation."""
    with at_most(CARD_GIB):
        return _measure(bases, args)


def _measure(bases: Bases, args: argparse.Namespace) -> dict[str, Any]:
    training = Training(bases.get(), Work(rows=1, tokens=2048, recompute=True), graphs=False)
    tried: dict[int, float | None] = {}
    began = time.perf_counter()

    def fits(length: int) -> bool:
        tried[length] = _peak_of_step(training, length)
        print(f"  longest: {length} tokens {'do not fit' if tried[length] is None else f'take {tried[length]} GiB'}", flush=True)
        return tried[length] is not None

    def in_time() -> bool:
        return time.perf_counter() - began < args.longest_seconds

    for length in (2048, 4096, 8192):  # the first compiles and makes the optimizer's state
        fits(length)
    small, large = tried[4096], tried[8192]
    if small is None or large is None:
        raise RuntimeError("8,192 tokens don't fit, so there is nothing to search")
    limit = min(CARD_GIB, (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB)
    guess = guess_longest(small, large, limit)
    longest, refused = bisect_longest(fits, 8192, guess, tries=args.longest_tries, in_time=in_time)
    training.close()
    return {
        "layers": bases.shape.layers, "rows": 1, "tokens": longest, "shortest_refused": refused, "peak_gib": tried[longest],
        "limit_gib": round(limit, 2), "tried": {str(length): peak for length, peak in tried.items()},
    }  # fmt: skip


def _peak_of_step(training: Training, length: int) -> float | None:
    """GiB at the most in a step over one row, None where that is more than there is."""
    training.use(1, length)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        training.step()
        torch.cuda.synchronize()
    except TooLargeError:
        peak = None
    else:
        peak = peak_gib()
    training.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def guess_longest(small_gib: float, large_gib: float, limit_gib: float) -> int:
    """Tokens that fill 92 % of what memory is left, which grows evenly from 4,096 to 8,192 tokens: 97 % was refused."""
    each = max((large_gib - small_gib) / 4096, 1e-9)
    tokens = int(8192 + max(0.0, limit_gib - large_gib) * 0.92 / each)
    return max(8192 + LONGEST_GRANULE, tokens // LONGEST_GRANULE * LONGEST_GRANULE)


def bisect_longest(
    fits: Callable[[int], bool], low: int, guess: int, *, tries: int, in_time: Callable[[], bool] = lambda: True
) -> tuple[int, int | None]:
    """(longest that fits, shortest that was refused), in LONGEST_GRANULE. `low` fits. Short steps until it is fenced in."""
    high: int | None = None
    length, down = guess, 0.03
    for _ in range(tries):
        if not in_time():
            break
        if fits(length):
            low = length
        else:
            high, down = length, 2 * down
        if high is None:
            length = _rounded(low * 1.04, low)
        elif high - low <= LONGEST_GRANULE:
            break
        else:
            length = min(_rounded(max((low + high) / 2, high * (1 - down)), low), high - LONGEST_GRANULE)
    return low, high


def _rounded(length: float, above: int) -> int:
    return max(above + LONGEST_GRANULE, int(length) // LONGEST_GRANULE * LONGEST_GRANULE)
