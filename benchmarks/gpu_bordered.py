"""The kernels of gated MLPs whose weights carry borders, for gpu_kernels.py and gpu_tune.py: problems, checks, choices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels.gpu import border_writing, bordered, gated_mlp
from lorabank.kernels.tables import RouteTables, route_tables

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
            scaling=torch.full((slots,), SCALING, device=device), poison=border_writing.poison_like(ranks, 1, INNER)[0],
            tables=route_tables(rows, units, TOKENS // units, slots).to(device), pad=border_writing.border_width(slots * rank),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Of the narrow tensors."""
        return self.narrow.shape[1]

    @property
    def pair(self) -> bordered.Group:
        """gate and up: a border before x and one behind it."""
        return self._group(2, pads=2 * self.pad, share=self.pad, left=self.pad)

    @property
    def down(self) -> bordered.Group:
        """down, or an attention's output projection."""
        return self._group(1, pads=self.pad, share=self.pad, left=0)

    def joined(self, count: int) -> bordered.Group:
        """So many layers that share a border: queries, keys and values."""
        return self._group(count, pads=self.pad, share=self.pad // count, left=0)

    @property
    def groups(self) -> dict[str, bordered.Group]:
        """What the layers of a block share borders by: three where there is room."""
        found = {"two layers": self.pair, "one layer": self.down}
        return found | ({"three layers": self.joined(3)} if self.pad // 3 >= self.rank * self.slots else {})

    def _group(self, count: int, *, pads: int, share: int, left: int) -> bordered.Group:
        shadow = torch.zeros(max(pads, count * share), HIDDEN, dtype=self.x.dtype, device=self.x.device)
        for layer in range(count):
            shadow[layer * share : layer * share + len(self.A)] = self.A.to(shadow.dtype)
        same: dict[str, Any] = {name: [value] * count for name, value in self._tensors.items()}
        return bordered.Group(shadow=shadow, width=self.width, pads=pads, share=share, left=left, **same)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"ranks": self.ranks, "scalings": self.scaling, "poison": self.poison}

    def slot_rows(self) -> Iterator[tuple[slice, slice]]:
        """(tokens, ranks) of each slot."""
        each = TOKENS // self.slots
        for slot in range(self.slots):
            yield slice(slot * each, (slot + 1) * each), slice(slot * self.rank, (slot + 1) * self.rank)


def found_and_expected(p: Mlp) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each kernel's result and the same by torch in fp32."""
    for name, group in p.groups.items():
        yield from _group_found_and_expected(p, name, group)
    dh, gate, up = (part.float() for part in p.wide)
    value, slope = torch.sigmoid(gate) * gate, torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    yield "activate", gated_mlp.activate(p.wide[1], p.wide[2], "silu"), value * up
    dgate, dup, grads = middle(p)
    for name, mine, other in (("dgate", dgate, dh * up * slope), ("dup", dup, dh * value)):
        yield f"middle, {name}", mine, other
    for name, mine, factor in zip(("dB gate", "dB up", "dA down"), grads, (dh * up * slope, dh * value, value * up), strict=True):
        parts = [p.narrow[tokens, : p.rank].float().t() @ factor[tokens] for tokens, _ in p.slot_rows()]
        yield f"middle, {name}", mine, torch.cat(parts)


def _group_found_and_expected(p: Mlp, name: str, group: bordered.Group) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`widen` and `finish` for so many layers: a layer's border columns are `share` behind those of the one before."""
    x, A = p.x.float(), p.A.bfloat16().float()
    places = [
        (layer, tokens, slice(layer * group.share + ranks.start, layer * group.share + ranks.stop), ranks)
        for layer in range(len(group.ranks))
        for tokens, ranks in p.slot_rows()
    ]
    border = torch.zeros(len(x), group.pads, device=x.device)
    for _, tokens, columns, ranks in places:
        border[tokens, columns] = SCALING * x[tokens] @ A[ranks].t()
    wide, narrow = group.widen(p.x, p.tables)
    yield f"widen, {name}", wide, torch.cat([border[:, : group.left], x, border[:, group.left :]], 1)
    made = torch.cat([wide[:, : group.left], wide[:, group.left + x.shape[1] :]], 1).float()
    added = x.clone()
    for _, tokens, columns, ranks in places:
        added[tokens] += SCALING * made[tokens, columns] @ A[ranks]
    out, scaled = group.finish(wide, p.tables)
    yield f"finish, {name}", out, added
    for kernel, found, scaling in (("widen", narrow, 1.0), ("finish", scaled, SCALING)):
        mine = torch.cat([found[layer][tokens, : p.rank] for layer, tokens, _, _ in places])
        other = torch.cat([scaling * made[tokens, columns] for _, tokens, columns, _ in places])
        yield f"{kernel}, {name}, narrow", mine, other


def middle(p: Mlp) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As blocks start it."""
    return gated_mlp.middle(*p.wide, [p.narrow] * 3, [p.B] * 3, p.tables, [p.ranks] * 3, "silu")


def timings(p: Mlp) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(kernel, its start, bytes that it reads and writes at least)."""
    T, item = TOKENS, 2
    narrow, shadow = item * T * p.width, item * p.rank * p.slots * HIDDEN
    for name, group in p.groups.items():
        count = len(group.ranks)
        moved = item * T * (2 * HIDDEN + group.pads) + count * (narrow + shadow)
        made = group.widen(p.x, p.tables)[0]
        yield f"widen, {name}", lambda group=group: group.widen(p.x, p.tables), moved
        yield f"finish, {name}", lambda group=group, made=made: group.finish(made, p.tables), moved
    yield "activate", lambda: gated_mlp.activate(p.wide[1], p.wide[2], "silu"), 3 * item * T * INNER
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
    for (block_n, block_f, warps), stages in itertools.product(blocks, (2, 3, 4)):

        def run(n=block_n, f=block_f, warps=warps, stages=stages) -> Tensor:
            dgate, dup = torch.empty_like(p.wide[0]), torch.empty_like(p.wide[0])
            kernel: Any = gated_mlp._middle
            kernel[(chunks, -(-INNER // f))](
                *p.wide, dgate, dup, p.narrow, p.narrow, p.narrow, *grads, *parts, p.ranks, p.ranks, p.ranks, p.tables.order_N,
                p.tables.chunks_C4, INNER,
                WIDTH=p.width, BLOCK_N=n, BLOCK_F=f, GELU=False, STAGES=stages, PRECISION="tf32", num_warps=warps, num_stages=1,
            )  # fmt: skip
            return dgate

        yield f"tokens {block_n} features {block_f} warps {warps} stages {stages}", run


def widens(p: Mlp) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other ways to start `widen` for two layers."""
    group = p.pair
    for shape in itertools.product((16, 32), (64, 128), (1, 2, 4), (3, 5), (1, 2, 4)):
        text = "tokens {} features {} warps {} stages {} splits {}".format(*shape)
        yield text, lambda shape=shape: group.widen(p.x, p.tables, shape=shape)[0]
