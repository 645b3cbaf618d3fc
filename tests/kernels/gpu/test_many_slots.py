"""Ops for one layer and for layers that belong together where a batch has many slots: against the plain definition.

A thousand segments of one token, among empty ones, a long one, the base's tokens and slots that a layer lacks; borders take 64
slots at most. Ranks of 1 stand beside the largest that a form takes, and beyond that the pass leaves layers to their own ops.
Outputs and all gradients; shapes as in kernels/gpu/lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels import fp8, reference
from lorabank.kernels.gpu import border_writing, gated_mlp, lora, rounding, siblings
from lorabank.kernels.gpu import op as _op  # noqa: F401  registers lorabank::lora_linear
from tests.kernels.gpu import test_grouping, wide_weights
from tests.kernels.gpu import test_joined as test_joined_layers
from tests.kernels.gpu.problems import (
    FIRST,
    TOLERANCES,
    Problem,
    bf16_dots,  # noqa: F401
    close,
    expected,
    make,
    poisoned,  # noqa: F401
)
from tests.kernels.gpu.test_gated import e4m3, noted, same_rows  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # numpy, inside the interpreter
    pytest.mark.variants(1),
]
SEGMENTS = 1000 if torch.cuda.is_available() else 90
"""Of one token. A program takes the interpreter milliseconds."""
SLOTS = SEGMENTS * 5 // 4 + 1
LONG = 300 if torch.cuda.is_available() else 140
"""Tokens of the slot that has several tiles and chunks."""
FP32, BF16, FP16 = TOLERANCES


def batch(slots: int, *, idle: int = 5) -> tuple[dict[int, list[int]], int]:
    """(each slot's tokens, tokens in all): one each, but for the third slot, which has many, and every `idle`-th, which has none.

    The last token is the base's, and so are some between.
    """
    total = slots + LONG + 7
    order = torch.randperm(total - 1, generator=torch.Generator().manual_seed(0)).tolist()
    rows = {slot: [] if slot % idle == idle - 1 else order[slot : slot + 1] for slot in range(slots)}
    for slot in range(idle - 1, slots, 2 * idle):
        del rows[slot]  # a slot that the batch doesn't name is one more way to have no tokens
    return rows | {2: order[-LONG:]}, total


def ranks_of(which: int, largest: int, slots: int) -> dict[int, int]:
    """Of each slot of a layer, 1 to `largest`. Layers differ in them, and in which slots they lack."""
    cycle = (1, largest, 2, largest // 2 + 1, 1, 3, max(1, largest - 1))
    return {slot: cycle[(slot + which) % len(cycle)] for slot in range(slots) if (slot + 3 * which) % 11 != 6}


class Layers:
    """Frozen weights beside the adapters of some problems over one batch of tokens."""

    def __init__(self, problems: Sequence[Problem], storage: str = "linear") -> None:
        self.problems, first = problems, problems[0]
        g = torch.Generator().manual_seed(1)
        sizes = [(p.dy_NO.shape[1], p.x_NI.shape[1]) for p in problems]
        self.weights = [(torch.randn(size, generator=g) / size[1] ** 0.5).to(first.x_NI) for size in sizes]
        self.backs = self.weights
        """What gradients of x are made with."""
        self.storages, self.bases = [storage] * len(problems), [[weight] for weight in self.weights]
        if storage == "conv1d":
            self.bases = [[weight.t().contiguous()] for weight in self.weights]
        elif storage == "fp8":
            self.bases = [fp8.quantize_weight(weight) for weight in self.weights]
            self.weights = [fp8.dequantize_rows(base[0], base[1], first.x_NI.dtype) for base in self.bases]
            self.backs = [fp8.dequantize_rows(base[2], base[3], first.x_NI.dtype).t() for base in self.bases]
        self.As, self.Bs = [p.A.clone().requires_grad_() for p in problems], [p.B.clone().requires_grad_() for p in problems]
        self.ranks, self.scalings = [p.ranks_P2 for p in problems], [p.scaling_P for p in problems]
        self.tables, self.leaves = first.tables, [p.leaves() for p in problems]
        self.width = max(p.width for p in problems)
        odds = [p.drops for p in problems]
        self.drops = [[*odds[0][:2], *mine[2:]] for mine in odds]
        """Of each layer: the batch's two tables are the same tensors for all."""

    def bordered(self, kind: Callable[..., list[list[Tensor]]], storages: Sequence[str]) -> None:
        """Move the weights into tensors with borders."""
        rows = max(int(ranks.sum(1).max()) for ranks in self.ranks)
        self.bases, self.storages = kind(self.weights, self.As, self.Bs, self.ranks, rows), list(storages)

    def one(self, which: int, x: Tensor) -> Tensor:
        """A layer's y by its op: what a block's trace has before the passes."""
        return torch.ops.lorabank.lora_linear(
            x, self.bases[which], None, self.As[which], self.Bs[which], self.ranks[which], self.scalings[which],
            *self.tables.tensors, self.storages[which], self.width, self.drops[which],
        )[0]  # fmt: skip

    def plain(self, which: int, x: Tensor) -> Tensor:
        """The same by the definition, in fp64 on the CPU."""
        p, weight, back = self.problems[which], self.weights[which].double().cpu(), self.backs[which].double().cpu()
        y = F.linear(x, back) + F.linear(x, weight - back).detach()
        return reference.add_lora(y, x, p.segments(self.leaves[which]), p.units)

    def all(self, one: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Every layer's y of one x."""
        return lambda x: torch.cat([one(which, x) for which in range(len(self.problems))], -1)

    def check(self, function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], *, by: float = 1.0) -> None:
        """Hold y and the gradients of x and of every A and B to the plain function's. `by`: times the tolerance."""
        tolerance = by * TOLERANCES[self.problems[0].x_NI.dtype]
        x = self.problems[0].x_NI.clone().requires_grad_()
        y = function(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        dx, *found = torch.autograd.grad(y, [x, *self.As, *self.Bs], dy)
        x = x.detach().double().cpu().requires_grad_()
        expected = plain(x)
        leaves = [leaf for layer in self.leaves for pair in layer.values() for leaf in pair]
        right, *rest = torch.autograd.grad(expected, [x, *leaves], dy.double().cpu(), allow_unused=True)
        close("y", y.detach().double().cpu(), expected.detach(), tolerance)
        close("x", dx.double().cpu(), right, tolerance)
        gradients = dict(zip(map(id, leaves), rest, strict=True))
        for i, grad in enumerate(found):
            which, leaf = i % len(self.problems), i // len(self.problems)
            mine = {slot: gradients[id(pair[leaf])] for slot, pair in self.leaves[which].items()}
            close_by_rank(f"{'AB'[leaf]} of layer {which}", self.problems[which], grad.double().cpu(), mine, tolerance)


def close_by_rank(name: str, p: Problem, found: Tensor, expected: Mapping[int, Tensor | None], tolerance: float) -> None:
    """A layer's gradient, slots of the same rank together: how large it is depends on that. `expected`: of each slot."""
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for slot, right in expected.items():
        first, rank = p.spots[slot]
        mine = found[first : first + rank]
        if p.rows.get(slot):
            assert right is not None
            pairs.setdefault(rank, []).append((mine, right))
        else:
            assert mine.eq(0).all(), f"{name}: slot {slot} has no tokens"
    for rank, some in pairs.items():
        mine, right = (torch.cat(each) for each in zip(*some, strict=True))
        close(f"{name}, rank {rank}", mine, right, tolerance)


def layers_of(
    device: torch.device, dtype: torch.dtype, ranks: Sequence[Mapping[int, int]], sizes: Sequence[tuple[int, int]],
    slots: int = SLOTS, *, storage: str = "linear", dropout: Sequence[Mapping[int, float]] = (), gap: int = 1,
) -> Layers:  # fmt: skip
    """`ranks` of each layer's slots, `sizes`: (inputs, outputs) of each. Layers read the first one's x."""
    rows, units = batch(slots)
    problems = [
        make(
            device, rows=rows, ranks=mine, units=units, tokens=1, inputs=inputs, outputs=outputs, dtype=dtype, slots=slots,
            seed=which, dropout=dropout[which] if dropout else None, gap=gap,
        )
        for which, (mine, (inputs, outputs)) in enumerate(zip(ranks, sizes, strict=True))
    ]  # fmt: skip
    return Layers(problems, storage)


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products over an fp8 base as without fp8 units: what rounds nothing can be held closely."""
    monkeypatch.setattr(fp8, "runs_on", lambda device: False)


@pytest.mark.parametrize(("storage", "dtype"), [("linear", BF16), ("conv1d", FP32), ("fp8", FP16)], ids=str)
def test_one_layer(storage: str, dtype: torch.dtype, dequantised: None, device: torch.device) -> None:
    layers = layers_of(device, dtype, [ranks_of(0, 512, SLOTS)], [(20, 12)], storage=storage)
    layers.check(layers.all(layers.one), layers.all(layers.plain))


# ---- layers that read one x -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "largest", "storage", "dtype"),
    [
        (2, 64, "fp8", BF16),
        (2, 16, "fp8", FP32),
        pytest.param(3, 64, "linear", FP32, marks=pytest.mark.slow),
        pytest.param(4, 64, "linear", FP16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_siblings(count: int, largest: int, storage: str, dtype: torch.dtype, dequantised: None, device: torch.device) -> None:
    """With any number of slots, which have up to 64 ranks each."""
    ranks, seen = [ranks_of(which, largest, SLOTS) for which in range(count)], {}
    layers = layers_of(device, dtype, ranks, [(20, 9 + 4 * which) for which in range(count)], storage=storage)
    layers.check(test_joined_layers.compiled(layers.all(layers.one), seen), layers.all(layers.plain))
    assert seen == {"joined": 0, "siblings": count}


@pytest.mark.slow
def test_siblings_with_dropout(device: torch.device) -> None:
    slots, seen = SLOTS // 2, {}
    ranks = [ranks_of(which, 64, slots) for which in range(2)]
    dropout = [{slot: (0.5, 0.0, 0.2)[(slot + which) % 3] for slot in range(slots)} for which in range(2)]
    layers = layers_of(device, FP32, ranks, [(20, 9), (20, 13)], slots, dropout=dropout)
    layers.check(test_joined_layers.compiled(layers.all(layers.one), seen), layers.all(layers.plain))
    assert seen == {"joined": 0, "siblings": 2}


@pytest.mark.parametrize(("largest", "dtype"), [(siblings.WIDEST + 1, FP32), (512, BF16)], ids=str)
def test_one_slot_of_more_ranks_leaves_layers_apart(largest: int, dtype: torch.dtype, device: torch.device) -> None:
    """The others have few."""
    ranks, seen = [{slot: 1 + slot % 3 for slot in range(20)} | {2: largest, 7: largest} for _ in range(2)], {}
    layers = layers_of(device, dtype, ranks, [(20, 9), (20, 13)], 20)
    layers.check(test_joined_layers.compiled(layers.all(layers.one), seen), layers.all(layers.plain))
    assert seen == {"joined": 0, "siblings": 0}


# ---- borders: as many slots and ranks as they take --------------------------------------------------------------------


def crowded(count: int, largest: int, *, apart: int = 1) -> list[dict[int, int]]:
    """Ranks of `count` layers that fill a border of theirs: 1 each, but for the first slots that a layer has.

    `apart`: a layer has every so many-th slot.
    """
    ranks: list[dict[int, int]] = []
    for which in range(count):
        mine = dict.fromkeys(range(which, border_writing.MOST_SLOTS, apart), 1)
        left = border_writing.WIDEST // count - FIRST - len(mine)
        for slot in mine:
            more = min(left, largest - 1)
            mine[slot], left = 1 + more, left - more
        ranks.append(mine)
    return ranks


@pytest.mark.parametrize(("count", "dtype"), [(1, FP32), (2, BF16), (3, FP32), (4, FP16)], ids=str)
def test_joined(count: int, dtype: torch.dtype, device: torch.device) -> None:
    ranks, seen = crowded(count, siblings.WIDEST, apart=(1, 2, 3, 8)[count - 1]), {}
    sizes = [(20, 9 + 4 * which) for which in range(count)]
    layers = layers_of(device, dtype, ranks, sizes, border_writing.MOST_SLOTS, gap=0)
    layers.bordered(wide_weights.joined, [f"joined:{which}/{count}" for which in range(count)])
    layers.check(test_joined_layers.compiled(layers.all(layers.one), seen), layers.all(layers.plain))
    assert seen == {"joined": count, "siblings": 0}


# ---- gated MLPs -------------------------------------------------------------------------------------------------------

INPUTS, MIDDLE = 24, 32
SIZES = [(INPUTS, MIDDLE), (INPUTS, MIDDLE), (MIDDLE, INPUTS)]


def mlp(one: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """down(act(gate(x)) · up(x))."""
    return lambda x: one(2, F.silu(one(0, x)) * one(1, x))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_mlp_with_borders(dtype: torch.dtype, device: torch.device) -> None:
    ranks, seen = crowded(1, gated_mlp.WIDEST_RANK) * 3, {}
    layers = layers_of(device, dtype, ranks, SIZES, border_writing.MOST_SLOTS, gap=0)
    layers.bordered(wide_weights.mlp, ["bordered:before", "bordered:behind", "bordered:below"])
    layers.check(test_grouping.compiled(mlp(layers.one), True, seen), mlp(layers.plain), by=2)
    assert seen == {"mlps": 1, "siblings": 0, "onto": 0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
def test_mlp_over_fp8(dtype: torch.dtype, dequantised: None, device: torch.device) -> None:
    """With any number of slots, which have up to 16 ranks each."""
    ranks, seen = [ranks_of(which, gated_mlp.WIDEST_RANK, SLOTS) for which in range(3)], {}
    layers = layers_of(device, dtype, ranks, SIZES, storage="fp8")
    layers.check(test_grouping.compiled(mlp(layers.one), True, seen), mlp(layers.plain), by=2)
    assert seen == {"mlps": 1, "siblings": 0, "onto": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("largest", "together"), [(gated_mlp.WIDEST_RANK + 1, 2), (512, 0)])
def test_mlp_over_fp8_with_a_slot_of_more_ranks_stays_layers(
    largest: int, together: int, dequantised: None, device: torch.device
) -> None:
    ranks, seen = [{slot: 1 + slot % 3 for slot in range(20)} | {2: largest, 7: largest} for _ in range(3)], {}
    layers = layers_of(device, FP32, ranks, SIZES, 20, storage="fp8")
    layers.check(test_grouping.compiled(mlp(layers.one), True, seen), mlp(layers.plain))
    assert seen == {"mlps": 0, "siblings": together}


@pytest.mark.parametrize(("split", "dtype"), [(False, FP32), (True, FP16)], ids=str)
def test_rows_are_rounded(split: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For fp8 units: two layers' rows at once, with their narrow products and gradients of B. `split`: along the features."""
    if split:
        monkeypatch.setattr(rounding, "SHORTEST_SHARE", 64)
        monkeypatch.setattr(rounding, "PROGRAMS", 10**6)
    ranks = [ranks_of(which, gated_mlp.WIDEST_RANK, SLOTS) for which in range(2)]
    layers = layers_of(device, dtype, ranks, [(8, 150 if split else 48)] * 2)
    wide, given = [p.dy_NO for p in layers.problems], (layers.tables, layers.ranks, layers.scalings)
    Bs, maxima = [B.detach() for B in layers.Bs], torch.stack([noted(x, layers.tables) for x in wide])
    xas = [
        lora.shrink(p.x_NI, p.A, layers.tables, ranks_P2, scaling_P, layers.width)
        for p, ranks_P2, scaling_P in zip(layers.problems, layers.ranks, layers.scalings, strict=True)
    ]
    rounded, narrow = rounding.round_and_shrink(wide, maxima, Bs, *given, layers.width)
    through, dBs, narrow_too = rounding.round_outer_and_shrink(wide, maxima, xas, Bs, *given)
    for which, p in enumerate(layers.problems):
        right = expected(p)
        same_rows(rounded[which], wide[which])
        same_rows(through[which], wide[which])
        for small in (narrow[which], narrow_too[which]):
            close(
                "x",
                lora.change(small, p.A, None, layers.tables, layers.ranks[which]).double().cpu(),
                right["x"],
                TOLERANCES[dtype],
            )
        mine = {slot: right["B"][first : first + rank] for slot, (first, rank) in p.spots.items()}
        close_by_rank("B", p, dBs[which].double().cpu(), mine, TOLERANCES[dtype])
