"""Kernels and ops for layers that belong together, in every dtype and with ranks beyond 16: against plain products in fp32.

Shapes as in kernels/gpu/lora.py. A, B and frozen weights are numbers of the dtype, so that what is left are the roundings of
results and of the narrow tensors between products. fp32 has fewer parts and smaller blocks than the others; wide slots have two
tiles a program in the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.gpu import border_writing, bordered, gated_mlp, siblings
from lorabank.kernels.gpu import bordered_op as _bordered_op  # noqa: F401  registers lorabank::lora_mlp_open and its like
from lorabank.kernels.gpu import joined_op as _joined_op  # noqa: F401  registers lorabank::lora_joined
from lorabank.kernels.gpu import siblings_op as _siblings_op  # noqa: F401  registers lorabank::lora_linears
from lorabank.kernels.gpu.border_writing import border_width
from lorabank.kernels.gpu.outer_each import outer_each
from lorabank.kernels.tables import RouteTables, route_tables
from tests.kernels.gpu import wide_weights
from tests.kernels.gpu.problems import bf16_dots, poisoned  # noqa: F401

NAN = float("nan")
UNITS, TOKENS, SLOTS = 5, 33, 8
ROWS: Mapping[int, Sequence[int]] = {1: [4, 0], 0: [2], 6: [3]}
"""Slot 1 has three tiles and two chunks, in one of which tokens don't follow each other. Row 1 is the base's."""
IDLE = 3
"""A slot that every layer has and no row uses. Slot 6 isn't in every layer."""
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""What one rounding takes from a number, relative: GPUs round bf16 to 8 bits, the interpreter cuts off behind them. fp32: sums
in another order, and GPUs' exp, a few of its last bits."""
SUMMED = 1e-4
"""Of gradients that are summed in fp32, from numbers of any dtype."""
THROUGH = {torch.bfloat16: 2.5e-2, torch.float16: 2e-3}
"""Of what an op makes, over all of a tensor's numbers: three to four roundings after each other. In an MLP's gradients all cut
off under the interpreter; half of this is what was seen."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of layers with capacity buffers of `room` rows, whose x or dy has `features`."""

    count: int
    room: int
    width: int
    features: int
    between: bool = False
    """Borders on both sides of x."""

    def spots(self, which: int) -> dict[int, tuple[int, int]]:
        """A layer's slots: (first row, rank). Layers differ in their ranks, and rows between slots are nobody's."""
        big = min(self.width, self.room - 13)
        spots = {0: (which % 2, 5 + which % 2), 1: (8, big - which), 6: (8 + big, 2), IDLE: (10 + big, 3)}
        return {slot: spot for slot, spot in spots.items() if slot != 6 or which % 2 == 0}


GROUPS = {
    "one layer": Sizes(count=1, room=128, width=64, features=300),
    "two layers": Sizes(count=2, room=64, width=64, features=70),
    "three layers": Sizes(count=3, room=42, width=64, features=70),
    "three layers of few ranks": Sizes(count=3, room=32, width=16, features=70),
    "four layers": Sizes(count=4, room=32, width=64, features=33),
}
LONG = {
    "one layer, in parts": Sizes(count=1, room=128, width=64, features=2100),
    "one layer of few ranks, in parts": Sizes(count=1, room=32, width=16, features=2100),
    "two layers, in parts": Sizes(count=2, room=64, width=64, features=1030),
    "three layers of few ranks, in parts": Sizes(count=3, room=32, width=16, features=1030),
}
"""Whose features are shared by several programs."""
BORDERED = {**GROUPS, "gate and up": Sizes(count=2, room=70, width=16, features=130, between=True)}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def each(groups: Mapping[str, Sizes], *, least: int = 1) -> pytest.MarkDecorator:
    """A test for each of the groups that has so many layers."""
    chosen = {name: sizes for name, sizes in groups.items() if sizes.count >= least}
    return pytest.mark.parametrize("sizes", chosen.values(), ids=chosen)


def entries_of(slot: int) -> tuple[list[int], slice]:
    """A slot's tokens, and where they are among the entries."""
    first = sum(len(mine) * TOKENS for mine in [*ROWS.values()][: [*ROWS].index(slot)])
    tokens = [unit * TOKENS + t for unit in sorted(ROWS[slot]) for t in range(TOKENS)]
    return tokens, slice(first, first + len(tokens))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By each tensor's largest entry. What was never written is NaN."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert float((found.float() - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Batch:
    """Layers' adapters and the tables of a batch that uses them; rows of no slot are NaN."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.spots = [sizes.spots(which) for which in range(sizes.count)]
        self.tables: RouteTables = route_tables(ROWS, UNITS, TOKENS, SLOTS).to(device)
        self._generator = torch.Generator().manual_seed(seed)
        self.ranks = [
            torch.tensor([spots.get(slot, (0, 0)) for slot in range(SLOTS)], dtype=torch.int32).to(device) for spots in self.spots
        ]
        self.scalings = [self.random(SLOTS, dtype=torch.float32).abs() + 0.5 for _ in self.spots]

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers of the dtype that nobody had before."""
        return torch.randn(shape, generator=self._generator).to(self.dtype).to(self.device, dtype or self.dtype)

    def wide(self, features: int) -> Tensor:
        """(N, features)."""
        return self.random(UNITS * TOKENS, features)

    def leaf(self, which: int, features: int) -> Tensor:
        """A capacity buffer, fp32 (ΣR, features), of numbers of the dtype."""
        leaf = torch.full((self.sizes.room, features), NAN, device=self.device)
        for start, rank in self.spots[which].values():
            leaf[start : start + rank] = (self.random(rank, features) / 8).float()  # a power of two
        return leaf

    def narrow(self, which: int) -> Tensor:
        """(N, W) as a kernel leaves it: NaN beyond each slot's ranks and in entries without a slot."""
        narrow = torch.full((UNITS * TOKENS, self.sizes.width), NAN, dtype=self.dtype, device=self.device)
        for _, (_, rank), _, entries in self.used(which):
            narrow[entries, :rank] = self.random(entries.stop - entries.start, rank)
        return narrow

    def used(self, which: int) -> list[tuple[int, tuple[int, int], list[int], slice]]:
        """(slot, (first row, rank), tokens, entries) of the slots with tokens that a layer has."""
        return [(slot, self.spots[which][slot], *entries_of(slot)) for slot in ROWS if slot in self.spots[which]]

    def outer(self, which: int, narrow: Tensor, wide: Tensor, found: Tensor) -> None:
        """Hold narrowᵀ · wide of each slot to the plain one."""
        for _, (start, rank), tokens, entries in self.used(which):
            expected = narrow[entries, :rank].float().t() @ wide[tokens].float()
            assert_close(found[start : start + rank], expected, SUMMED)
        start, rank = self.spots[which][IDLE]
        assert found[start : start + rank].eq(0).all()

    def group(self) -> tuple[bordered.Group, list[Tensor]]:
        """Layers with borders, and each one's leaf in the shadow."""
        count, features, between = self.sizes.count, self.sizes.features, self.sizes.between
        pads = count * border_width(self.sizes.room) if between else border_width(self.sizes.room * count)
        assert pads
        share = pads // count
        leaves = [self.leaf(which, features) for which in range(count)]
        shadow = torch.full((pads, features), NAN, dtype=self.dtype, device=self.device)
        for which, leaf in enumerate(leaves):
            shadow[which * share : which * share + self.sizes.room] = leaf.to(self.dtype)
        group = bordered.Group(
            shadow=shadow, ranks=self.ranks, scalings=self.scalings, width=self.sizes.width, pads=pads, share=share,
            poison=list(border_writing.poison_like(self.ranks[0], count, features)), left=share if between else 0,
        )  # fmt: skip
        return group, leaves


def columns(group: bordered.Group, which: int, start: int, rank: int) -> list[int]:
    """Where a layer's ranks are beside x."""
    places = range(which * group.share + start, which * group.share + start + rank)
    return [place + (group.shadow.shape[1] if place >= group.left else 0) for place in places]


# ---- borders --------------------------------------------------------------------------------------------------------


@DTYPES
@each({**BORDERED, **{name: sizes for name, sizes in LONG.items() if sizes.count == 1}})
def test_widen(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    group, leaves = batch.group()
    x = batch.wide(sizes.features)
    wide, narrow = group.widen(x, batch.tables)
    assert torch.equal(wide[:, group.left : group.left + sizes.features], x)
    border = torch.zeros(wide.shape, device=device)
    for which, leaf in enumerate(leaves):
        for slot, (start, rank), tokens, entries in batch.used(which):
            mine = columns(group, which, start, rank)
            border[tokens, mine[0] : mine[-1] + 1] = batch.scalings[which][slot] * (
                x[tokens].float() @ leaf[start : start + rank].t()
            )
            assert torch.equal(narrow[which][entries, :rank], wide[tokens][:, mine])
    found = wide.clone()
    found[:, group.left : group.left + sizes.features] = 0
    assert_close(found, border, ROUNDING[dtype])
    assert found[border == 0].eq(0).all()  # of other slots and layers, of the base's rows, and what nobody has


@DTYPES
@each(BORDERED)
def test_finish(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    """The border is rounded once more when it is scaled, and with `onto` the sum is."""
    batch = Batch(sizes, dtype, device)
    group, leaves = batch.group()
    wide, onto = batch.wide(sizes.features + group.pads), batch.wide(sizes.features)
    expected = wide[:, group.left : group.left + sizes.features].float()
    base = slice(TOKENS, 2 * TOKENS)
    results = [group.finish(wide, batch.tables), group.finish(wide, batch.tables, onto)]
    assert torch.equal(results[0][0][base].float(), expected[base])
    for which, leaf in enumerate(leaves):
        for slot, (start, rank), tokens, entries in batch.used(which):
            scaled = batch.scalings[which][slot] * wide[tokens][:, columns(group, which, start, rank)].float()
            expected[tokens] += scaled @ leaf[start : start + rank]
            for _, narrow in results:
                assert_close(narrow[which][entries, :rank], scaled, ROUNDING[dtype])
    assert_close(results[0][0], expected, 2 * ROUNDING[dtype])
    assert_close(results[1][0], expected + onto.float(), 3 * ROUNDING[dtype])


@HALVES
def test_a_slots_poison_stays_with_its_rows(dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(GROUPS["two layers"], dtype, device)
    group, _ = batch.group()
    x, wide = batch.wide(batch.sizes.features), batch.wide(batch.sizes.features + group.pads)
    before = group.widen(x, batch.tables)[0], group.finish(wide, batch.tables)[0]
    group.poison[1][1] = NAN
    after = group.widen(x, batch.tables)[0], group.finish(wide, batch.tables)[0]
    tokens, _ = entries_of(1)
    others = [token for token in range(UNITS * TOKENS) if token not in tokens]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[others], old[others])
    mine = columns(group, 1, *batch.spots[1][1])
    assert after[0][tokens][:, mine].isnan().all()
    assert torch.equal(after[0][tokens][:, : mine[0]], before[0][tokens][:, : mine[0]])
    assert after[1][tokens].isnan().all()


@DTYPES
@each(GROUPS)
def test_outer_each(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    narrow = [batch.narrow(which) for which in range(batch.sizes.count)]
    wide = [batch.wide(features) for features in (70, 33, 130, 5)[: batch.sizes.count]]
    likes = [torch.empty(batch.sizes.room, y.shape[1], device=device) for y in wide]
    grads = outer_each(narrow, wide, likes, batch.tables, batch.ranks)
    for which, grad in enumerate(grads):
        assert grad.dtype == torch.float32
        batch.outer(which, narrow[which], wide[which], grad)


# ---- gated MLPs -----------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate_and_middle(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Slots have 16 ranks at most there. dB and dA are sums of numbers that were rounded before."""
    batch = Batch(Sizes(count=3, room=32, width=gated_mlp.WIDEST_RANK, features=130), dtype, device)
    dh, gate, up = (batch.wide(130) for _ in range(3))
    g, u = gate.float().requires_grad_(), up.float().requires_grad_()
    h = ACTIVATIONS[activation](g) * u
    expected = torch.autograd.grad(h, (g, u), dh.float())
    assert_close(gated_mlp.activate(gate, up, activation), h.detach(), 2 * ROUNDING[dtype])
    narrow = [batch.narrow(which) for which in range(3)]
    likes = [torch.empty(32, 130, device=device)] * 3
    dgate, dup, grads = gated_mlp.middle(dh, gate, up, narrow, likes, batch.tables, batch.ranks, activation)
    assert_close(dgate, expected[0], ROUNDING[dtype])
    assert_close(dup, expected[1], ROUNDING[dtype])
    for which, wide in enumerate((*expected, h.detach())):
        assert grads[which].dtype == torch.float32
        for _, (start, rank), tokens, entries in batch.used(which):
            total = narrow[which][entries, :rank].float().t() @ wide[tokens]
            assert_close(grads[which][start : start + rank], total, 2 * ROUNDING[dtype])
        start, rank = batch.spots[which][IDLE]
        assert grads[which][start : start + rank].eq(0).all()


# ---- siblings -------------------------------------------------------------------------------------------------------


@DTYPES
@each({**GROUPS, **LONG}, least=2)
def test_siblings_shrink(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    x, weights = batch.wide(sizes.features), [batch.leaf(which, sizes.features) for which in range(sizes.count)]
    found = siblings.shrink(x, weights, batch.tables, batch.ranks, batch.scalings, sizes.width)
    for which, weight in enumerate(weights):
        for slot, (start, rank), tokens, entries in batch.used(which):
            expected = batch.scalings[which][slot] * (x[tokens].float() @ weight[start : start + rank].t())
            assert_close(found[which][entries, :rank], expected, ROUNDING[dtype])


@DTYPES
@each(GROUPS, least=2)
def test_siblings_outer(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    x, narrow = batch.wide(sizes.features), [batch.narrow(which) for which in range(sizes.count)]
    likes = [torch.empty(sizes.room, sizes.features, device=device)] * sizes.count
    for which, grad in enumerate(siblings.outer(narrow, x, likes, batch.tables, batch.ranks)):
        assert grad.dtype == torch.float32
        batch.outer(which, narrow[which], x, grad)


@DTYPES
@each(GROUPS, least=2)
def test_siblings_change(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    """Rounded once, whatever it is added to."""
    batch = Batch(sizes, dtype, device)
    count, features = sizes.count, sizes.features
    weights = [batch.leaf(which, features) for which in range(count)]
    narrow = [batch.narrow(which) for which in range(count)]
    expected = torch.zeros(UNITS * TOKENS, features, device=device)
    for which, weight in enumerate(weights):
        for _, (start, rank), tokens, entries in batch.used(which):
            expected[tokens] += narrow[which][entries, :rank].float() @ weight[start : start + rank]
    onto, more = batch.wide(features), [batch.wide(features) for _ in range(count - 1)]
    given: Any = narrow, weights, batch.tables, batch.ranks
    assert_close(siblings.change(*given), expected, ROUNDING[dtype])
    expected += onto.float()
    assert_close(siblings.change(*given, out_NF=onto.clone()), expected, ROUNDING[dtype])
    expected += torch.stack(more).float().sum(0)
    assert_close(siblings.change(*given, out_NF=onto, more=more), expected, ROUNDING[dtype])


# ---- ops: outputs and all gradients ---------------------------------------------------------------------------------


class Layers:
    """Frozen weights and adapters of layers, each (inputs, outputs), to be called one after the other in fp32."""

    def __init__(self, batch: Batch, sizes: Sequence[tuple[int, int]]) -> None:
        self.batch = batch
        self.weights = [batch.random(outputs, inputs) * 2.0**-4 for inputs, outputs in sizes]
        self.As = [batch.leaf(which, inputs).requires_grad_() for which, (inputs, _) in enumerate(sizes)]
        self.Bs = [batch.leaf(which, outputs).requires_grad_() for which, (_, outputs) in enumerate(sizes)]

    def plain(self, which: int, x: Tensor) -> Tensor:
        """One layer's y."""
        y = x @ self.weights[which].float().t()
        A, B = self.As[which], self.Bs[which]
        for slot, (start, rank), tokens, _ in self.batch.used(which):
            mine = slice(start, start + rank)
            change = self.batch.scalings[which][slot] * (x[tokens] @ A[mine].t()) @ B[mine]
            y = y.index_add(0, torch.tensor(tokens, device=y.device), change)
        return y

    def results(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> list[Tensor]:
        """What the function gives, and the gradients of x and of each layer's A and B, slot by slot."""
        x = x.clone().requires_grad_()
        for leaf in (*self.As, *self.Bs):
            leaf.grad = None
        ys = function(x)
        loss = sum((y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).cos()).sum() for y in ys)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert x.grad is not None
        found = [*(y.detach() for y in ys), x.grad]
        for which in range(len(self.weights)):
            for leaf in (self.As[which], self.Bs[which]):
                assert leaf.grad is not None
                found += [leaf.grad[start : start + rank] for start, rank in self.batch.spots[which].values()]
        return found

    def check(self, op: Callable[[Tensor], Sequence[Tensor]], plain: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> None:
        """Hold the op to the plain products: tensor by tensor, over all numbers."""
        found, expected = self.results(op, x), self.results(plain, x.float())
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.isfinite().all()
            assert float((mine.float() - theirs).norm()) <= THROUGH[self.batch.dtype] * float(theirs.norm())


@HALVES
@each(GROUPS, least=2)
def test_siblings_op(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    layers = Layers(batch, [(sizes.features, 20 + 8 * which) for which in range(sizes.count)])

    def op(x: Tensor) -> list[Tensor]:
        given = x, layers.weights, [], layers.As, layers.Bs, batch.ranks, batch.scalings, *batch.tables.tensors
        return torch.ops.lorabank.lora_linears(*given, "linear", sizes.width, [])[: sizes.count]

    layers.check(op, lambda x: [layers.plain(which, x) for which in range(sizes.count)], batch.wide(sizes.features))


@HALVES
@each(GROUPS)
def test_joined_op(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(sizes, dtype, device)
    count, inputs = sizes.count, sizes.features
    layers = Layers(batch, [(inputs, 20 + 8 * which) for which in range(count)])
    each_base = wide_weights.joined(layers.weights, layers.As, layers.Bs, batch.ranks, sizes.room)
    bases = [tensor for base in each_base for tensor in base]

    def op(x: Tensor) -> list[Tensor]:
        given = x, bases, [], layers.As, layers.Bs, batch.ranks, batch.scalings, *batch.tables.tensors, sizes.width
        return torch.ops.lorabank.lora_joined(*given)[:count]

    layers.check(op, lambda x: [layers.plain(which, x) for which in range(count)], batch.wide(inputs))


@HALVES
@pytest.mark.parametrize(("activation", "residual", "again"), [("silu", True, False), ("gelu_tanh", False, True)])
def test_mlp_ops(activation: str, residual: bool, again: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs, middle = 40, 70
    batch = Batch(Sizes(count=3, room=70, width=16, features=inputs), dtype, device)
    layers = Layers(batch, [(inputs, middle), (inputs, middle), (middle, inputs)])
    gate, up, down = wide_weights.mlp(layers.weights, layers.As, layers.Bs, batch.ranks, batch.sizes.room)
    act = ACTIVATIONS[activation]

    def op(x: Tensor) -> list[Tensor]:
        shared = *batch.tables.tensors, batch.sizes.width
        first = x, [*gate, *up], layers.As[:2], layers.Bs[:2], batch.ranks[:2], batch.scalings[:2], *shared, False
        gate_NF, up_NF, *xas = torch.ops.lorabank.lora_mlp_open(*first)
        leaves = layers.Bs[:2], layers.As[2], layers.Bs[2], batch.ranks, batch.scalings[2]
        y = torch.ops.lorabank.lora_mlp_close(
            x.sin() if residual else None, gate_NF, up_NF, xas, down, *leaves, *shared, activation, again
        )
        return y[:1]

    def plain(x: Tensor) -> list[Tensor]:
        y = layers.plain(2, act(layers.plain(0, x)) * layers.plain(1, x))
        return [x.sin() + y if residual else y]

    layers.check(op, plain, batch.wide(inputs))
