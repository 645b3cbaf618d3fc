"""Random batches of a layer's LoRA products: one runs on the kernels and on the definition.

Shapes as in kernels/gpu/lora.py: N tokens, I and O features, R ranks. A module that imports `poisoned` and `bf16_dots` has them
around all of its tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lorabank.bank.fused import table_width
from lorabank.kernels import reference
from lorabank.kernels.gpu import bordered, bordered_op, gated, gated_mlp, lora, outer_each, products, rounding, siblings
from lorabank.kernels.segments import DropoutDraw, Segment, drop_threshold
from lorabank.kernels.tables import RouteTables, bits32, drop_tables, route_tables

NAN, INF = float("nan"), float("inf")
TOLERANCES = {
    torch.float32: 2e-5,  # the order of sums
    torch.bfloat16: 2e-2
    if torch.cuda.is_available()
    else 4e-2,  # A, B and xAᵀ are rounded to 8 bits; the interpreter cuts them off
    torch.float16: 3e-3,  # to 11 bits
}
"""Of a tensor's largest entry, against fp64."""

FIRST = 2
"""Rows of a capacity buffer before those of the first slot."""


class _Poisoned:
    """torch, except that fresh memory holds NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(*args, **kwargs).fill_(NAN)

    @staticmethod
    def empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty_like(*args, **kwargs).fill_(NAN)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """An element that is read before it was written, or never written, shows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bordered, bordered_op, gated, gated_mlp, lora, outer_each, products, rounding, siblings):
            patch.setattr(module, "torch", _Poisoned())
        yield


@pytest.fixture(autouse=True, scope="module")
def bf16_dots() -> Iterator[None]:
    """The interpreter keeps bf16 as whole numbers and multiplies those: give its products what they stand for."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            dot = InterpreterBuilder.create_dot

            def widened(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
                return dot(self, _widened(a), _widened(b), *rest)

            patch.setattr(InterpreterBuilder, "create_dot", widened)
        yield


def _widened(value: TensorHandle) -> TensorHandle:
    if value.dtype.scalar != tl.bfloat16:
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch and the slots of a layer. `rows`: slot to its units; `spots`: slot to (first row in the buffers, rank)."""

    x_NI: Tensor
    dy_NO: Tensor
    y_NO: Tensor
    """What the frozen product gave."""
    bias_O: Tensor
    A: Tensor
    B: Tensor
    rows: Mapping[int, Sequence[int]]
    spots: Mapping[int, tuple[int, int]]
    units: int
    tokens: int
    slots: int
    dropout: Mapping[int, float]
    """Slot to its chance; empty: a batch that drops nothing."""

    @property
    def width(self) -> int:
        return table_width(max((rank for _, rank in self.spots.values()), default=1))

    @property
    def ranks_P2(self) -> Tensor:
        return torch.tensor([self.spots.get(slot, (0, 0)) for slot in range(self.slots)], dtype=torch.int32).to(self.A.device)

    @property
    def scaling_P(self) -> Tensor:
        scaling = [_scaling(slot) / (1 - self.dropout.get(slot, 0.0)) for slot in range(self.slots)]
        return torch.tensor(scaling).to(self.A.device)

    @property
    def drops(self) -> list[Tensor]:
        """As kernels take them."""
        if not self.dropout:
            return []
        draws = [self.draw(slot) for slot in range(self.slots)]
        odds = torch.tensor([[draw.seed & 0xFFFFFFFF, drop_threshold(draw.probability)] for draw in draws])
        batch = drop_tables(self.tables.order_N, self.tokens, [draw.step for draw in draws], self.examples_U)
        return [*batch.tensors, bits32(odds).to(self.A.device)]

    @property
    def examples_U(self) -> Tensor:
        """Past 32 bits, as `rows.dropout_routing` makes them for models that fold rows and tokens."""
        return (torch.arange(self.units) * 0x9E3779B1 + 0xFFFFFFF0).to(self.A.device)

    def draw(self, slot: int, rows: Sequence[int] = ()) -> DropoutDraw:
        """A slot's, of units in this order. Its numbers wrap around in 32 bits."""
        examples = self.examples_U.cpu()[list(rows)]
        return DropoutDraw(
            probability=self.dropout.get(slot, 0.0),
            seed=(slot + 1) * 0xDEADBEEF77,
            step=0x7FFFFFFE + 3 * slot,
            examples_U=examples,
        )

    @property
    def tables(self) -> RouteTables:
        return route_tables(self.rows, self.units, self.tokens, self.slots).to(self.A.device)

    def leaves(self) -> dict[int, list[Tensor]]:
        """A and B of each slot in fp64 on the CPU, for the definition to differentiate."""
        return {
            slot: [t[first : first + rank].double().cpu().requires_grad_() for t in (self.A, self.B)]
            for slot, (first, rank) in self.spots.items()
        }

    def segments(self, leaves: Mapping[int, Sequence[Tensor]]) -> list[Segment]:
        """The batch as the definition takes it."""
        return [
            Segment(
                rows=torch.tensor(mine, dtype=torch.int64),
                A_RI=leaves[slot][0],
                B_RO=leaves[slot][1],
                scaling=_scaling(slot),
                dropout=self.draw(slot, mine) if self.dropout.get(slot) else None,
            )
            for slot, mine in self.rows.items()
            if slot in leaves
        ]

    def tokens_of(self, slot: int) -> list[int]:
        return [unit * self.tokens + t for unit in self.rows.get(slot, ()) for t in range(self.tokens)]

    @property
    def adapted(self) -> list[int]:
        """Tokens whose slot the layer has."""
        return sorted(token for slot in self.rows if slot in self.spots for token in self.tokens_of(slot))

    @property
    def untouched(self) -> list[int]:
        """The others: those of no slot, and of slots that the layer lacks."""
        mine = {*self.adapted}
        return [token for token in range(self.units * self.tokens) if token not in mine]


def _scaling(slot: int) -> float:
    return 0.5 + 0.25 * (slot % 7)


def make(
    device: torch.device,
    *,
    rows: Mapping[int, Sequence[int]],
    ranks: Mapping[int, int],
    units: int,
    tokens: int = 3,
    inputs: int = 7,
    outputs: int = 5,
    dtype: torch.dtype = torch.float32,
    slots: int | None = None,
    seed: int = 0,
    dropout: Mapping[int, float] | None = None,
    gap: int = 1,
) -> Problem:
    """`ranks`: those of the slots that the layer has. They lie `gap` rows apart in the buffers, and between them is NaN."""
    g = torch.Generator().manual_seed(seed)
    spots, place = {}, FIRST
    for slot in sorted(ranks, reverse=True):
        spots[slot] = (place, ranks[slot])
        place += ranks[slot] + gap
    A, B = torch.full((place + 3, inputs), NAN), torch.full((place + 3, outputs), NAN)
    for first, rank in spots.values():
        A[first : first + rank] = torch.randn(rank, inputs, generator=g) / inputs**0.5
        B[first : first + rank] = torch.randn(rank, outputs, generator=g) / rank**0.5
    n = units * tokens

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    return Problem(
        x_NI=values(n, inputs),
        dy_NO=values(n, outputs),
        y_NO=values(n, outputs),
        bias_O=values(outputs),
        A=A.to(device),
        B=B.to(device),
        rows=rows,
        spots=spots,
        units=units,
        tokens=tokens,
        slots=slots or max([7, *rows, *ranks]) + 1,
        dropout=dropout or {},
    )


def found(p: Problem) -> dict[str, Tensor]:
    """What the kernels make of it: forward and backward of a layer without its frozen product."""
    tables, ranks, scaling, drops = p.tables, p.ranks_P2, p.scaling_P, p.drops
    xa = lora.shrink(p.x_NI, p.A, tables, ranks, scaling, p.width, drops)
    added = p.y_NO.clone()
    lora.expand_(added, xa, p.B, tables, ranks)
    (dB,), (dxa,) = lora.outer_and_shrink([xa], [p.dy_NO], [p.B], tables, [ranks], [scaling])
    dx_added = torch.zeros_like(p.x_NI)
    lora.expand_(dx_added, dxa, p.A, tables, ranks, drops)
    assert dB.dtype == torch.float32
    assert xa.dtype == dxa.dtype == p.x_NI.dtype
    return {
        "change": lora.change(xa, p.B, None, tables, ranks),
        "change and bias": lora.change(xa, p.B, p.bias_O, tables, ranks),
        "added": added,
        "A": lora.outer(dxa, p.x_NI, p.A, tables, ranks, drops),
        "B": dB,
        "B alone": lora.outer(xa, p.dy_NO, p.B, tables, ranks),
        "x": lora.change(dxa, p.A, None, tables, ranks, drops),
        "x added": dx_added,
        "shrunk alone": lora.shrink(p.dy_NO, p.B, tables, ranks, scaling, p.width),
        "shrunk": dxa,
        "xa": xa,
    }


def expected(p: Problem) -> dict[str, Tensor]:
    """The same from reference.py and its autograd, in fp64, on the CPU. Gradients of A and B only where a slot has them."""
    x = p.x_NI.double().cpu().requires_grad_()
    leaves = p.leaves()
    y = reference.add_lora(torch.zeros_like(p.dy_NO, dtype=torch.float64, device="cpu"), x, p.segments(leaves), p.units)
    y = y + 0 * x.sum()  # a gradient of zero where no slot is used
    wanted = [x, *(leaf for pair in leaves.values() for leaf in pair)]
    gradients = torch.autograd.grad(y, wanted, p.dy_NO.double().cpu(), allow_unused=True)
    dx, *rest = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, wanted, strict=True)]
    dA, dB = torch.full(p.A.shape, NAN, dtype=torch.float64), torch.full(p.B.shape, NAN, dtype=torch.float64)
    for i, (first, rank) in enumerate(p.spots.values()):
        dA[first : first + rank], dB[first : first + rank] = rest[2 * i], rest[2 * i + 1]
    y = y.detach()
    return {
        "change": y,
        "change and bias": y + p.bias_O.double().cpu(),
        "added": y + p.y_NO.double().cpu(),
        "A": dA,
        "B": dB,
        "B alone": dB,
        "x": dx,
        "x added": dx,
    }


def close(name: str, found: Tensor, right: Tensor, tolerance: float) -> None:
    """Hold a tensor to the definition's, by the largest entry of that. What was never written is NaN."""
    assert found.shape == right.shape
    assert found.isfinite().all(), f"{name}: not written everywhere, or not finite"
    allowed = tolerance * max(float(right.abs().max()) if right.numel() else 0.0, 1e-3)
    assert not found.numel() or float((found - right).abs().max()) <= allowed, name


def check(p: Problem) -> dict[str, Tensor]:
    """Hold the kernels to the definition. Returns what they made."""
    mine, theirs = found(p), expected(p)
    for name, right in theirs.items():
        got = mine[name].double().cpu()
        if name in ("A", "B", "B alone"):  # rows of no slot are nobody's
            kept = ~right.isnan().all(1)
            got, right = got[kept], right[kept]
        close(name, got, right, TOLERANCES[p.x_NI.dtype])
    untouched = p.untouched
    assert torch.equal(mine["added"][untouched], p.y_NO[untouched])  # bit for bit
    for name in ("change", "x", "x added"):
        assert mine[name][untouched].eq(0).all(), name
    assert torch.equal(mine["change and bias"][untouched], p.bias_O.expand(len(untouched), -1))
    return mine


MIXED: dict[str, dict[str, Any]] = {
    "one segment": {"rows": {0: [0, 1, 2]}, "ranks": {0: 4}, "units": 3},
    "unsorted rows, base between": {"rows": {4: [5, 0, 3], 1: [1, 6], 2: [4]}, "ranks": {1: 3, 2: 16, 4: 5}, "units": 8},
    "ranks of every width": {"rows": {0: [0], 1: [3], 2: [2], 3: [1]}, "ranks": {0: 1, 1: 17, 2: 64, 3: 200}, "units": 5},
    "empty segments": {"rows": {0: [], 1: [1], 2: []}, "ranks": {0: 3, 1: 2, 2: 17}, "units": 2},
    "a slot that the layer lacks": {"rows": {0: [0], 1: [1], 2: [2]}, "ranks": {0: 3, 2: 2}, "units": 4},
    "a slot without tokens": {"rows": {1: [0, 2]}, "ranks": {0: 5, 1: 3, 6: 8}, "units": 3},
    "all base": {"rows": {}, "ranks": {0: 3}, "units": 3},
    "a layer without slots": {"rows": {0: [0]}, "ranks": {}, "units": 2},
    "one token": {"rows": {3: [0]}, "ranks": {3: 2}, "units": 1, "tokens": 1},
    "several tiles and chunks": {"rows": {0: [2, 0], 5: [1]}, "ranks": {0: 3, 5: 16}, "units": 4, "tokens": 71},
    "several chunks in a bank of many slots": {  # whose programs go through several blocks each
        "rows": {0: [2, 0], 17: [1], 40: [4, 3]},
        "ranks": {0: 3, 9: 40, 17: 5, 40: 60},
        "units": 5,
        "tokens": 37,
        "inputs": 33,
        "outputs": 21,
        "slots": 64,
    },
    "several chunks of a wide slot": {"rows": {0: [2, 0], 5: [1]}, "ranks": {0: 130, 5: 2}, "units": 3, "tokens": 70},
}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    owners = draw(st.lists(st.integers(-1, 4), min_size=1, max_size=7))
    rows: dict[int, list[int]] = {}
    for unit in draw(st.permutations(range(len(owners)))):
        if owners[unit] >= 0:
            rows.setdefault(owners[unit], []).append(unit)
    sizes = st.sampled_from([1, 2, 7, 33])
    return {
        "rows": rows,
        "ranks": draw(st.dictionaries(st.integers(0, 5), st.sampled_from([1, 2, 3, 16, 17, 65]), max_size=4)),
        "units": len(owners),
        "tokens": draw(st.sampled_from([1, 3, 12, 40])),
        "inputs": draw(sizes),
        "outputs": draw(sizes),
        "dtype": draw(st.sampled_from(list(TOLERANCES))),
        "seed": draw(st.integers(0, 999)),
    }
