"""Layers whose joined weights carry a border against the layers one after the other: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from lorabank.kernels.gpu import border_writing, bordered, grouping
from lorabank.kernels.tables import RouteTables
from tests.kernels.gpu.problems import poisoned  # noqa: F401
from tests.kernels.gpu.test_grouping import CAPACITY, INPUTS, TOKENS, UNITS, WIDTH, Layer, close, drawn, run, stays_alone, tables

pytestmark = [  # numpy, inside the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
NAN = float("nan")
SIZES = (36, 12, 20, 8)
ROUTES: list[dict[int, list[int]] | None] = [None, {}, {0: [0, 1, 2, 3, 4]}, {1: [4], 0: [0, 2], 2: [1, 3]}]


class Joined:
    """Layers that read one x, and the same with a border."""

    def __init__(self, device: torch.device, count: int, *, bias: bool = False, inputs: int = INPUTS) -> None:
        self.layers = [Layer(inputs, SIZES[i], i, device, bias=bias) for i in range(count)]
        self.pad = border_writing.border_width(CAPACITY * count)
        self.share = self.pad // count
        self.wide = [torch.full((size, inputs + self.pad), NAN, device=device) for size in SIZES[:count]]
        for wide in self.wide:
            wide[:, inputs:] = 0  # of the others' columns
        self.shadow = torch.full((self.pad, inputs), NAN, device=device)
        self.poison = border_writing.poison_like(self.layers[0].ranks, count, max(SIZES))
        self.poisons = self.poison.unbind()
        self.views = [wide[:, :inputs] for wide in self.wide]
        self.borders = [wide[:, inputs + i * self.share : inputs + (i + 1) * self.share] for i, wide in enumerate(self.wide)]
        for view, layer in zip(self.views, self.layers, strict=True):
            view.copy_(layer.weight)

    def write(self) -> None:
        """Fill border and shadow from the adapters."""
        border_writing.write(
            [
                border_writing.Border(
                    border=self.borders[i], leaf=layer.B.detach(), other=layer.A.detach(), ranks=layer.ranks,
                    shadow=self.shadow[i * self.share : (i + 1) * self.share], poison=self.poisons[i], rows=CAPACITY,
                )
                for i, layer in enumerate(self.layers)
            ]
        )  # fmt: skip

    def plain(self, x: Tensor, batch: RouteTables, given: Any = None) -> list[Tensor]:
        """One layer after the other."""
        return [layer(x, batch, given) for layer in self.layers]

    def with_border(self, x: Tensor, batch: RouteTables, drops: list[Tensor] | None = None) -> list[Tensor]:
        """What a block's trace has before the passes."""
        return [self.one(i, x, batch, drops) for i in range(len(self.layers))]

    def one(self, i: int, x: Tensor, batch: RouteTables, drops: list[Tensor] | None = None) -> Tensor:
        """The i-th of these."""
        layer, storage = self.layers[i], f"joined:{i}/{len(self.layers)}"
        base = [self.views[i], self.wide[i], self.shadow, self.poisons[i]]
        given, scaling = ([], layer.scaling) if drops is None else ([*drops, layer.odds], layer.kept_scaling)
        return torch.ops.lorabank.lora_linear(
            x, base, layer.bias, layer.A, layer.B, layer.ranks, scaling, *batch.tensors, storage, WIDTH, given
        )[0]


def together(ys: list[Tensor]) -> Tensor:
    """A value that all layers have a part in, whose gradients differ."""
    first = ys[0].tanh()
    return torch.cat([first, *(y * first.mean(-1, keepdim=True) for y in ys[1:])], -1)


def compiled(function: Callable[..., Tensor], seen: dict[str, int]) -> Callable[..., Tensor]:
    """The function through the passes; `seen` counts what they did."""

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        seen["joined"] = grouping.join_layers(module)
        seen["siblings"] = grouping.group_siblings(module)
        return lookup_backend("aot_eager")(module, inputs)  # pyright: ignore[reportCallIssue]

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(UNITS, TOKENS, INPUTS, generator=torch.Generator().manual_seed(9)).to(device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROUTES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_joined_layers_equal_one_after_the_other(
    count: int, rows: dict[int, list[int]] | None, bias: bool, x: Tensor, device: torch.device
) -> None:
    joined, batch, seen = Joined(device, count, bias=bias), tables(device, rows), {}
    joined.write()
    expected = run(joined.layers, x, lambda x: together(joined.plain(x, batch)))
    function = compiled(lambda x: together(joined.with_border(x, batch)), seen)
    for _ in range(2):
        close(run(joined.layers, x, function), expected)
    assert seen == {"joined": count, "siblings": 0}


def test_odd_sizes(device: torch.device) -> None:
    """Neither features nor tokens fill a block."""
    joined, batch = Joined(device, 3, inputs=300), tables(device)
    joined.write()
    x = torch.randn(UNITS, TOKENS, 300, generator=torch.Generator().manual_seed(1)).to(device)
    expected = run(joined.layers, x, lambda x: together(joined.plain(x, batch)))
    close(run(joined.layers, x, compiled(lambda x: together(joined.with_border(x, batch)), {})), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", ROUTES)
def test_a_border_made_in_parts_is_that_made_at_once(rows: dict[int, list[int]] | None, count: int, device: torch.device) -> None:
    """As x of many features is, in half precision; here in fp32, so that both are close."""
    joined, batch = Joined(device, count, inputs=300), tables(device, rows)
    joined.write()
    x = torch.randn(UNITS * TOKENS, 300, generator=torch.Generator().manual_seed(1)).to(device)
    lists = [layer.ranks for layer in joined.layers], [layer.scaling for layer in joined.layers], joined.poisons
    ranks, scalings, poison = lists
    group = bordered.Group(
        shadow=joined.shadow, ranks=ranks, scalings=scalings, poison=poison, width=WIDTH, pads=joined.pad, share=joined.share
    )
    whole, narrow = group.widen(x, batch)
    parts, narrow_too = group.widen(x, batch, shape=(16, 64, 2, 2, 3))
    torch.testing.assert_close(parts, whole, rtol=2e-5, atol=2e-5)
    for mine, other, layer in zip(narrow_too, narrow, joined.layers, strict=True):
        for slot, first, entries, _ in batch.tiles_S4.tolist():
            if slot >= 0:
                made, place = slice(first, first + entries), int(layer.ranks[slot, 1])
                torch.testing.assert_close(mine[made, :place], other[made, :place], rtol=2e-5, atol=2e-5)


def test_without_gradient_of_x(x: Tensor, device: torch.device) -> None:
    joined, batch = Joined(device, 3), tables(device)
    joined.write()

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        return [gradient for layer in joined.layers for gradient in layer.gradients()]

    expected = gradients(lambda x: together(joined.plain(x, batch)))
    close(gradients(compiled(lambda x: together(joined.with_border(x, batch)), {})), expected)


def test_saved_tensors_that_come_back_as_copies(x: Tensor, device: torch.device) -> None:
    """As under save_on_cpu: nothing may be read off where a tensor lies."""
    joined, batch = Joined(device, 3), tables(device)
    joined.write()
    expected = run(joined.layers, x, lambda x: together(joined.plain(x, batch)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):
        close(run(joined.layers, x, compiled(lambda x: together(joined.with_border(x, batch)), {})), expected)


def test_layers_that_read_something_else_stay_layers(x: Tensor, device: torch.device) -> None:
    """Cross-attention: queries of one input, keys and values of another. The weights are views with longer rows then."""
    joined, batch, seen = Joined(device, 3), tables(device), {}
    joined.write()

    def crossed(layers: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        other = x * 2 - 1
        return together([layers(0, x), layers(1, other), layers(2, other)])

    expected = run(joined.layers, x, lambda x: crossed(lambda i, x: joined.layers[i](x, batch), x))
    close(run(joined.layers, x, compiled(lambda x: crossed(lambda i, x: joined.one(i, x, batch), x), seen)), expected)
    assert seen == {"joined": 0, "siblings": 2}


def test_dropout_stays_with_layers(x: Tensor, device: torch.device) -> None:
    joined, batch, seen = Joined(device, 3), tables(device), {}
    joined.write()
    drops = drawn(batch)
    expected = run(joined.layers, x, lambda x: together(joined.plain(x, batch, drops)))
    function = compiled(lambda x, *given: together(joined.with_border(x, batch, list(given))), seen)
    close(run(joined.layers, x, lambda x: function(x, *drops.tensors)), expected)
    assert seen == {"joined": 0, "siblings": 3}


def test_layers_that_come_to_their_x_late_stay_layers(x: Tensor, device: torch.device) -> None:
    """What a later layer takes isn't known yet where the first one stands."""
    joined, batch, seen = Joined(device, 2, bias=True), tables(device), {}
    joined.write()

    def late(first: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        y = first(0, x)
        return together([y, first(1, x * y.mean())])

    expected = run(joined.layers, x, lambda x: late(lambda i, x: joined.layers[i](x, batch), x))
    close(run(joined.layers, x, compiled(lambda x: late(lambda i, x: joined.one(i, x, batch), x), seen)), expected)
    assert seen["joined"] == 0


def test_a_border_has_the_slots_ranks_and_zeros(device: torch.device) -> None:
    """Spare rows of the capacity buffers aren't read (law 8)."""
    joined = Joined(device, 3)
    with torch.no_grad():
        for layer in joined.layers:
            used = [row for start, rank in layer.ranks.tolist() for row in range(start, start + rank)]
            spare = [row for row in range(CAPACITY) if row not in used]
            layer.A[spare] = NAN
            layer.B[spare] = NAN
    joined.write()
    for i, (layer, part) in enumerate(zip(joined.layers, joined.wide, strict=True)):
        expected = torch.zeros(joined.pad, SIZES[i], device=device)
        for start, rank in layer.ranks.tolist():
            mine = slice(i * joined.share + start, i * joined.share + start + rank)
            expected[mine] = layer.B[start : start + rank].detach()
            assert torch.equal(joined.shadow[mine], layer.A[start : start + rank])
        assert torch.equal(part[:, INPUTS:].t(), expected)
    assert torch.equal(joined.poison, torch.zeros_like(joined.poison))


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("leaf", ["A", "B"])
def test_what_is_not_finite_stays_with_its_slot(number: float, which: int, leaf: str, x: Tensor, device: torch.device) -> None:
    joined, batch = Joined(device, 3), tables(device, {0: [0, 3], 2: [1]})
    function = compiled(lambda x: together(joined.with_border(x, batch)), {})
    joined.write()

    def spoil() -> None:
        layer = joined.layers[which]
        with torch.no_grad():
            getattr(layer, leaf)[layer.ranks[0, 0] + 1, 3] = number
        joined.write()

    stays_alone(joined.layers, x, function, spoil)
