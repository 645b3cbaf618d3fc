"""Blocks that split a row into several ahead of their layers (Swin's windows), compiled as on a CPU, against plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from lorabank import BASE, AdapterBank
from lorabank.engine.compiling import repeated_blocks
from lorabank.errors import RoutingError
from tests.engine.pictures import EVEN, PADDED, swin
from tests.engine.tiny import clear, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look at its inputs
]
MIXED: list[Any] = ["a", BASE, "b"]


@pytest.fixture(autouse=True, scope="module")
def shared_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_pass(bank: AdapterBank, size: int, rows: int = 3) -> dict[str, Tensor]:
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))
    clear(bank)
    with bank.route(MIXED):
        y = bank.model(pixel_values=pixels).last_hidden_state
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), **{f"{name} {key}": g for name in "ab" for key, g in gradients(bank, name).items()}}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(expected) == 9
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("size", [EVEN, PADDED])
def test_blocks_that_torch_compiles_as_on_a_cpu(size: int) -> None:
    mine, plain = swin(size), one_pass(swin(size), size)
    for block in repeated_blocks(mine.model):
        block.compile(backend="aot_eager")
    check(one_pass(mine, size), plain)


def test_rows_that_are_not_the_routes_are_refused_in_compiled_blocks_too() -> None:
    mine = swin(EVEN)
    for block in repeated_blocks(mine.model):
        block.compile(backend="aot_eager")
    with pytest.raises(RoutingError, match=r"the route names 3 rows, and the module that folds them .* was given 6"):
        one_pass(mine, EVEN, rows=6)
