"""The kernels of gated MLPs whose weights carry borders, for gpu_kernels.py and gpu_tune.py: problems, checks, choices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels.gpu import bordered
from lorabank.kernels.tables import TILE, RouteTables, route_tables

TOKENS, HIDDEN, INNER = 4096, 4096, 14336
SCALING = 2.0


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A gated MLP's tensors: `slots` adapters of one rank share the tokens evenly."""

    rank: int
    slots: int
    x: Tensor
    """(N, I), also as a gradient of y."""
    wide: Tensor
    """(N, F): gate, up and the gradient of h, stacked (3, N, F)."""
    A: Tensor
    """(ΣR, I)"""
    B: Tensor
    """(ΣR, F)"""
    narrow: Tensor
    """(N, W)"""
    ranks: Tensor
    scaling: Tensor
    poison: Tensor
    tables: RouteTables
    pad: int

    @classmethod
    def make(cls, rank: int, slots: int, device: torch.device) -> Mlp:
        """Random tensors of Llama-3.1-8B's sizes."""
        torch.manual_seed(rank + slots)
        units = max(2, slots)
        share = units // slots
        rows = {slot: range(slot * share, (slot + 1) * share) for slot in range(slots)}
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        ranks = torch.tensor([[slot * rank, rank] for slot in range(slots)], dtype=torch.int32, device=device)
        return cls(
            rank=rank, slots=slots, x=torch.randn(TOKENS, HIDDEN, **bf16), wide=torch.randn(3, TOKENS, INNER, **bf16),
            A=torch.randn(slots * rank, HIDDEN, device=device) / HIDDEN**0.5, B=torch.randn(slots * rank, INNER, device=device),
            narrow=torch.randn(TOKENS, table_width(rank), **bf16), ranks=ranks,
            scaling=torch.full((slots,), SCALING, device=device), poison=bordered.poison_like(ranks, INNER)[0],
            tables=route_tables(rows, units, TOKENS // units, slots).to(device), pad=bordered.border_width(slots * rank),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Of the narrow tensors."""
        return self.narrow.shape[1]

    def same(self, count: int) -> tuple[Any, ...]:
        """What `widen` and `finish` take for so many layers."""
        ranks, scaling, poison = [self.ranks] * count, [self.scaling] * count, [self.poison] * count
        return [self.A] * count, self.tables, ranks, scaling, poison, self.pad, self.width

    def slot_rows(self) -> Iterator[tuple[slice, slice]]:
        """(tokens, ranks) of each slot."""
        each = TOKENS // self.slots
        for slot in range(self.slots):
            yield slice(slot * each, (slot + 1) * each), slice(slot * self.rank, (slot + 1) * self.rank)


def found_and_expected(p: Mlp) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each kernel's result and the same by torch in fp32."""
    x, A = p.x.float(), p.A.bfloat16().float()
    border = torch.zeros(TOKENS, p.pad, device=x.device)
    for tokens, ranks in p.slot_rows():
        border[tokens, ranks] = SCALING * x[tokens] @ A[ranks].t()
    wide, _ = bordered.widen(p.x, *p.same(2))
    yield "widen", wide, torch.cat([border, x, border], 1)
    added = x.clone()
    for tokens, ranks in p.slot_rows():
        added[tokens] += 2 * SCALING * wide[tokens, ranks].float() @ A[ranks]
    yield "finish", bordered.finish(wide, *p.same(2))[0], added
    dh, gate, up = (part.float() for part in p.wide)
    value, slope = torch.sigmoid(gate) * gate, torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    yield "activate", bordered.activate(p.wide[1], p.wide[2], "silu"), value * up
    dgate, dup, grads = middle(p)
    for name, mine, other in (("dgate", dgate, dh * up * slope), ("dup", dup, dh * value)):
        yield f"middle, {name}", mine, other
    for name, mine, factor in zip(("dB gate", "dB up", "dA down"), grads, (dh * up * slope, dh * value, value * up), strict=True):
        parts = [p.narrow[tokens, : p.rank].float().t() @ factor[tokens] for tokens, _ in p.slot_rows()]
        yield f"middle, {name}", mine, torch.cat(parts)


def middle(p: Mlp) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As blocks start it."""
    return bordered.middle(*p.wide, [p.narrow] * 3, [p.B] * 3, p.tables, [p.ranks] * 3, "silu")


def timings(p: Mlp) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(kernel, its start, bytes that it reads and writes at least)."""
    T, item = TOKENS, 2
    narrow, wide = item * T * p.width, item * T * (HIDDEN + 2 * p.pad)
    made = bordered.widen(p.x, *p.same(2))[0]
    both = 2 * (narrow + 4 * p.A.numel())
    yield "widen, two layers", lambda: bordered.widen(p.x, *p.same(2)), item * T * HIDDEN + wide + both
    yield "widen", lambda: bordered.widen(p.x, *p.same(1)), item * T * (2 * HIDDEN + p.pad) + narrow + 4 * p.A.numel()
    yield "finish, two layers", lambda: bordered.finish(made, *p.same(2)), 2 * item * T * HIDDEN + 2 * narrow + both
    yield "activate", lambda: bordered.activate(p.wide[1], p.wide[2], "silu"), 3 * item * T * INNER
    yield "middle", lambda: middle(p), 5 * item * T * INNER + 3 * (narrow + 4 * p.B.numel())


def middles(p: Mlp) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other ways to start `middle`: (text, start, which gives dgate)."""
    chunks = p.tables.chunks_C4.shape[0]
    grads = [torch.empty_like(p.B) for _ in range(3)]
    parts = [torch.empty(chunks, p.width, INNER, device=p.x.device) for _ in range(3)]
    blocks = (
        (64, 32, 4),
        (32, 64, 4),
        (64, 64, 8),
        (32, 128, 8),
        (32, 32, 2),
        (16, 64, 4),
        (128, 32, 4),
        (64, 16, 2),
        (32, 32, 4),
    )
    for (block_n, block_f, warps), stages, registers in itertools.product(blocks, (2, 1, 3), (None, 96, 80)):
        more = {} if registers is None else {"maxnreg": registers}

        def run(n=block_n, f=block_f, warps=warps, stages=stages, more=more) -> Tensor:
            dgate, dup = torch.empty_like(p.wide[0]), torch.empty_like(p.wide[0])
            kernel: Any = bordered._middle
            kernel[(chunks, -(-INNER // f))](
                *p.wide, dgate, dup, p.narrow, p.narrow, p.narrow, *grads, *parts, p.ranks, p.ranks, p.ranks, p.tables.order_N,
                p.tables.chunks_C4, INNER,
                WIDTH=p.width, BLOCK_N=n, BLOCK_F=f, GELU=False, PRECISION="tf32", num_warps=warps, num_stages=stages, **more,
            )  # fmt: skip
            return dgate

        yield f"tokens {block_n} features {block_f} warps {warps} stages {stages} registers {registers}", run


def widens(p: Mlp) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other ways to start `widen` for two layers."""
    for block_f, warps, stages in itertools.product((64, 128, 256), (2, 4, 8), (2, 3, 4, 6)):
        if stages * block_f * (TILE * 2 + 2 * p.width * 4) > 200 * 1024:
            continue

        def run(f=block_f, warps=warps, stages=stages) -> Tensor:
            wide = torch.empty((TOKENS, HIDDEN + 2 * p.pad), dtype=p.x.dtype, device=p.x.device)
            narrow = [torch.empty_like(p.narrow) for _ in range(2)]
            blocks = p.poison.shape[1]
            kernel: Any = bordered._widen
            kernel[(p.tables.tiles_S4.shape[0],)](
                p.x, wide, p.A, p.A, *narrow, p.ranks, p.ranks, p.scaling, p.scaling, p.poison, p.poison, p.tables.order_N,
                p.tables.tiles_S4, HIDDEN, wide.shape[1], blocks,
                C=2, PAD=p.pad, WIDTH=p.width, BLOCK_M=TILE, BLOCK_F=f, BLOCKS=triton.next_power_of_2(blocks),
                PRECISION="tf32", num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return wide

        yield f"block_f {block_f} warps {warps} stages {stages}", run
