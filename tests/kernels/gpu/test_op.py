"""`lorabank::lora_linear` against the plain definition: y and the gradients of x, A and B, eager and under torch.compile.

On a machine without a GPU the op is a plain custom op around the interpreted kernels; with one, torch.compile sees through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabank.bank.fused import table_width
from lorabank.kernels import reference
from lorabank.kernels.gpu import op
from lorabank.kernels.segments import DropoutDraw, Segment, drop_threshold
from lorabank.kernels.tables import RouteTables, bits32, drop_tables, route_tables

TOLERANCE = 2e-5
"""fp32: the order of sums. Of a tensor's largest entry."""
INPUTS, OUTPUTS = 10, 6


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A frozen layer and its slots."""

    weight_OI: Tensor
    bias_O: Tensor | None
    storage: str
    A: Tensor
    B: Tensor
    spots: Mapping[int, tuple[int, int]]
    """Slot to (first row in A and B, rank)."""
    device: torch.device
    dropout: Mapping[int, float] = field(default_factory=dict)
    """Slot to its chance; empty: nothing drops."""
    step: int = 3

    def scaling(self, slot: int) -> float:
        return 0.5 + slot

    def draw(self, slot: int, rows: Sequence[int]) -> DropoutDraw:
        examples = 2 * torch.tensor(rows, device=self.device) + 11
        return DropoutDraw(probability=self.dropout[slot], seed=slot - 5, step=self.step, examples_U=examples)

    def drops(self, tables: RouteTables, units: int) -> list[Tensor]:
        """What the op draws them from."""
        if not self.dropout:
            return []
        odds = [[(slot - 5) & 0xFFFFFFFF, drop_threshold(self.dropout.get(slot, 0.0))] for slot in range(8)]
        batch = drop_tables(tables.order_N, len(tables.order_N) // units, [self.step] * 8, 2 * torch.arange(units) + 11)
        return [*batch.tensors, bits32(torch.tensor(odds)).to(self.device)]

    def arguments(self, x: Tensor, rows: Mapping[int, Sequence[int]]) -> tuple[Any, ...]:
        """Those of the op for a batch whose units are the first dimension of x."""
        tables = route_tables(rows, x.shape[0], x.numel() // x.shape[-1] // x.shape[0], 8).to(self.device)
        ranks = torch.tensor([self.spots.get(slot, (0, 0)) for slot in range(8)], dtype=torch.int32, device=self.device)
        scaling = torch.tensor([self.scaling(slot) / (1 - self.dropout.get(slot, 0.0)) for slot in range(8)], device=self.device)
        stored = self.weight_OI if self.storage == "linear" else self.weight_OI.t().contiguous()
        width = table_width(max(rank for _, rank in self.spots.values()))
        return (
            x,
            [stored],
            self.bias_O,
            self.A,
            self.B,
            ranks,
            scaling,
            *tables.tensors,
            self.storage,
            width,
            self.drops(tables, x.shape[0]),
        )

    def plain(self, x: Tensor, rows: Mapping[int, Sequence[int]]) -> Tensor:
        """The definition."""
        segments = []
        for slot, mine in rows.items():
            if slot in self.spots:
                first, rank = self.spots[slot]
                a, b = self.A[first : first + rank], self.B[first : first + rank]
                where = torch.tensor(mine, dtype=torch.int64, device=self.device)
                draw = self.draw(slot, mine) if self.dropout.get(slot) else None
                segments.append(Segment(rows=where, A_RI=a, B_RO=b, scaling=self.scaling(slot), dropout=draw))
        return reference.lora_linear(x, self.weight_OI, self.bias_O, segments, x.shape[0])


def make_layer(device: torch.device, storage: str = "linear", bias: bool = True, ranks: Mapping[int, int] | None = None) -> Layer:
    g = torch.Generator().manual_seed(0)
    spots, place = {}, 0
    for slot, rank in (ranks or {0: 3, 2: 5}).items():
        spots[slot] = (place, rank)
        place += rank

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    return Layer(
        weight_OI=values(OUTPUTS, INPUTS),
        bias_O=values(OUTPUTS) if bias else None,
        storage=storage,
        A=values(place, INPUTS).requires_grad_(),
        B=values(place, OUTPUTS).requires_grad_(),
        spots=spots,
        device=device,
    )


def make_x(device: torch.device, *shape: int, x_grad: bool = True) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_(x_grad)


ROWS: Mapping[int, Sequence[int]] = {2: [4, 0], 0: [1, 2]}
"""Of five: row 3 is the base's."""


def results(layer: Layer, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """y and the gradients for a fixed dy."""
    wanted = {name: leaf for name, leaf in {"x": x, "A": layer.A, "B": layer.B}.items() if leaf.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy, retain_graph=True)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, right in theirs.items():
        assert mine[name].shape == right.shape, name
        assert mine[name].dtype == right.dtype, name
        assert float((mine[name] - right).abs().max()) <= TOLERANCE * float(right.abs().max()), name


def compare(layer: Layer, x: Tensor, rows: Mapping[int, Sequence[int]], call: Callable[..., Any] | None = None) -> None:
    y, _ = (call or op.lora_linear)(*layer.arguments(x, rows))
    assert y.is_contiguous()
    assert_same(results(layer, y, x), results(layer, layer.plain(x, rows), x))


@pytest.mark.parametrize("storage", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2)])
@pytest.mark.parametrize("x_grad", [True, False])
def test_output_and_gradients(device: torch.device, storage: str, bias: bool, shape: tuple[int, ...], x_grad: bool) -> None:
    compare(make_layer(device, storage, bias), make_x(device, *shape, x_grad=x_grad), ROWS)


@pytest.mark.parametrize("ranks", [{0: 16, 2: 1}, {0: 17, 2: 70}])
@pytest.mark.parametrize("rows", [ROWS, {0: [0, 1, 2, 3, 4]}, {2: [3]}, {1: [2], 0: [0]}, {}])
def test_ranks_and_routes(device: torch.device, ranks: dict[int, int], rows: Mapping[int, Sequence[int]]) -> None:
    layer, x = make_layer(device, ranks=ranks), make_x(device, 5, 3)
    y, _ = op.lora_linear(*layer.arguments(x, rows))
    if any(slot in layer.spots for slot in rows):
        assert_same(results(layer, y, x), results(layer, layer.plain(x, rows), x))
        return
    mine = results(layer, y, x)
    assert_same({"y": mine["y"], "x": mine["x"]}, results(_frozen(layer), layer.plain(x, rows), x))
    assert mine["A"].eq(0).all()
    assert mine["B"].eq(0).all()


def _frozen(layer: Layer) -> Layer:
    """The same without anything to train."""
    return replace(layer, A=layer.A.detach(), B=layer.B.detach())


DROPPING = [{2: 0.5}, {0: 0.1, 2: 0.0}, {0: 0.3, 1: 0.9, 2: 0.7}]


@pytest.mark.parametrize("dropout", DROPPING)
@pytest.mark.parametrize("storage", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2)])
def test_dropout(device: torch.device, storage: str, shape: tuple[int, ...], dropout: Mapping[int, float]) -> None:
    layer, x = replace(make_layer(device, storage), dropout=dropout), make_x(device, *shape)
    compare(layer, x, ROWS)
    y, _ = op.lora_linear(*layer.arguments(x, ROWS))
    dry, _ = op.lora_linear(*replace(layer, dropout={}).arguments(x, ROWS))
    for slot, rows in ROWS.items():
        assert torch.equal(y[rows], dry[rows]) == (not dropout.get(slot)), slot
    assert torch.equal(y[3], dry[3])


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_with_dropout_another_draw_compiles_nothing(device: torch.device, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: torch.ops.lorabank.lora_linear(*args), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    layer, x = make_layer(device), make_x(device, 5, 3)
    compare(replace(layer, dropout=DROPPING[0]), x, ROWS, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, dropout in enumerate(DROPPING):
            compare(replace(layer, dropout=dropout, step=step), x, ROWS, compiled)


@pytest.mark.parametrize("storage", ["linear", "conv1d"])
def test_any_layout_of_x_and_dy(device: torch.device, storage: str) -> None:
    """A model that computes gate and up in one product hands over halves of rows; attention hands over transposed heads."""
    layer, g = make_layer(device, storage), torch.Generator().manual_seed(3)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    inputs = (
        values(5, 3, 2 * INPUTS)[..., INPUTS:],
        values(5, 2 * INPUTS)[:, :INPUTS],
        values(5, 3, INPUTS, 2)[..., 0],
        values(3, 5, INPUTS).transpose(0, 1),
        values(INPUTS, 5).t(),
        values(3, INPUTS).expand(5, 3, INPUTS),
    )
    for given in inputs:
        x = given.requires_grad_()
        y, _ = op.lora_linear(*layer.arguments(x, ROWS))
        plain = layer.plain(x, ROWS)
        assert_same(results(layer, y, x), results(layer, plain, x))
        for dy in (torch.ones(OUTPUTS, device=device).expand(y.shape), values(OUTPUTS, *y.shape[:-1]).movedim(0, -1)):
            leaves = (x, layer.A, layer.B)
            mine, theirs = (torch.autograd.grad(out, leaves, dy, retain_graph=True) for out in (y, plain))
            assert_same(dict(zip("xAB", mine, strict=True)), dict(zip("xAB", theirs, strict=True)))


@pytest.mark.parametrize("leaf", ["A", "B", "x"])
def test_one_gradient_alone(device: torch.device, leaf: str) -> None:
    layer, x = make_layer(device), make_x(device, 5, 3)
    wanted = {"A": layer.A, "B": layer.B, "x": x}[leaf]
    y, _ = op.lora_linear(*layer.arguments(x, ROWS))
    (mine,), (theirs,) = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, layer.plain(x, ROWS)))
    assert_same({leaf: mine}, {leaf: theirs})


def test_base_rows_are_the_bases(device: torch.device) -> None:
    layer, x = make_layer(device), make_x(device, 5, 3, x_grad=False)
    with torch.no_grad():
        y, _ = op.lora_linear(*layer.arguments(x, ROWS))
        base = torch.nn.functional.linear(x, layer.weight_OI, layer.bias_O)
    torch.testing.assert_close(y[3], base[3], rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.isclose(y[[0, 1, 2, 4]], base[[0, 1, 2, 4]]).all(-1).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_stays_alone(device: torch.device, poison: float) -> None:
    layer, x = make_layer(device), make_x(device, 5, 3)
    clean = results(layer, op.lora_linear(*layer.arguments(x, ROWS))[0], x)
    with torch.no_grad():
        layer.B[layer.spots[2][0]] = poison
    dirty = results(layer, op.lora_linear(*layer.arguments(x, ROWS))[0], x)
    for name in ("y", "x"):
        assert torch.equal(dirty[name][1:4], clean[name][1:4]), name
        assert not dirty[name][0].isfinite().all(), name
    for name in ("A", "B"):
        assert torch.equal(dirty[name][:3], clean[name][:3]), name


@pytest.mark.parametrize("storage", ["linear", "conv1d"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled(device: torch.device, storage: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(*arguments: Any) -> Any:
        return torch.ops.lorabank.lora_linear(*arguments)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    layer = make_layer(device, storage)
    for shape in ((5, 3), (5, 4)):
        for x_grad in (True, False):
            compare(layer, make_x(device, *shape, x_grad=x_grad), ROWS, compiled)


def test_compiled_with_work_around_it(device: torch.device) -> None:
    """What comes in as a strided view, and goes on being used."""
    torch._dynamo.reset()

    def call(wide: Tensor, *rest: Any) -> Tensor:
        y, _ = torch.ops.lorabank.lora_linear(torch.relu(wide)[..., INPUTS:], *rest)
        return y.sin() * 2

    layer = make_layer(device)
    wide = torch.randn(5, 3, 2 * INPUTS, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    _, *rest = layer.arguments(wide[..., INPUTS:].detach(), ROWS)
    mine = torch.compile(call, backend="aot_eager", fullgraph=True)(wide, *rest)
    theirs = layer.plain(torch.relu(wide)[..., INPUTS:], ROWS).sin() * 2
    assert_same(results(layer, mine, wide), results(layer, theirs, wide))


def _complete(device: torch.device, storage: str) -> tuple[Layer, Tensor, Mapping[int, Sequence[int]]]:
    """A call that leaves nothing unwritten: every row routed, every slot there, 16 ranks each."""
    return make_layer(device, storage, ranks={0: 16, 2: 16}), make_x(device, 5, 3), {2: [4, 0], 0: [1, 2, 3]}


@pytest.mark.parametrize("storage", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [{}, {0: 0.5}])
def test_the_forward_op_is_registered_right(device: torch.device, storage: str, dropout: Mapping[int, float]) -> None:
    layer, x, rows = _complete(device, storage)
    layer = replace(layer, dropout=dropout)
    torch.library.opcheck(op.lora_linear, layer.arguments(x, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", ["linear", "conv1d"])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dropout", [{}, {0: 0.5}])
def test_the_backward_op_is_registered_right(
    device: torch.device, storage: str, needs_dx: bool, turned: bool, dropout: Mapping[int, float]
) -> None:
    layer, x, rows = _complete(device, storage)
    layer = replace(layer, dropout=dropout)
    with torch.no_grad():
        if turned:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        x, base, _, A, B, *rest = layer.arguments(x, rows)
        y, xa = op.lora_linear(x, base, None, A, B, *rest)
        arguments = (torch.ones_like(y), x, xa, base, A.detach(), B.detach(), *rest, needs_dx)
        torch.library.opcheck(op.lora_linear_backward, arguments, atol=1e-5, rtol=1e-5)
