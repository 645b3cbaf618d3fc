"""Layers' calls as kernels see them, for gpu_kernels.py and gpu_tune.py: problems, what is expected of them, a clock."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine with the GPU may have the folder only

import torch
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels import reference
from lorabank.kernels.gpu import lora, outer_each, sums
from lorabank.kernels.segments import Segment
from lorabank.kernels.tables import RouteTables, route_tables

TOKENS = 4096
SCALING = 2.0
MIXED_RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
"""Mean 26, so that one adapter of the same mean rank exists."""
MANY = 64
"""Adapters of these ranks in one batch."""
TOLERANCE = 1e-2
"""Relative norm: x·Aᵀ·Bᵀ is rounded to bf16 four times on its way (A, the narrow product, B, the result), by 2⁻⁹ at most each."""
FLUSH_NUMBERS = 2**26
BUSY_CYCLES = 4_000_000
"""About 2 ms of a GPU, longer than the host needs to start any of these."""


class Clock:
    """Microseconds with a cold L2 cache."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._flush = torch.empty(FLUSH_NUMBERS, device="cuda")
        self._alone = self._median(lambda: None)

    def _median(self, work: Callable[[], Any]) -> float:
        times: list[float] = []
        for i in range(self.repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            self._flush.zero_()
            work()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def us(self, work: Callable[[], Any]) -> float:
        """What `work` takes on the GPU."""
        return max(self._median(work) - self._alone, 1e-3)

    def copy_us(self, moved: int) -> float:
        """A copy that reads and writes `moved` bytes together."""
        source = torch.empty(moved // 4, device="cuda", dtype=torch.int16)
        target = torch.empty_like(source)
        return self.us(lambda: target.copy_(source))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer's call: adapters share the tokens evenly."""

    inputs: int
    outputs: int
    each: tuple[int, ...]
    """Every adapter's rank."""
    x: Tensor
    dy: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    scaling: Tensor
    tables: RouteTables

    @classmethod
    def make(cls, inputs: int, outputs: int, each: Sequence[int], device: torch.device, tokens: int = TOKENS) -> Problem:
        """Random x, dy, A and B; `each`: every adapter's rank."""
        torch.manual_seed(inputs + outputs + sum(each))
        slots = len(each)
        units = max(2, slots)
        share = units // slots
        rows = {slot: range(slot * share, (slot + 1) * share) for slot in range(slots)}
        bf16 = {"device": device, "dtype": torch.bfloat16}
        places = [[sum(each[:slot]), rank] for slot, rank in enumerate(each)]
        return cls(
            inputs=inputs, outputs=outputs, each=tuple(each),
            x=torch.randn(tokens, inputs, **bf16), dy=torch.randn(tokens, outputs, **bf16),
            A=torch.randn(sum(each), inputs, device=device) / inputs**0.5, B=torch.randn(sum(each), outputs, device=device),
            ranks=torch.tensor(places, dtype=torch.int32, device=device),
            scaling=torch.full((slots,), SCALING, device=device),
            tables=route_tables(rows, units, tokens // units, slots).to(device),
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """Adapters."""
        return len(self.each)

    @property
    def width(self) -> int:
        """Of the narrow tensors."""
        return table_width(max(self.each))

    @property
    def narrow_bytes(self) -> int:
        """Of a narrow tensor's numbers that belong to a rank."""
        return 2 * len(self.x) * sum(self.each) // self.slots

    @property
    def rank_text(self) -> int | str:
        """The rank, or from where to where they go."""
        low, high = min(self.each), max(self.each)
        return low if low == high else f"{low} to {high}"

    @property
    def slots_text(self) -> str:
        """What a shape's name has behind it."""
        return f", {self.slots} slots" if self.slots > 1 else ""

    def written(self, narrow: Tensor) -> Tensor:
        """With zeros where a slot lacks a rank: there it stays unwritten."""
        own = torch.tensor(self.each, device=narrow.device).repeat_interleave(len(narrow) // self.slots)
        return narrow.where(torch.arange(narrow.shape[1], device=narrow.device) < own[:, None], 0)

    def products(self) -> dict[str, Tensor]:
        """Change of y, of dx, and the gradients of A and B, by the kernels."""
        xa = lora.shrink(self.x, self.A, self.tables, self.ranks, self.scaling, self.width)
        (dB,), (dxa,) = lora.outer_and_shrink([xa], [self.dy], [self.B], self.tables, [self.ranks], [self.scaling])
        added = torch.zeros_like(self.dy)
        lora.expand_(added, xa, self.B, self.tables, self.ranks)
        return {
            "shrink, change": lora.change(xa, self.B, None, self.tables, self.ranks),
            "expand_": added,
            "outer_and_shrink, change": lora.change(dxa, self.A, None, self.tables, self.ranks),
            "outer": lora.outer(dxa, self.x, self.A, self.tables, self.ranks),
            "outer_and_shrink": dB,
        }

    def expected(self) -> dict[str, Tensor]:
        """The same by reference.py and autograd, in fp32."""
        x, A, B = (value.detach().float().requires_grad_() for value in (self.x, self.A, self.B))
        share = len(x) // self.slots
        y = torch.cat([self._delta(x, A, B, slot, share) for slot in range(self.slots)])
        y.backward(self.dy.float())
        assert x.grad is not None and A.grad is not None and B.grad is not None
        found = {"shrink, change": y.detach(), "expand_": y.detach(), "outer_and_shrink, change": x.grad}
        return found | {"outer": A.grad, "outer_and_shrink": B.grad}

    def _delta(self, x: Tensor, A: Tensor, B: Tensor, slot: int, share: int) -> Tensor:
        start = sum(self.each[:slot])
        mine = slice(start, start + self.each[slot])
        segment = Segment(rows=slice(0, 1), A_RI=A[mine], B_RO=B[mine], scaling=SCALING)
        return reference.lora_delta(x[slot * share : (slot + 1) * share][None], segment)[0]


@dataclass(frozen=True, kw_only=True)
class Several:
    """Gradients of B of layers of several sizes, as queries, keys and values have: products, and sums of parts made up."""

    p: Problem
    features: tuple[int, ...]
    narrow: list[Tensor]
    wide: list[Tensor]
    likes: list[Tensor]
    """A layer's B (ΣR, F), for its size."""
    parts: list[Tensor]
    """fp32 (chunks, W, F) of each layer."""
    folded: list[Tensor]
    """What `fold` fills, (ΣR, F): zeros where it has nothing to do."""

    @classmethod
    def make(cls, p: Problem, features: Sequence[int]) -> Several:
        """Random tensors for the tokens and adapters of a problem."""
        device, tokens, chunks = p.x.device, len(p.x), p.tables.chunks_C4.shape[0]
        bf16 = {"device": device, "dtype": torch.bfloat16}
        return cls(
            p=p, features=tuple(features), narrow=[torch.randn(tokens, p.width, **bf16) for _ in features],
            wide=[torch.randn(tokens, size, **bf16) for size in features],
            likes=[torch.empty(sum(p.each), size, device=device) for size in features],
            parts=[torch.randn(chunks, p.width, size, device=device) for size in features],
            folded=[torch.zeros(sum(p.each), size, device=device) for size in features],
        )  # fmt: skip

    @property
    def _lists(self) -> list[Tensor]:
        return [self.p.ranks] * len(self.features)

    @property
    def folds_bytes(self) -> int:
        """Bytes that `fold` reads and writes at least: nothing of a slot with a single chunk."""
        chunks = self.p.tables.spans_P2[:, 1].tolist()
        return sum(4 * sum(self.features) * rank * (n + 1) for rank, n in zip(self.p.each, chunks, strict=True) if n != 1)

    def outer_each(self) -> list[Tensor]:
        """The products, their parts folded."""
        return outer_each.outer_each(self.narrow, self.wide, self.likes, self.p.tables, self._lists)

    def fold(self) -> list[Tensor]:
        """The sums."""
        sums.fold(self.folded, self.parts, self.p.tables, self._lists)
        return self.folded

    def found(self) -> dict[str, Tensor]:
        """Both, all layers' numbers one after the other."""
        return {"outer_each": torch.cat(self.outer_each(), 1), "fold": torch.cat(self.fold(), 1)}

    def expected(self) -> dict[str, Tensor]:
        """The same slot by slot, in fp32."""
        wide, parts = torch.cat(self.wide, 1).float(), torch.cat(self.parts, 2)
        products, added = (torch.zeros(sum(self.p.each), wide.shape[1], device=wide.device) for _ in range(2))
        share = len(wide) // self.p.slots
        for slot, ((start, rank), (first, chunks)) in enumerate(
            zip(self.p.ranks.tolist(), self.p.tables.spans_P2.tolist(), strict=True)
        ):
            tokens, ranks = slice(slot * share, (slot + 1) * share), slice(start, start + rank)
            for narrow, columns in zip(self.narrow, self._columns, strict=True):
                products[ranks, columns] = narrow[tokens, :rank].float().t() @ wide[tokens, columns]
            if chunks != 1:
                added[ranks] = parts[first : first + chunks, :rank].sum(0)
        return {"outer_each": products, "fold": added}

    @property
    def _columns(self) -> list[slice]:
        starts = [sum(self.features[:i]) for i in range(len(self.features))]
        return [slice(start, start + size) for start, size in zip(starts, self.features, strict=True)]


def disagreements(found: dict[str, Tensor], expected: dict[str, Tensor], where: str, allowed: float = TOLERANCE) -> list[str]:
    """What differs by more than rounding explains, relative to its norm."""
    wrong: list[str] = []
    for name, value in expected.items():
        off = float((found[name].float() - value).norm() / value.norm().clamp_min(1e-30))
        if not off <= allowed:  # NaN too
            wrong.append(f"{name} at {where}: off by {off:.2e} of its norm")
    return wrong
