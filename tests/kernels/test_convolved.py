"""A convolution and its adapters in one node against the definition, outputs and gradients, in both of memory's orders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank.bank.kinds import layer_kind
from lorabank.errors import RoutingError
from lorabank.kernels import reference
from lorabank.kernels.convolved import lora_conv, suits
from lorabank.kernels.maps import ConvMap
from lorabank.kernels.segments import Segment
from tests.kernels.cases import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(4, 5, 3, padding=1), (4, 7)),
    "2-D": (lambda: nn.Conv2d(4, 5, 3, padding=1), (4, 5, 6)),
    "3-D": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 3, 4, 3)),
    "1 × 1": (lambda: nn.Conv2d(4, 5, 1, bias=False), (4, 3, 3)),
    "1 × 1 of one place": (lambda: nn.Conv2d(4, 5, 1), (4, 1, 1)),
    "one channel": (lambda: nn.Conv2d(1, 3, 3), (1, 5, 5)),
    "1 in 3-D": (lambda: nn.Conv3d(4, 5, 1), (4, 2, 3, 2)),
    "1 in 1-D": (lambda: nn.Conv1d(4, 5, 1), (4, 6)),
    "1 × 1, padded": (lambda: nn.Conv2d(4, 5, 1, padding=1), (4, 3, 3)),
    "1 × 1, strided": (lambda: nn.Conv2d(4, 5, 1, stride=2), (4, 5, 4)),
    "strided": (lambda: nn.Conv2d(4, 5, 3, stride=(2, 3), padding=(1, 2)), (4, 6, 7)),
    "dilated": (lambda: nn.Conv2d(4, 5, (3, 2), dilation=(2, 3), padding=2), (4, 6, 7)),
}
OTHERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 4)),
    "padded by reflection": (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"), (4, 5, 6)),
    "as large as its input": (lambda: nn.Conv2d(4, 5, (2, 4), padding="same"), (4, 5, 6)),
    "one sample": (lambda: nn.Conv2d(4, 5, 3), (4, 5, 6)),
}
ROWS: dict[str, tuple[list[slice], list[int], int, int]] = {
    "one slot for everything": ([slice(0, 1)], [2], 1, 3),
    "a run, and one of another rank": ([slice(0, 2), slice(2, 4), slice(4, 5)], [2, 2, 3], 5, 1),
    "a run of units of two samples": ([slice(0, 1), slice(1, 2)], [2, 2], 2, 2),
    "a base row between": ([slice(0, 1), slice(2, 4)], [2, 2], 4, 1),
    "the same rows twice": ([slice(0, 2), slice(0, 2)], [2, 2], 3, 1),
    "none": ([slice(1, 1), slice(1, 3)], [2, 2], 3, 1),
}
ORDERS = {"first": torch.contiguous_format, "last": torch.channels_last}


def case(name: str, rows: str, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, list[Segment], int]:
    torch.manual_seed(0)
    make, size = {**LAYERS, **OTHERS}[name]
    layer: nn.Module = make().requires_grad_(False).to(dtype)
    kind = layer_kind(layer)
    assert kind is not None
    fan_in, fan_out = kind.features(layer)
    where, ranks, units, samples = ROWS[rows]
    x = torch.randn(units * samples, *size, dtype=dtype) if name != "one sample" else torch.randn(size, dtype=dtype)
    segments = [
        Segment(
            rows=mine,
            A_RI=torch.randn(rank, fan_in, dtype=dtype),
            B_RO=torch.randn(rank, fan_out, dtype=dtype),
            scaling=0.5 + 0.5 * (rank == 3),
        )
        for mine, rank in zip(where, ranks, strict=True)
    ]
    return layer, x, segments, units


def the_map(layer: nn.Module) -> ConvMap:
    kind = layer_kind(layer)
    assert kind is not None
    found = kind.low_rank_map(layer)
    assert isinstance(found, ConvMap)
    return found


def run(
    layer: nn.Module, x: Tensor, segments: list[Segment], units: int, *, fast: bool, order: torch.memory_format
) -> dict[str, Tensor | None]:
    own = [replace(s, A_RI=s.A_RI.clone().requires_grad_(), B_RO=s.B_RO.clone().requires_grad_()) for s in segments]
    x = x.detach()
    x = (x.contiguous(memory_format=order) if x.ndim == 4 else x.clone()).requires_grad_()
    if fast:
        plan = make_plan(own, units)
        assert suits(x, layer, the_map(layer), plan)
        y = lora_conv(x, layer, the_map(layer), plan)
    else:
        y = reference.add_mapped(layer(x), x, the_map(layer), own, units)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    leaves = {f"A{i}": s.A_RI.grad for i, s in enumerate(own)} | {f"B{i}": s.B_RO.grad for i, s in enumerate(own)}
    return {"y": y.detach(), "x": x.grad, **leaves}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_node_is_the_definition(name: str, rows: str, order: str) -> None:
    given = case(name, rows)
    found, expected = (run(*given, fast=fast, order=ORDERS[order]) for fast in (True, False))
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        mine = found[key]
        assert mine is not None or wanted is None or not wanted.any(), key
        if mine is not None and wanted is not None:
            torch.testing.assert_close(mine, wanted, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("of", ["input", "weight"])
def test_channels_stay_last(of: str) -> None:
    """Or come to be, by the weight's order, as in torch's convolutions."""
    layer, x, segments, units = case("2-D", "one slot for everything")
    expected = run(layer, x, segments, units, fast=False, order=torch.contiguous_format)
    if of == "weight":
        layer = layer.to(memory_format=torch.channels_last)
    order = torch.channels_last if of == "input" else torch.contiguous_format
    found = run(layer, x, segments, units, fast=True, order=order)
    assert layer(x.contiguous(memory_format=order)).is_contiguous(memory_format=torch.channels_last)
    for key, wanted in expected.items():
        mine = found[key]
        assert mine is not None and wanted is not None
        torch.testing.assert_close(mine, wanted)
    assert found["y"] is not None
    assert found["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_left(name: str) -> None:
    layer, x, segments, units = case(name, "one slot for everything")
    assert not suits(x, layer, the_map(layer), make_plan(segments, units))


def test_a_map_that_is_not_the_layers_is_left() -> None:
    """Of an A that reaches over groups."""
    layer, x, segments, units = case("in groups", "one slot for everything")
    segments = [replace(s, A_RI=torch.randn(2, 4 * 9, dtype=x.dtype)) for s in segments]
    assert not suits(x, layer, replace(the_map(layer), groups=1), make_plan(segments, units))


@pytest.mark.parametrize("what", ["rows", "weights", "dtype", "weight's dtype"])
def test_other_calls_are_left(what: str) -> None:
    layer, x, segments, units = case("2-D", "a base row between", dtype=torch.float32)
    assert suits(x, layer, the_map(layer), make_plan(segments, units))
    if what == "rows":
        segments = [replace(s, rows=torch.arange(4)[s.rows]) for s in segments]
    elif what == "weights":
        segments = [replace(s, weights_U=torch.ones(len(range(*s.rows.indices(units))))) for s in segments]  # type: ignore[union-attr]
    else:
        x = x.double()
        layer = layer.double() if what == "dtype" else layer
    assert not suits(x, layer, the_map(layer), make_plan(segments, units))


@pytest.mark.parametrize("name", ["2-D", "1 × 1"])
def test_a_value_that_is_not_finite_stays_in_its_rows(name: str) -> None:
    layer, x, segments, units = case(name, "a run, and one of another rank")
    clean = run(layer, x, segments, units, fast=True, order=torch.channels_last)
    segments[0].A_RI[0, 0], segments[0].B_RO[1, 1] = torch.nan, torch.inf
    found = run(layer, x, segments, units, fast=True, order=torch.channels_last)
    y, before, dx, dx_before = found["y"], clean["y"], found["x"], clean["x"]
    assert y is not None and before is not None and dx is not None and dx_before is not None
    assert not y[:2].isfinite().all()
    assert torch.equal(y[2:], before[2:])
    assert torch.equal(dx[2:], dx_before[2:])
    for key in ("A1", "B1", "A2", "B2"):
        mine, wanted = found[key], clean[key]
        assert mine is not None and wanted is not None
        assert torch.equal(mine, wanted)


def test_another_route_in_backward_is_an_error() -> None:
    layer, x, segments, units = case("2-D", "one slot for everything")
    own = [replace(s, A_RI=s.A_RI.clone().requires_grad_()) for s in segments]
    plan = replace(make_plan(own, units), structure_now=lambda: 1)
    y = lora_conv(x, layer, the_map(layer), plan)
    with pytest.raises(RoutingError, match="adapters were added or removed between"):
        y.sum().backward()
