"""Adapters over a half-precision model on a GPU, outside of compiled blocks: rounded products against the definition in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank.bank.kinds import layer_kind
from lorabank.kernels import ops, reference
from lorabank.kernels.base import BASE_PRODUCTS
from lorabank.kernels.convolved import lora_conv, suits
from lorabank.kernels.precision import SHARE, outer
from lorabank.kernels.segments import Segment
from tests.kernels.cases import make_plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),  # backward's thread
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a norm: both sides take rounded inputs, one of them computes in fp32."""
ROWS = {
    "one": ([slice(0, 6)], [16]),
    "a run and another rank": ([slice(0, 2), slice(2, 4), slice(4, 5)], [16, 16, 5]),
    "gaps": ([slice(0, 1), slice(3, 5)], [8, 8]),
}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 40), (3 * SHARE, 48)),
    "linear of few tokens": (lambda: nn.Linear(48, 40), (7, 48)),
    "3 × 3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (16, 20, 20)),
    "1 × 1": (lambda: nn.Conv2d(16, 24, 1, bias=False), (16, 20, 20)),
    "1 × 1, strided": (lambda: nn.Conv2d(16, 24, 1, stride=2), (16, 20, 20)),
    "first": (lambda: nn.Conv2d(3, 24, 7, stride=2, padding=3), (3, 20, 20)),
}


def _segments(rows: str, sizes: tuple[int, int], device: str) -> list[Segment]:
    generator = torch.Generator().manual_seed(1)
    where, ranks = ROWS[rows]
    return [
        Segment(
            rows=mine,
            A_RI=(torch.randn(rank, sizes[0], generator=generator) / sizes[0] ** 0.5).to(device).requires_grad_(),
            B_RO=torch.randn(rank, sizes[1], generator=generator).to(device).requires_grad_(),
            scaling=0.5,
        )
        for mine, rank in zip(where, ranks, strict=True)
    ]


def _results(y: Tensor, x: Tensor, segments: list[Segment]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, torch.bfloat16)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    for i, segment in enumerate(segments):
        found |= {f"A{i}": segment.A_RI.grad, f"B{i}": segment.B_RO.grad}
    for key, value in found.items():
        assert value is not None, key
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_rounded_products_are_near_the_definition(name: str, rows: str, dtype: torch.dtype, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer: nn.Module = make().requires_grad_(False).to("cuda", dtype)
    kind = layer_kind(layer)
    assert kind is not None
    conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(6, *size, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
    x = x.contiguous(memory_format=order) if conv else x
    mine = _segments(rows, kind.features(layer), "cuda")
    own_x = x.clone().requires_grad_()
    plan = make_plan(mine, 6)
    if conv:
        assert suits(own_x, layer, kind.low_rank_map(layer), plan)
        y = lora_conv(own_x, layer, kind.low_rank_map(layer), plan)
    else:
        y = ops.lora_linear(own_x, (layer.weight,), layer.bias, BASE_PRODUCTS["linear"], plan)  # type: ignore[arg-type]
    found = _results(y, own_x, mine)
    if not conv:  # for a base that is called as it is
        again = [replace(s, A_RI=s.A_RI.detach().requires_grad_(), B_RO=s.B_RO.detach().requires_grad_()) for s in mine]
        other_x = x.clone().requires_grad_()
        added = _results(ops.add_lora(layer(other_x), other_x, make_plan(again, 6)), other_x, again)
        assert all(_distance(added[key], found[key]) < TOLERANCE[dtype] for key in found)
    wide = layer.float()
    twins = [replace(s, A_RI=s.A_RI.detach().requires_grad_(), B_RO=s.B_RO.detach().requires_grad_()) for s in mine]
    wide_x = x.float().contiguous().requires_grad_()
    if conv:
        expected_y = reference.add_mapped(wide(wide_x), wide_x, kind.low_rank_map(layer), twins, 6)
    else:
        expected_y = reference.add_lora(wide(wide_x), wide_x, twins, 6)
    expected = _results(expected_y, wide_x, twins)
    for key, wanted in expected.items():
        assert _distance(found[key], wanted) < TOLERANCE[dtype], key
    assert all(found[key].dtype == torch.float32 for key in found if key[0] in "AB")


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("count", [1, 7, SHARE, 3 * SHARE, 4099])
@pytest.mark.parametrize("ahead", [(), (3,)], ids=["one", "several"])
def test_sums_are_kept_in_fp32(count: int, ahead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(*ahead, count, 5, generator=generator).to("cuda", torch.bfloat16)
    right = torch.randn(*ahead, count, 9, generator=generator).to("cuda", torch.bfloat16)
    found = outer(left.mT, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (left.mT.double() @ right.double()).float(), rtol=1e-4, atol=1e-3)
