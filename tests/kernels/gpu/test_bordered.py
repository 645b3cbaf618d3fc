"""Gated MLPs whose weights carry borders against their three layers one after the other: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.gpu import border_writing
from lorabank.kernels.tables import RouteTables
from tests.kernels.gpu.problems import poisoned  # noqa: F401
from tests.kernels.gpu.test_grouping import (
    CAPACITY,
    INPUTS,
    MIDDLE,
    WIDTH,
    Layer,
    close,
    compiled,
    drawn,
    run,
    stays_alone,
    tables,
)

pytestmark = [  # numpy, inside the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]
NAN = float("nan")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
SWAPPED = [False, True]


class Mlp:
    """Three layers, and the same with borders."""

    def __init__(self, device: torch.device, *, swapped: bool = False, inputs: int = INPUTS, middle: int = MIDDLE) -> None:
        """`swapped`: up's border comes before its weight, gate's behind it."""
        self.gate, self.up, self.down = (
            Layer(*sizes, seed, device) for seed, sizes in enumerate([(inputs, middle), (inputs, middle), (middle, inputs)])
        )
        self.layers = [self.gate, self.up, self.down]
        self.pad = border_writing.border_width(CAPACITY)
        left, right = (self.up, self.gate) if swapped else (self.gate, self.up)
        self.wide = {
            left: torch.full((middle, self.pad + inputs), NAN, device=device),
            right: torch.full((middle, inputs + self.pad), NAN, device=device),
            self.down: torch.full((inputs + self.pad, middle), NAN, device=device),
        }
        self.views = {
            left: self.wide[left][:, self.pad :],
            right: self.wide[right][:, :inputs],
            self.down: self.wide[self.down][:inputs],
        }
        borders = {
            left: self.wide[left][:, : self.pad],
            right: self.wide[right][:, inputs:],
            self.down: self.wide[self.down][inputs:],
        }
        self.borders = [borders[layer] for layer in self.layers]
        for layer, border in borders.items():  # as engine/borders.py makes them: nobody writes beyond the rows in use
            (border.t() if layer is self.down else border)[:, CAPACITY:] = 0
        for layer, view in self.views.items():
            view.copy_(layer.weight)
        self.poison = border_writing.poison_like(self.gate.ranks, 3, middle)
        both, last = torch.full((2 * self.pad, inputs), NAN, device=device), torch.full((self.pad, inputs), NAN, device=device)
        self.shadows = {left: both, right: both, self.down: last}
        self.mine = {left: both[: self.pad], right: both[self.pad :], self.down: last}
        self.poisons = self.poison.unbind()
        self.storages = {left: "bordered:before", right: "bordered:behind", self.down: "bordered:below"}

    def write(self) -> None:
        """Fill the borders from the adapters."""
        entries: list[border_writing.Border] = []
        for layer, border, poison in zip(self.layers, self.borders, self.poisons, strict=True):
            leaf, other = (layer.A, layer.B) if layer is self.down else (layer.B, layer.A)
            entries.append(
                border_writing.Border(
                    border=border.t() if layer is self.down else border, leaf=leaf.detach(), shadow=self.mine[layer],
                    other=other.detach(), ranks=layer.ranks, poison=poison, rows=CAPACITY,
                )
            )  # fmt: skip
        border_writing.write(entries)

    def plain(self, x: Tensor, batch: RouteTables, act: Callable[[Tensor], Tensor]) -> Tensor:
        """One layer after the other."""
        return self.down(act(self.gate(x, batch)) * self.up(x, batch), batch)

    def with_borders(self, x: Tensor, batch: RouteTables, act: Callable[[Tensor], Tensor]) -> Tensor:
        """What a block's trace has before the passes."""

        return self.one(2, act(self.one(0, x, batch)) * self.one(1, x, batch), batch)

    def one(self, which: int, x: Tensor, batch: RouteTables) -> Tensor:
        """One of the three layers of that."""
        layer = self.layers[which]
        base = [self.views[layer], self.wide[layer], self.shadows[layer], self.poisons[which]]
        return torch.ops.lorabank.lora_linear(
            x, base, None, layer.A, layer.B, layer.ranks, layer.scaling, *batch.tensors, self.storages[layer], WIDTH, []
        )[0]


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(5, 7, INPUTS, generator=torch.Generator().manual_seed(9)).to(device)


ROUTES: list[dict[int, list[int]] | None] = [None, {}, {0: [0, 1, 2, 3, 4]}, {1: [4], 0: [0, 2], 2: [1, 3]}]


@pytest.mark.parametrize("swapped", SWAPPED)
@pytest.mark.parametrize(("activation", "again"), [("silu", False), ("silu", True), ("gelu_tanh", False)])
@pytest.mark.parametrize("rows", ROUTES)
def test_a_gated_mlp_equals_its_layers(
    rows: dict[int, list[int]] | None, activation: str, again: bool, swapped: bool, x: Tensor, device: torch.device
) -> None:
    mlp, batch, act, seen = Mlp(device, swapped=swapped), tables(device, rows), ACTIVATIONS[activation], {}
    mlp.write()
    expected = run(mlp.layers, x, lambda x: mlp.plain(x, batch, act))
    joint = compiled(lambda x: mlp.with_borders(x, batch, act), True, seen, again=again)
    for _ in range(2):
        close(run(mlp.layers, x, joint), expected)
    assert seen == {"mlps": 1, "siblings": 0, "onto": 0}


@pytest.mark.parametrize("turned", [False, True])
def test_a_residual_is_added_by_the_op(turned: bool, x: Tensor, device: torch.device) -> None:
    """And only where nothing else becomes of y."""
    mlp, batch = Mlp(device), tables(device)
    mlp.write()

    def block(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        residual = x.sin()
        y = layers(x)
        return (y + residual if turned else residual + y).tanh()

    def twice(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = layers(x)
        return (x + y) * y.mean()

    for function, onto in ((block, True), (twice, False)):
        seen: dict[str, int] = {}
        expected = run(mlp.layers, x, lambda x, f=function: f(lambda x: mlp.plain(x, batch, F.silu), x))
        joint = compiled(lambda x, f=function: f(lambda x: mlp.with_borders(x, batch, F.silu), x), True, seen)
        close(run(mlp.layers, x, joint), expected)
        assert seen == {"mlps": 1, "siblings": 0, "onto": int(onto)}


def test_what_works_in_place_stays_where_it_is(x: Tensor, device: torch.device) -> None:
    """Nothing that changes a tensor without being read itself may go with the layers that an op takes the place of."""
    mlp, batch, places = Mlp(device), tables(device), torch.zeros(5, 7, 1, dtype=torch.int64, device=device)
    mlp.write()

    def around(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        mask = torch.zeros_like(x)
        mask.scatter_(2, places, 1.0)
        column = mask[..., 3]
        column += 0.5
        return layers(x) * mask

    seen: dict[str, int] = {}
    expected = run(mlp.layers, x, lambda x: around(lambda x: mlp.plain(x, batch, F.silu), x))
    close(run(mlp.layers, x, compiled(lambda x: around(lambda x: mlp.with_borders(x, batch, F.silu), x), True, seen)), expected)
    assert seen["mlps"] == 1

    def changed(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        x = x * 1.0
        g = layers[0](x)
        x.mul_(2.0)
        return layers[2](F.silu(g) * layers[1](x))

    plain = [lambda x, layer=layer: layer(x, batch) for layer in mlp.layers]
    with_borders = [lambda x, which=which: mlp.one(which, x, batch) for which in range(3)]
    seen.clear()
    with torch.no_grad():  # with gradients torch refuses it
        found = compiled(lambda x: changed(with_borders, x), True, seen)(x)
        close([found], [changed(plain, x)])
    assert seen == {"mlps": 0, "siblings": 0}


def test_without_gradient_of_x(x: Tensor, device: torch.device) -> None:
    mlp, batch = Mlp(device), tables(device)
    mlp.write()

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        return [gradient for layer in mlp.layers for gradient in layer.gradients()]

    expected = gradients(lambda x: mlp.plain(x, batch, F.silu))
    close(gradients(compiled(lambda x: mlp.with_borders(x, batch, F.silu), True, {})), expected)


def test_odd_sizes(device: torch.device) -> None:
    """Neither features nor tokens fill a block."""
    mlp, batch = Mlp(device, inputs=136, middle=300), tables(device)
    mlp.write()
    x = torch.randn(5, 7, 136, generator=torch.Generator().manual_seed(1)).to(device)
    expected = run(mlp.layers, x, lambda x: mlp.plain(x, batch, F.silu))
    close(run(mlp.layers, x, compiled(lambda x: mlp.with_borders(x, batch, F.silu), True, {})), expected)


@pytest.mark.parametrize("swapped", SWAPPED)
def test_saved_tensors_that_come_back_as_copies(swapped: bool, x: Tensor, device: torch.device) -> None:
    """As under save_on_cpu: nothing may be read off where a tensor lies."""
    mlp, batch = Mlp(device, swapped=swapped), tables(device)
    mlp.write()
    expected = run(mlp.layers, x, lambda x: mlp.plain(x, batch, F.silu))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):
        close(run(mlp.layers, x, compiled(lambda x: mlp.with_borders(x, batch, F.silu), True, {})), expected)


def test_a_number_that_is_too_large_for_the_bases_dtype(device: torch.device) -> None:
    """fp16 ends at 65,504: its slot is poisoned, and the border holds zero."""
    mlp = Mlp(device)
    with torch.no_grad():
        mlp.up.B[mlp.up.ranks[0, 0] + 1, 3] = 1e5
    mlp.borders = [border.half() for border in mlp.borders]
    mlp.write()
    assert all(border.isfinite().all() for border in mlp.borders)
    assert mlp.borders[1][3, mlp.up.ranks[0, 0] + 1] == 0
    assert [[bool(slot.isnan().any()) for slot in layer] for layer in mlp.poison] == [
        [False] * 3,
        [True, False, False],
        [False] * 3,
    ]


def test_borders_have_the_slots_ranks_and_zeros(device: torch.device) -> None:
    """Spare rows of the capacity buffers aren't read (law 8)."""
    mlp = Mlp(device)
    with torch.no_grad():
        for layer in mlp.layers:
            used = [row for start, rank in layer.ranks.tolist() for row in range(start, start + rank)]
            spare = [row for row in range(CAPACITY) if row not in used]
            layer.A[spare] = NAN
            layer.B[spare] = NAN
    mlp.write()
    for border, layer, source in zip(mlp.borders, mlp.layers, (mlp.gate.B, mlp.up.B, mlp.down.A), strict=True):
        border = border if layer is mlp.down else border.t()
        expected = torch.zeros_like(border)
        for start, rank in layer.ranks.tolist():
            expected[start : start + rank] = source[start : start + rank].detach()
        assert torch.equal(border, expected)
    assert torch.equal(mlp.poison, torch.zeros_like(mlp.poison))


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("leaf", ["A", "B"])
def test_what_is_not_finite_stays_with_its_slot(number: float, which: int, leaf: str, x: Tensor, device: torch.device) -> None:
    mlp, batch = Mlp(device), tables(device, {0: [0, 3], 2: [1]})
    function = compiled(lambda x: mlp.with_borders(x, batch, F.silu), True, {})
    mlp.write()

    def spoil() -> None:
        layer = mlp.layers[which]
        with torch.no_grad():
            getattr(layer, leaf)[layer.ranks[0, 0] + 1, 3] = number
        mlp.write()

    stays_alone(mlp.layers, x, function, spoil)


@pytest.mark.slow
def test_what_the_op_does_not_do_stays_layers(x: Tensor, device: torch.device) -> None:
    mlp, batch, seen = Mlp(device), tables(device), {}
    mlp.write()
    gate, up, down = mlp.layers
    drops = drawn(batch)

    def same(function: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor] | None = None) -> None:
        close(run(mlp.layers, x, compiled(function, True, seen)), run(mlp.layers, x, expected or function))
        assert seen == {"mlps": 0, "siblings": 2}

    same(lambda x: mlp.plain(x, batch, F.silu))  # no borders
    same(lambda x: down(F.silu(gate(x, batch, drops)) * up(x, batch, drops), batch, drops))  # dropout
    same(lambda x: mlp.with_borders(x, batch, torch.tanh), lambda x: mlp.plain(x, batch, torch.tanh))

    def read(layers: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Somebody else reads the activation."""
        kept: list[Tensor] = []

        def act(g: Tensor) -> Tensor:
            kept.append(F.silu(g))
            return kept[0]

        return layers(x, batch, act) + kept[0].sum()

    same(lambda x: read(mlp.with_borders, x), lambda x: read(mlp.plain, x))


def test_how_wide_borders_are() -> None:
    assert [border_writing.border_width(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 0]
