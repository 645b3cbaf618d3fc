"""Stacked experts through the grouped kernels against plain torch: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import DropoutState
from lorabank.bank.stacked.experts import LoRAExperts
from lorabank.kernels.gpu import runtime
from lorabank.kernels.gpu.stacked import pair_tables
from lorabank.kernels.tables import TILE, route_tables, slots_of_tokens
from tests.bank.tiny import MIXTURES, clear, gradients, two
from tests.bank.tiny import add as add_adapter
from tests.kernels.gpu.problems import bf16_dots, poisoned  # noqa: F401

SLOTS, EXPERTS = 3, 4


def _pairs(count: int, *, all_of_one: bool = False) -> tuple[Tensor, Tensor]:
    """(slot of each pair, −1 for none; its token), the pairs in the order of their experts."""
    generator = torch.Generator().manual_seed(count)
    slots = torch.randint(-1, SLOTS * EXPERTS, (count,), generator=generator)
    return (torch.full_like(slots, 5) if all_of_one else slots), torch.randint(count, (count,), generator=generator)


@pytest.mark.parametrize("all_of_one", [False, True])
@pytest.mark.parametrize("count", [1, 7, 64, 600, 5000])
def test_tables_made_on_the_device_hold_each_pair_once(count: int, all_of_one: bool) -> None:
    slots, tokens = _pairs(count, all_of_one=all_of_one)
    made = pair_tables(slots, tokens, SLOTS * EXPERTS)
    order = made.pairs.order_N.long()
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(made.tokens.order_N.long(), tokens[order])
    for table, longest in ((made.pairs.tiles_S4, TILE), (made.pairs.chunks_C4, 512)):
        seen = torch.zeros(count, dtype=torch.int64)
        for slot, first, entries, _ in table.tolist():
            assert entries <= longest
            for entry in range(first, first + entries):
                assert int(slots[order[entry]]) == slot
                seen[order[entry]] += 1
        assert torch.equal(seen, (slots >= 0).long())
    shared = [i for i, (_, _, entries, only) in enumerate(made.pairs.chunks_C4.tolist()) if entries and not only]
    assert shared == list(range(len(shared)))  # they come first, and there is room for them
    assert len(shared) <= made.pairs.summed
    for slot, (first, pieces) in enumerate(made.pairs.spans_P2.tolist()):
        mine = made.pairs.chunks_C4[first : first + pieces]
        assert int(mine[:, 2].sum()) == int((slots == slot).sum())


def _results(
    kind: str, device: torch.device, dtype: torch.dtype, route: Callable[[AdapterBank], Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    model, bank = two(kind, dtype=dtype)
    add_adapter(bank, "elsewhere", targets=["q_proj"])
    add_adapter(bank, "half", targets=["experts.down_proj"], rank=2)
    add_adapter(bank, "dropped", targets=["experts"], rank=11, dropout=0.4)
    model.to(device)
    experts = next(module for module in model.modules() if isinstance(module, LoRAExperts))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5 * 9, 16, generator=generator).to(device, dtype).requires_grad_()
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(5 * 9)]).to(device)
    weights = torch.rand(5 * 9, 2, generator=generator).to(device, dtype)
    clear(bank)
    with bank.route(route(bank)):
        y = experts(x, index, weights)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(device, dtype), retain_graph=True)
    y.backward(torch.randn(y.shape, generator=generator).to(device, dtype))
    return y.detach(), {"dx": dx, **{key: g for key, g in gradients(bank).items() if "experts" in key}}


ROUTES: dict[str, Callable[[AdapterBank], Any]] = {
    "rows": lambda bank: bank.routing(["a", BASE, "half", "b", "elsewhere"], exact=False),
    "one": lambda bank: bank.routing("b"),
    "tokens": lambda bank: bank.routing(tokens=["a", "b", BASE] * 15, exact=False),
    "dropout": lambda bank: bank.routing(
        ["dropped", "a", "dropped", BASE, "dropped"],
        dropout=DropoutState(steps={"dropped": 3}, examples=torch.arange(5) * 7),
        exact=False,
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.04)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", MIXTURES)
def test_outputs_and_gradients(
    kind: str, route: str, dtype: torch.dtype, tolerance: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def everywhere(weight: Tensor) -> bool:
        asked.append(runtime.available(weight.device))
        return asked[-1]

    monkeypatch.setattr("lorabank.bank.stacked.expert_products.runs_kernels", everywhere)
    found = _results(kind, device, dtype, ROUTES[route])
    monkeypatch.setenv(runtime.SWITCH, "0")
    assert asked == [True]
    expected = _results(kind, device, dtype, ROUTES[route])
    assert asked == [True, False]
    assert _distance(found[0], expected[0]) < tolerance
    for key, value in expected[1].items():
        assert _distance(found[1][key], value) < tolerance, key


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def test_the_slots_of_tokens_are_read_off_a_batchs_tables(device: torch.device) -> None:
    tables = route_tables({2: [0, 5], 0: [3], 7: [4]}, units=7, tokens=40, slots=8).to(device)
    found = slots_of_tokens(tables).view(7, 40)
    assert found.tolist() == [[slot] * 40 for slot in (2, -1, -1, 0, 7, 2, -1)]
