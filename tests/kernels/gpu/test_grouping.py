"""Ops for layers that belong together against the layers one after the other, and the passes that put the ops in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from lorabank.kernels.gpu import grouping, op, siblings
from lorabank.kernels.segments import drop_threshold
from lorabank.kernels.tables import DropTables, RouteTables, bits32, drop_tables, route_tables
from tests.kernels.gpu.problems import poisoned  # noqa: F401

UNITS, TOKENS, INPUTS, MIDDLE, CAPACITY, WIDTH = 5, 7, 20, 36, 24, 16
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning"
)  # numpy, inside the interpreter's sigmoid
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def tables(device: torch.device, rows: dict[int, list[int]] | None = None) -> RouteTables:
    """Slots 0 and 2 in use, slot 1 without tokens, rows 2 and 4 of the base."""
    return route_tables({0: [0, 3], 2: [1]} if rows is None else rows, UNITS, TOKENS, 3).to(device)


class Layer:
    """One adapted layer's tensors."""

    def __init__(self, inputs: int, outputs: int, seed: int, device: torch.device, *, bias: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weight = (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(device)
        self.bias = torch.randn(outputs, generator=g).to(device) if bias else None
        self.A = torch.randn(CAPACITY, inputs, generator=g).mul_(0.3).to(device).requires_grad_()
        self.B = torch.randn(CAPACITY, outputs, generator=g).mul_(0.3).to(device).requires_grad_()
        # slot 0 has another rank in each layer, so that nobody reads a neighbour's table
        self.ranks = torch.tensor([[0, 3 + seed % 3], [8, 2], [10, 11]], dtype=torch.int32, device=device)
        self.scaling = torch.tensor([2.0, 1.0, 0.5], device=device)

        chances = (0.5, 0.2, 0.0)
        self.kept_scaling = self.scaling / (1 - torch.tensor(chances, device=device))
        self.odds = bits32(torch.tensor([[seed, drop_threshold(chance)] for chance in chances])).to(device)

    def __call__(self, x: Tensor, batch: RouteTables, drops: DropTables | None = None) -> Tensor:
        """With `drops` slot 0 drops half and slot 2 nothing, each layer by a mask of its own."""
        scaling = self.scaling if drops is None else self.kept_scaling
        given = [] if drops is None else [*drops.tensors, self.odds]
        return torch.ops.lorabank.lora_linear(
            x, [self.weight], self.bias, self.A, self.B, self.ranks, scaling, *batch.tensors, "linear", WIDTH, given
        )[0]

    def gradients(self) -> list[Tensor]:
        """Of the rows that belong to a slot, and none left behind."""
        found = []
        for tensor in (self.A, self.B):
            assert tensor.grad is not None
            for start, rank in self.ranks.tolist():
                found.append(tensor.grad[start : start + rank].clone())
            tensor.grad = None
        return found


def drawn(batch: RouteTables, step: int = 0) -> DropTables:
    """What the batch's dropout is drawn from."""
    return drop_tables(batch.order_N, TOKENS, [step, 1, 2], torch.arange(UNITS))


def run(layers: list[Layer], x: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The function's value, and the gradients of x and of every layer."""
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    (y * weights).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(gradient for layer in layers for gradient in layer.gradients())]


def compiled(function: Callable[..., Tensor], mlps: bool, seen: dict[str, int], *, again: bool = False) -> Callable[..., Tensor]:
    """The function through the passes; `seen` counts what they did."""

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        if mlps:
            seen["mlps"] = grouping.fuse_mlps(module, again=again)
            ends = torch.ops.lorabank.lora_mlp_close, torch.ops.lorabank.lora_gated_close
            closed = [node for node in module.graph.nodes if node.target in ends]
            if closed:
                seen["onto"] = sum(node.args[0] is not None for node in closed)
        seen["siblings"] = grouping.group_siblings(module)
        return lookup_backend("aot_eager")(module, inputs)  # pyright: ignore[reportCallIssue]

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to rounding, one tensor after the other."""
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)


def stays_alone(layers: list[Layer], x: Tensor, function: Callable[[Tensor], Tensor], spoil: Callable[[], None]) -> None:
    """Law 4: after `spoil`, others' rows and slot 2's gradients are the same bits, and slot 0's rows aren't finite.

    Rows 0 and 3 are slot 0's, row 1 is slot 2's.
    """
    x = x.clone().requires_grad_()

    def found() -> tuple[Tensor, Tensor, list[Tensor]]:
        x.grad = None
        y = function(x)
        weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        (y * weights)[[1, 2, 4]].sum().backward()  # a loss that isn't finite stays with its rows
        assert x.grad is not None
        grads: list[Tensor] = []
        for layer in layers:
            start, rank = layer.ranks[2].tolist()
            for tensor in (layer.A, layer.B):
                assert tensor.grad is not None
                grads.append(tensor.grad[start : start + rank].clone())
                tensor.grad = None
        return y.detach(), x.grad, grads

    y, dx, grads = found()
    spoil()
    y_now, dx_now, grads_now = found()
    assert not y_now[[0, 3]].isfinite().all(-1).any()
    for before, now in (
        (y[[1, 2, 4]], y_now[[1, 2, 4]]),
        (dx[[1, 2, 4]], dx_now[[1, 2, 4]]),
        *zip(grads, grads_now, strict=True),
    ):
        assert torch.equal(before, now)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(UNITS, TOKENS, INPUTS, generator=torch.Generator().manual_seed(9)).to(device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_siblings_equal_one_layer_after_the_other(count: int, bias: bool, x: Tensor, device: torch.device) -> None:
    layers = [Layer(INPUTS, 12 + 4 * i, i, device, bias=bias) for i in range(count)]
    batch, seen = tables(device), {}

    def function(x: Tensor) -> Tensor:
        return torch.cat([layer(x, batch) for layer in layers], -1)

    expected = run(layers, x, function)
    close(run(layers, x, compiled(function, False, seen)), expected)
    assert seen["siblings"] == (0 if count == 1 else count)


@pytest.mark.parametrize("rows", [{}, {0: [0, 1, 2, 3, 4]}, {1: [4], 0: [0, 2], 2: [1, 3]}])
def test_siblings_under_other_routes(rows: dict[int, list[int]], x: Tensor, device: torch.device) -> None:
    layers = [Layer(INPUTS, 12, i, device) for i in range(3)]
    batch = tables(device, rows)

    def function(x: Tensor) -> Tensor:
        return layers[0](x, batch) * layers[1](x, batch) + layers[2](x, batch)

    close(run(layers, x, compiled(function, False, {})), run(layers, x, function))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_siblings_with_dropout_equal_one_layer_after_the_other(count: int, bias: bool, x: Tensor, device: torch.device) -> None:
    layers = [Layer(INPUTS, 12 + 4 * i, i, device, bias=bias) for i in range(count)]
    batch, seen = tables(device), {}

    def function(x: Tensor, *drops: Tensor) -> Tensor:
        return torch.cat([layer(x, batch, DropTables(*drops) if drops else None) for layer in layers], -1)

    joint = compiled(function, False, seen)
    for step in (0, 7):
        drops = drawn(batch, step).tensors
        expected = run(layers, x, lambda x, drops=drops: function(x, *drops))
        close(run(layers, x, lambda x, drops=drops: joint(x, *drops)), expected)
        assert seen == {"siblings": count}
    plain = run(layers, x, function)
    assert torch.equal(expected[0][[1, 2, 4]], plain[0][[1, 2, 4]])
    assert not torch.isclose(expected[0][[0, 3]], plain[0][[0, 3]]).all(-1).any()


def test_layers_with_dropout_are_no_siblings_of_layers_without(x: Tensor, device: torch.device) -> None:
    layers = [Layer(INPUTS, 12, i, device) for i in range(2)]
    batch, seen = tables(device), {}
    drops = drawn(batch)

    def function(x: Tensor) -> Tensor:
        return layers[0](x, batch, drops) + layers[1](x, batch)

    close(run(layers, x, compiled(function, False, seen)), run(layers, x, function))
    assert seen == {"siblings": 0}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rows", [{0: [0, 3], 2: [1]}, {}])
def test_several_input_gradients_are_added_in_the_pass_that_adds_the_change(
    rows: dict[int, list[int]], count: int, device: torch.device
) -> None:
    """Rows of the base too, which get no change."""
    layers, batch = [Layer(INPUTS, 12, i, device) for i in range(count)], tables(device, rows)
    generator = torch.Generator().manual_seed(3)
    narrow = [torch.randn(UNITS * TOKENS, WIDTH, generator=generator).to(device) for _ in layers]
    parts = [torch.randn(UNITS * TOKENS, INPUTS, generator=generator).to(device) for _ in layers]
    given = narrow, [layer.A.detach() for layer in layers], batch, [layer.ranks for layer in layers]
    onto = torch.stack(parts).sum(0)
    siblings.change(*given, out_NF=onto)
    found = siblings.change(*given, out_NF=parts[0], more=parts[1:])
    assert found is parts[0]
    torch.testing.assert_close(found, onto, **TOLERANCE)


def test_a_slot_that_is_not_finite_stays_alone_in_a_group(x: Tensor, device: torch.device) -> None:
    layers = [Layer(INPUTS, 12, i, device) for i in range(2)]
    batch = tables(device)

    def function(x: Tensor) -> Tensor:
        return torch.cat([layer(x, batch) for layer in layers], -1)

    clean = run(layers, x, function)
    with torch.no_grad():
        layers[0].B[layers[0].ranks[2, 0]] = float("nan")  # slot 2 has row 1
    dirty = run(layers, x, compiled(function, False, {}))
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(dirty[0][kept], clean[0][kept], **TOLERANCE)
    torch.testing.assert_close(dirty[1][kept], clean[1][kept], **TOLERANCE)
    assert dirty[0][1].isnan().any()
    for i in (2, 5, 8, 11):  # slot 0's part of A and B of either layer
        torch.testing.assert_close(dirty[i], clean[i], **TOLERANCE)


def test_the_backend_of_a_name_is_one_object() -> None:
    assert grouping.grouping("aot_eager", "all") is grouping.grouping("aot_eager", "all")
    assert op.lora_linear is not None


def test_weights_are_taken_out_of_what_they_lie_in_before_anything_else() -> None:
    """Views and sizes of inputs alone: what copies, or counts with anything but sizes, stays where it is."""

    def f(x: Tensor, wide: Tensor, index: Tensor) -> Tensor:
        y = x.mul_(2)
        weight = wide.narrow(1, wide.size()[1] - 3, 3)
        picked = x[index]
        return y @ weight + picked - (x - index)

    x, wide, index = torch.randn(3, 3), torch.randn(3, 5), torch.tensor([2, 0, 1])
    module = torch.fx.symbolic_trace(f)
    grouping.hoist_weights(module)
    module.graph.lint()
    targets = [node.target for node in module.graph.nodes if node.op.startswith("call")]
    assert targets[:4] == ["size", operator.getitem, operator.sub, "narrow"]
    assert targets[4:6] == ["mul_", operator.getitem]
    torch.testing.assert_close(module(x.clone(), wide, index), f(x.clone(), wide, index))
    assert grouping.hoist_weights(torch.fx.symbolic_trace(lambda: torch.ones(2))) is None


def test_weights_behind_a_border_too() -> None:
    """As torch.compile has them, where a size that varies is an input of its own."""
    seen: list[list[Any]] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        grouping.hoist_weights(module)
        seen.append([node.target for node in module.graph.nodes if node.op.startswith("call")])
        return module

    def f(x: Tensor, wide: Tensor, other: Tensor) -> Tensor:
        return torch.sin(x) @ wide.narrow(1, wide.shape[1] - 3, 3) + torch.cos(x) @ other.narrow(1, 0, 3)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend)
    for border in (2, 5):
        x, wide, other = torch.randn(3, 3), torch.randn(3, 3 + border), torch.randn(3, 4 + border)
        for tensor in (wide, other):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        torch.testing.assert_close(compiled(x, wide, other), f(x, wide, other))
    (targets,) = seen
    assert targets.index(torch.sin) == 3
    assert targets[:3].count("narrow") == 2
