"""Gated MLPs over an fp8 base as two ops against their three layers one after the other: outputs and all gradients.

A CPU has no fp8 units: products dequantise there, so results equal the layers' to rounding. With `units` they are emulated, in
the ops and in the layers alike, and what kernels round is held to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from lorabank.kernels import fp8
from lorabank.kernels.gpu import gated, lora, rounding
from lorabank.kernels.tables import RouteTables
from tests.kernels.gpu import test_grouping
from tests.kernels.gpu.problems import bf16_dots, poisoned  # noqa: F401
from tests.kernels.gpu.test_grouping import WIDTH, Layer, close, compiled, drawn, run, tables

pytestmark = [  # numpy, inside the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
INPUTS, MIDDLE = 32, 64
NAN = float("nan")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ROUTES: list[dict[int, list[int]] | None] = [None, {}, {0: [0, 1, 2, 3, 4]}, {1: [4], 0: [0, 2], 2: [1, 3]}]
Fp8Units = bool


class Mlp:
    """Three layers over an fp8 base."""

    def __init__(self, device: torch.device, *, inputs: int = INPUTS, middle: int = MIDDLE, outputs: int | None = None) -> None:
        sizes = [(inputs, middle), (inputs, middle), (middle, outputs or inputs)]
        self.layers = [Layer(*size, seed, device) for seed, size in enumerate(sizes)]
        self.bases = [fp8.quantize_weight(layer.weight) for layer in self.layers]

    def __call__(self, x: Tensor, batch: RouteTables, act: Callable[[Tensor], Tensor], drops: Any = None) -> Tensor:
        """What a block's trace has before the passes."""

        def layer(which: int, x: Tensor) -> Tensor:
            one, given = self.layers[which], [] if drops is None else [*drops.tensors, self.layers[which].odds]
            return torch.ops.lorabank.lora_linear(
                x, self.bases[which], None, one.A, one.B, one.ranks, one.scaling, *batch.tensors, "fp8", WIDTH, given
            )[0]

        return layer(2, act(layer(0, x)) * layer(1, x))


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(5, 7, INPUTS, generator=torch.Generator().manual_seed(9)).to(device)


@pytest.fixture(autouse=True)
def e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts numbers off where GPUs round them, and loses NaN."""
    if torch.cuda.is_available():
        return
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != interpreter.tl.float32 or target != interpreter.tl.float8e4nv:
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).to(fp8.E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(params=[False, True], ids=["dequantised", "units"])
def units(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fp8Units]:
    """Whether products go through fp8 units: those of the GPU, or an emulation. For `close`, how exact results are."""
    has = fp8.runs_on(device)
    if has and not request.param:
        pytest.skip("this device has fp8 units")
    if request.param and not has:
        monkeypatch.setattr(fp8, "runs_on", lambda device: True)
        monkeypatch.setattr(fp8, "multiply", _multiply)
    yield request.param


def _multiply(rows: Tensor, scale: Tensor, weight_FK: Tensor, scale_F: Tensor, bias: Tensor | None = None) -> Tensor:
    assert bias is None
    return (rows.float() @ weight_FK.float().t() * scale[:, None] * scale_F).bfloat16()


def near(found: list[Tensor], expected: list[Tensor], units: Fp8Units) -> None:
    """Equal to rounding; with units that of e4m3, where a number may fall to either side."""
    if not units:
        close(found, expected)
        return
    assert len(found) == len(expected)
    for i, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == other.shape
        assert not other.numel() or float((mine - other).norm()) <= 2e-2 * float(other.norm()), i


def rows_of(*shape: int, seed: int = 0, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same_rows(found: rounding.Rounded, x: Tensor) -> None:
    """As `fp8.quantize_rows`: the same scales, and numbers that differ at most where they fall between two of e4m3."""
    values, scale = fp8.quantize_rows(x)
    torch.testing.assert_close(found[1], scale, rtol=1e-6, atol=0, equal_nan=True)
    finite = scale.isfinite()
    mine, other = found[0][finite].view(torch.uint8).int(), values[finite].view(torch.uint8).int()
    assert int((mine - other).abs().max()) <= 1
    assert float((mine != other).float().mean()) < 1e-3
    assert fp8.dequantize_rows(*found, torch.float32)[~finite].isnan().any(-1).all()


def noted(x: Tensor, batch: RouteTables) -> Tensor:
    """The maxima of rows as kernels note them."""
    return x.float().abs().amax(-1).view(torch.int32)[batch.order_N.long()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [16, 48, 300])
@pytest.mark.parametrize("held", [True, False])
def test_rows_are_rounded(
    held: bool, features: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "WHOLE_ROW", 4096 if held else 16)
    x = rows_of(7, features, device=device, dtype=dtype)
    x[1], x[2, 3], x[3, 4], x[4] = 0, NAN, float("inf"), x[4] * 1e30
    same_rows(rounding.quantize(x), x)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("programs", [1, 16])
@pytest.mark.parametrize("rows", ROUTES)
def test_rows_are_rounded_with_their_narrow_products(
    rows: dict[int, list[int]] | None, programs: int, layers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "PROGRAMS", programs)
    monkeypatch.setattr(rounding, "SHORTEST_SHARE", 100)
    batch, parts = tables(device, rows), [Layer(8, 304, i, device) for i in range(layers)]
    xs = [rows_of(35, 304, seed=i, device=device) for i in range(layers)]
    xs[0][8, 5] = NAN
    xas = [rows_of(35, WIDTH, seed=5 + i, device=device) for i in range(layers)]
    maxima = torch.stack([noted(x, batch) for x in xs])
    Bs, ranks, scalings = ([getattr(part, name) for part in parts] for name in ("B", "ranks", "scaling"))
    Bs = [B.detach() for B in Bs]
    dBs, narrow = lora.outer_and_shrink(xas, xs, Bs, batch, ranks, scalings)
    rounded, mine = rounding.round_and_shrink(xs, maxima, Bs, batch, ranks, scalings, WIDTH)
    through, mine_dBs, mine_through = rounding.round_outer_and_shrink(xs, maxima, xas, Bs, batch, ranks, scalings)
    for i, x in enumerate(xs):
        same_rows(rounded[i], x)
        same_rows(through[i], x)
        for found, expected in ((mine[i], narrow[i]), (mine_through[i], narrow[i])):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(mine_dBs[i], dBs[i], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("outers", [1, 3])
@pytest.mark.parametrize(
    ("rows", "activation", "again"),
    [*((rows, "silu", False) for rows in ROUTES), (None, "silu", True), (None, "gelu_tanh", False)],
)
def test_a_gated_mlp_equals_its_layers(
    rows: dict[int, list[int]] | None, activation: str, again: bool, outers: int, units: Fp8Units, x: Tensor,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if outers == 1 and not units:
        pytest.skip("goes with rounding")
    monkeypatch.setattr(gated, "OUTERS", outers)
    mlp, batch, act, seen = Mlp(device), tables(device, rows), ACTIVATIONS[activation], {}
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, act))
    joint = compiled(lambda x: mlp(x, batch, act), True, seen, again=again)
    for _ in range(2):
        near(run(mlp.layers, x, joint), expected, units)
    assert seen == {"mlps": 1, "siblings": 0, "onto": 0}


@pytest.mark.parametrize("rows", [None, {}])
def test_a_residual_is_added_by_the_op(
    rows: dict[int, list[int]] | None, units: Fp8Units, x: Tensor, device: torch.device
) -> None:
    """For rows of the base, too."""
    mlp, batch, seen = Mlp(device), tables(device, rows), {}

    def block(x: Tensor) -> Tensor:
        return (x.sin() + mlp(x, batch, F.silu)).tanh()

    near(run(mlp.layers, x, compiled(block, True, seen)), run(mlp.layers, x, block), units)
    assert seen == {"mlps": 1, "siblings": 0, "onto": 1}


def test_in_bf16(units: Fp8Units, device: torch.device) -> None:
    mlp, batch = Mlp(device), tables(device)
    x = rows_of(5, 7, INPUTS, seed=1, device=device, dtype=torch.bfloat16)
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, F.silu))
    for mine, other in zip(run(mlp.layers, x, compiled(lambda x: mlp(x, batch, F.silu), True, {})), expected, strict=True):
        assert mine.dtype == other.dtype
        assert float((mine - other).norm()) <= 4e-2 * float(other.norm())


def test_without_gradient_of_x(units: Fp8Units, x: Tensor, device: torch.device) -> None:
    mlp, batch = Mlp(device), tables(device)

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        return [gradient for layer in mlp.layers for gradient in layer.gradients()]

    expected = gradients(lambda x: mlp(x, batch, F.silu))
    near(gradients(compiled(lambda x: mlp(x, batch, F.silu), True, {})), expected, units)


def test_odd_sizes(units: Fp8Units, device: torch.device) -> None:
    """Neither features nor tokens fill a block."""
    mlp, batch = Mlp(device, inputs=160, middle=288), tables(device)
    x = rows_of(5, 7, 160, seed=1, device=device)
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, F.silu))
    near(run(mlp.layers, x, compiled(lambda x: mlp(x, batch, F.silu), True, {})), expected, units)


def test_several_tiles_and_chunks(units: Fp8Units, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_grouping, "TOKENS", 71)
    mlp, batch = Mlp(device), tables(device)
    x = rows_of(5, 71, INPUTS, seed=1, device=device)
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, F.silu))
    near(run(mlp.layers, x, compiled(lambda x: mlp(x, batch, F.silu), True, {})), expected, units)


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("leaf", ["A", "B"])
def test_what_is_not_finite_stays_with_its_slot(
    number: float, which: int, leaf: str, units: Fp8Units, x: Tensor, device: torch.device
) -> None:
    """Law 4: rows of others and their gradients are the same bits; the slot's own aren't finite."""
    mlp, batch = Mlp(device), tables(device, {0: [0, 3], 2: [1]})
    function = compiled(lambda x: mlp(x, batch, F.silu), True, {})
    x = x.requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), device=device).view(x.shape)

    def found() -> tuple[Tensor, Tensor, list[Tensor]]:
        y = function(x)
        (y * weights)[[1, 2, 4]].sum().backward()  # a loss that isn't finite stays with its rows
        assert x.grad is not None
        dx, x.grad = x.grad, None
        grads = [tensor.grad for layer in mlp.layers for tensor in (layer.A, layer.B)]
        for layer in mlp.layers:
            layer.A.grad = layer.B.grad = None
        return y.detach(), dx, [g for g in grads if g is not None]

    y, dx, grads = found()
    layer = mlp.layers[which]
    with torch.no_grad():
        getattr(layer, leaf)[layer.ranks[0, 0] + 1, 3] = number
    y_now, dx_now, grads_now = found()
    for mine, before in ((y_now, y), (dx_now, dx)):
        assert torch.equal(mine[[1, 2, 4]], before[[1, 2, 4]])
    assert not y_now[[0, 3]].isfinite().all(-1).any()
    for i, (before, now) in enumerate(zip(grads, grads_now, strict=True)):
        start, rank = mlp.layers[i // 2].ranks[2].tolist()
        assert torch.equal(before[start : start + rank], now[start : start + rank])


def test_saved_tensors_that_come_back_as_copies(units: Fp8Units, x: Tensor, device: torch.device) -> None:
    """As under save_on_cpu."""
    mlp, batch = Mlp(device), tables(device)
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, F.silu))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):
        near(run(mlp.layers, x, compiled(lambda x: mlp(x, batch, F.silu), True, {})), expected, units)


def test_a_last_layer_of_another_size_stays_a_layer(x: Tensor, device: torch.device) -> None:
    mlp, batch, seen = Mlp(device, outputs=96), tables(device), {}
    expected = run(mlp.layers, x, lambda x: mlp(x, batch, F.silu))
    close(run(mlp.layers, x, compiled(lambda x: mlp(x, batch, F.silu), True, seen)), expected)
    assert seen == {"mlps": 0, "siblings": 2}


def test_what_the_op_does_not_do_stays_layers(x: Tensor, device: torch.device) -> None:
    mlp, batch, seen = Mlp(device), tables(device), {}
    drops = drawn(batch)
    for function in (lambda x: mlp(x, batch, F.silu, drops), lambda x: mlp(x, batch, torch.tanh)):
        expected = run(mlp.layers, x, function)
        close(run(mlp.layers, x, compiled(function, True, seen)), expected)
        assert seen == {"mlps": 0, "siblings": 2}
