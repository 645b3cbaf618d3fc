"""AdamW for all leaves of all stepped slots on a GPU: three launches and two small copies, and nothing waits.

`_squares` sums each block's squared gradients, `_outcome` decides a slot's norm, clipping and step count on the device, `_adamw`
updates parameters and moments in one pass. Leaves lie anywhere, so blocks find them through a table of addresses. Sums are in a
fixed order and a slot's own, so a slot gets the same bits whatever is stepped beside it. Plain twin: lorabank/optim/plain.py.
Memory traffic is what a step takes its time for: 32 bytes a number, of which a gradient's second look is 4.
Shapes: L leaves, N blocks of up to BLOCK numbers of one leaf, S slots.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Numbers that a program works on."""
SQUARES_WARPS, ADAMW_WARPS = 8, 16
"""Of a program. At four numbers a thread `_adamw` needs 60 registers, so that two programs share a multiprocessor and one's loads
hide the other's look into the tables; at sixteen it needs 232."""
SUM_BLOCK = 1024
"""Sums that `_outcome` adds at once."""
LEAF_FIELDS = tl.constexpr(5)
"""Of a leaf's row: addresses of parameter, first and second moment; how many numbers; slot · 2 + whether it is a B."""
SLOT_FIELDS = tl.constexpr(3)
"""Of a slot's row: first block, last block + 1, address of its step count."""
NUMBERS = tl.constexpr(8)
"""Of a slot in a step, see `SlotNumbers`. Even, so that the gradients' addresses behind them stay aligned to 16 bytes."""
SCALES = tl.constexpr(12)
"""What `_outcome` hands to `_adamw` for a slot, see there."""
FP32 = tl.constexpr(tl.pointer_type(tl.float32))
RESULTS = tl.constexpr(3)
"""Norm, whether it is finite, step count."""


@triton.jit
def _sum_of_squares(gradient, there, at, count, BLOCK: tl.constexpr):
    # in fp64, where no square of an fp32 number overflows: what isn't finite then is the gradient
    n = at + tl.arange(0, BLOCK)
    g = tl.load(gradient + n, mask=(n < count) & there, other=0.0).to(tl.float64)
    return tl.sum(g * g, 0)


@triton.jit
def _squares(blocks_N2, leaves_L5, gradients_L, sums_N, BLOCK: tl.constexpr):  # pragma: no cover
    """sums[block] = Σ gradient². Address 0 stands for a gradient of zeros."""
    block = tl.program_id(0).to(tl.int64)
    leaf, at = tl.load(blocks_N2 + block * 2).to(tl.int64), tl.load(blocks_N2 + block * 2 + 1).to(tl.int64) * BLOCK
    row = leaves_L5 + leaf * LEAF_FIELDS
    address, count = tl.load(gradients_L + leaf), tl.load(row + 3)
    # hints sit on the operation that makes a value, so each branch makes its own pointer; count // 4 · 4 tells the same of count
    if ((address | (count * 4)) & 15) == 0:
        aligned = tl.multiple_of(address.to(FP32), 16)
        total = _sum_of_squares(aligned, address != 0, at, count // 4 * 4, BLOCK)
    else:
        total = _sum_of_squares(address.to(FP32), address != 0, at, count, BLOCK)
    tl.store(sums_N + block, total)


@triton.jit
def _power(beta, step):
    # 0 has no logarithm: a number as small gives 0 as well
    return tl.exp(step.to(tl.float64) * tl.log(tl.maximum(beta, 1e-300)))


@triton.jit
def _outcome(slots_S3, sums_N, numbers_S8, scales_S12, results_S3, BLOCK: tl.constexpr):  # pragma: no cover
    """One slot a program: norm, clipping, step count and the numbers that its leaves are updated with, all in fp64."""
    slot = tl.program_id(0)
    start, stop = tl.load(slots_S3 + slot * SLOT_FIELDS), tl.load(slots_S3 + slot * SLOT_FIELDS + 1)
    count = tl.load(slots_S3 + slot * SLOT_FIELDS + 2).to(tl.pointer_type(tl.int64))
    before = tl.load(count)  # ahead of the sum, which makes every thread wait: nobody reads it once it is written
    lanes = tl.zeros((BLOCK,), dtype=tl.float64)
    for at in range(start, stop, BLOCK):
        n = at + tl.arange(0, BLOCK)
        lanes += tl.load(sums_N + n, mask=n < stop, other=0.0)

    mine = numbers_S8 + slot * NUMBERS
    rate, ratio, weight_decay, eps = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2), tl.load(mine + 5)
    beta1, beta2, tokens, limit = tl.load(mine + 3), tl.load(mine + 4), tl.load(mine + 6), tl.load(mine + 7)
    norm = tl.sqrt(tl.sum(lanes, 0)) / tokens
    finite = norm < float("inf")  # not so for NaN
    clip = tl.where(limit > 0.0, tl.minimum(1.0, limit / (norm + 1e-6)), 1.0)
    step = before + finite.to(tl.int64)
    tl.store(count, step)
    tl.store(results_S3 + slot * RESULTS, norm)
    tl.store(results_S3 + slot * RESULTS + 1, finite.to(tl.float64))
    tl.store(results_S3 + slot * RESULTS + 2, step.to(tl.float64))

    out = scales_S12 + slot * SCALES
    tl.store(out, finite.to(tl.float32))
    if finite:
        bias1, bias2 = 1.0 - _power(beta1, step), 1.0 - _power(beta2, step)
        tl.store(out + 1, (clip / tokens).to(tl.float32))
        tl.store(out + 2, (1.0 - beta1).to(tl.float32))
        tl.store(out + 3, beta2.to(tl.float32))
        tl.store(out + 4, (1.0 - beta2).to(tl.float32))
        tl.store(out + 5, tl.sqrt(bias2).to(tl.float32))
        tl.store(out + 6, eps.to(tl.float32))
        # of an A, then of a B: what is left after decay, and the step size
        tl.store(out + 8, (1.0 - rate * weight_decay).to(tl.float32))
        tl.store(out + 9, (1.0 - rate * ratio * weight_decay).to(tl.float32))
        tl.store(out + 10, (rate / bias1).to(tl.float32))
        tl.store(out + 11, (rate * ratio / bias1).to(tl.float32))


@triton.jit
def _update(p, first, second, gradient, there, at, count, mine, role, BLOCK: tl.constexpr):
    n = at + tl.arange(0, BLOCK)
    inside = n < count
    g = tl.load(gradient + n, mask=inside & there, other=0.0) * tl.load(mine + 1)
    m = tl.load(first + n, mask=inside, other=0.0)
    v = tl.load(second + n, mask=inside, other=0.0)
    w = tl.load(p + n, mask=inside, other=0.0)
    m += (g - m) * tl.load(mine + 2)
    v = v * tl.load(mine + 3) + g * g * tl.load(mine + 4)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(mine + 5)) + tl.load(mine + 6)
    w = w * tl.load(mine + 8 + role) - tl.div_rn(m, denominator) * tl.load(mine + 10 + role)
    tl.store(first + n, m, mask=inside)
    tl.store(second + n, v, mask=inside)
    tl.store(p + n, w, mask=inside)


@triton.jit
def _adamw(blocks_N2, leaves_L5, gradients_L, scales_S12, BLOCK: tl.constexpr):  # pragma: no cover
    """One step of a block, unless its slot's gradient isn't finite: then nothing of it is written."""
    block = tl.program_id(0).to(tl.int64)
    leaf, at = tl.load(blocks_N2 + block * 2).to(tl.int64), tl.load(blocks_N2 + block * 2 + 1).to(tl.int64) * BLOCK
    row = leaves_L5 + leaf * LEAF_FIELDS
    place = tl.load(row + 4)
    mine, role = scales_S12 + place // 2 * SCALES, place % 2
    if tl.load(mine) == 0.0:
        return
    p, first, second, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    g = tl.load(gradients_L + leaf)
    if ((p | first | second | g | (count * 4)) & 15) == 0:
        _update(
            tl.multiple_of(p.to(FP32), 16), tl.multiple_of(first.to(FP32), 16), tl.multiple_of(second.to(FP32), 16),
            tl.multiple_of(g.to(FP32), 16), g != 0, at, count // 4 * 4, mine, role, BLOCK,
        )  # fmt: skip
    else:
        _update(p.to(FP32), first.to(FP32), second.to(FP32), g.to(FP32), g != 0, at, count, mine, role, BLOCK)


def _start(kernel: Any, programs: int, *arguments: Any, **options: int) -> None:
    kernel[(programs,)](*arguments, **options)


@dataclass(frozen=True, kw_only=True)
class SlotPlaces:
    """Where a slot's fp32 numbers lie: addresses in bytes, of a multiple of 4."""

    leaves: Sequence[int]
    sizes: Sequence[int]
    """Numbers in each leaf."""
    is_b: Sequence[bool]
    """Of each leaf, whether LoRA+'s ratio is for it."""
    first: int
    """One vector over all leaves, in their order."""
    second: int
    """Likewise."""
    step: int
    """The step count, one int64."""


@dataclass(frozen=True)
class SlotNumbers:
    """A slot's settings in one step, in the order in which `_outcome` reads them."""

    learning_rate: float
    loraplus_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    tokens: float
    max_grad_norm: float


_NUMBERS_OF = operator.attrgetter(*(field.name for field in fields(SlotNumbers)))
"""As `astuple`, which copies each number as if it were a structure."""


class StepResults:
    """What a step did, on its way from the device."""

    def __init__(self, values_S3: Tensor, ready: torch.cuda.Event | None) -> None:
        self._values_S3, self._ready = values_S3, ready
        self._read: list[tuple[float, bool, int]] | None = None

    def of(self, slot: int) -> tuple[float, bool, int]:
        """(norm of the mean gradient, whether it is finite, steps so far) of a slot. Waits for the device the first time."""
        if self._read is None:
            if self._ready is not None:
                self._ready.synchronize()
            self._read = [(norm, bool(finite), int(step)) for norm, finite, step in self._values_S3.tolist()]
        return self._read[slot]


class AdamWTable:
    """The kernels over a set of slots, as long as none of their leaves, moments and step counts moves."""

    def __init__(self, slots: Sequence[SlotPlaces], device: torch.device) -> None:
        self.device = device
        rows, places, blocks, leaves, last = [], [], [], 0, 0
        for i, slot in enumerate(slots):
            addresses, sizes, is_b = (np.array(x, dtype=np.int64) for x in (slot.leaves, slot.sizes, slot.is_b))
            offsets = 4 * (np.cumsum(sizes) - sizes)
            rows.append(np.stack([addresses, slot.first + offsets, slot.second + offsets, sizes, 2 * i + is_b], 1))
            counts = -(-sizes // BLOCK)
            leaf = np.repeat(np.arange(len(sizes)), counts)
            begins = np.cumsum(counts) - counts
            blocks.append(np.stack([leaves + leaf, np.arange(len(leaf)) - begins[leaf]], 1).astype(np.int32))
            places.append([last, last + len(leaf), slot.step])
            leaves, last = leaves + len(sizes), last + len(leaf)
        self._leaves, self._blocks = leaves, last
        self._rows_L5, self._blocks_N2 = self._sent(np.concatenate(rows)), self._sent(np.concatenate(blocks))
        self._slots_S3 = self._sent(np.array(places, dtype=np.int64))
        self._sums_N = torch.empty(last, dtype=torch.float64, device=device)
        self._scales_S12 = torch.empty(len(slots), SCALES.value, device=device)
        self._results_S3 = torch.empty(len(slots), RESULTS.value, dtype=torch.float64, device=device)

    def step(self, gradients: Sequence[int], numbers: Sequence[SlotNumbers]) -> StepResults:
        """One step in place. `gradients`: address of each leaf's, 0 for none, over the slots in order; contiguous fp32.

        They must live until this returns: from then on the order of the stream keeps them safe.
        """
        held = len(numbers) * NUMBERS.value
        moving = np.empty(held + self._leaves, dtype=np.int64)
        moving[:held].view(np.float64)[:] = list(itertools.chain.from_iterable(map(_NUMBERS_OF, numbers)))
        moving[held:] = gradients
        sent = self._sent(moving)
        numbers_S8 = sent[:held].view(torch.float64)
        blocks, shared = self._blocks, (self._blocks_N2, self._rows_L5, sent[held:])
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            _start(_squares, blocks, *shared, self._sums_N, BLOCK, num_warps=SQUARES_WARPS)
            _start(
                _outcome, len(numbers), self._slots_S3, self._sums_N, numbers_S8, self._scales_S12, self._results_S3, SUM_BLOCK
            )
            _start(_adamw, blocks, *shared, self._scales_S12, BLOCK, num_warps=ADAMW_WARPS)
            return self._fetched()

    def _fetched(self) -> StepResults:
        if self.device.type != "cuda":
            return StepResults(self._results_S3.clone(), None)
        values_S3 = torch.empty(self._results_S3.shape, dtype=torch.float64, pin_memory=True)
        values_S3.copy_(self._results_S3, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return StepResults(values_S3, ready)

    def _sent(self, values: np.ndarray) -> Tensor:
        """A copy on the device that nothing waits for. torch doesn't hand pinned memory out again before copies from it ended."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
