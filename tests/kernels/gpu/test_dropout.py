"""Dropout inside the kernels against the plain definition: the masks to the bit, outputs and every gradient.

Shapes as in kernels/gpu/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorabank.kernels.gpu import lora, siblings
from lorabank.kernels.segments import dropout_mask
from tests.kernels.gpu.problems import (
    MIXED,
    Problem,
    bf16_dots,  # noqa: F401
    check,
    found,
    make,
    poisoned,  # noqa: F401
    problems,
)

CHANCES: Mapping[int, float] = {0: 0.5, 1: 0.0, 2: 0.1, 3: 0.9, 4: 0.3, 5: 0.75}
"""By slot."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_outputs_and_gradients(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(make(device, **MIXED[name], dtype=dtype, dropout=CHANCES))


@pytest.mark.parametrize("ranks", [{0: 3, 1: 16}, {0: 17, 1: 3}, {0: 130, 1: 5}])
@pytest.mark.parametrize("inputs", [1, 130, 300])
def test_odd_sizes(device: torch.device, inputs: int, ranks: dict[int, int]) -> None:
    check(make(device, rows={0: [2], 1: [0, 3]}, ranks=ranks, units=4, inputs=inputs, outputs=33, dropout=CHANCES))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_that_are_split_along_the_features(device: torch.device, dtype: torch.dtype) -> None:
    for ranks in ({0: 3, 1: 16}, {0: 70}):
        rows = {0: [1], 1: [2]}
        check(make(device, rows=rows, ranks=ranks, units=3, tokens=2, inputs=1700, outputs=3, dtype=dtype, dropout=CHANCES))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(problem=problems(), chances=st.dictionaries(st.integers(0, 4), st.sampled_from([0.0, 1e-6, 0.3, 0.999]), min_size=1))
def test_random_batches(device: torch.device, problem: dict[str, Any], chances: dict[int, float]) -> None:
    check(make(device, **problem, dropout=chances))


# ---- masks --------------------------------------------------------------------------------------------------------

INPUTS = 37
ROWS = {0: [4, 1], 1: [0], 2: [3, 6], 3: [5]}
"""Of seven: row 2 is the base's."""


def _probe(device: torch.device, dtype: torch.dtype) -> Problem:
    """Every input is one, and A hands each channel on by itself."""
    p = make(device, rows=ROWS, ranks=dict.fromkeys(ROWS, INPUTS), units=7, tokens=9, inputs=INPUTS, dtype=dtype, dropout=CHANCES)
    for first, rank in p.spots.values():
        p.A[first : first + rank] = torch.eye(INPUTS)
    return replace(p, x_NI=torch.ones_like(p.x_NI))


def _masks(p: Problem) -> Tensor:
    """What each token keeps, by the definition, (N, I)."""
    kept = torch.zeros(p.units * p.tokens, INPUTS, dtype=torch.bool)
    for slot, rows in p.rows.items():
        kept[p.tokens_of(slot)] = dropout_mask(p.draw(slot, rows), p.tokens, INPUTS).ne(0).flatten(0, 1)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_the_definitions_to_the_bit(device: torch.device, dtype: torch.dtype) -> None:
    p = _probe(device, dtype)
    tables, order, kept = p.tables, p.tables.order_N.long().cpu(), _masks(p)
    assert 0.3 < kept[p.adapted].float().mean() < 0.8
    ones = torch.ones_like(p.scaling_P)

    xa = lora.shrink(p.x_NI, p.A, tables, p.ranks_P2, ones, p.width, p.drops)[:, :INPUTS]
    seen = torch.zeros_like(kept)
    seen[order] = xa.cpu().eq(1)
    assert torch.equal(seen, kept)

    narrow = torch.ones(p.units * p.tokens, p.width, dtype=dtype, device=device)
    dx = lora.change(narrow, p.A, None, tables, p.ranks_P2, p.drops)
    assert torch.equal(dx.cpu().eq(1), kept)
    added = torch.full_like(dx, 2.0)
    lora.expand_(added, narrow, p.A, tables, p.ranks_P2, p.drops)
    assert torch.equal(added.cpu().eq(3), kept)

    # one token of each slot at a time through the sum over tokens
    dA = torch.zeros_like(kept)
    for place in range(2 * p.tokens):
        narrow = torch.zeros(p.units * p.tokens, p.width, dtype=dtype, device=device)
        here = {slot: p.tokens_of(slot)[place] for slot in ROWS if place < len(p.tokens_of(slot))}
        for token in here.values():
            narrow[int((order == token).nonzero())] = 1
        grad = lora.outer(narrow, p.x_NI, p.A, tables, p.ranks_P2, p.drops)
        for slot, token in here.items():
            dA[token] = grad[p.spots[slot][0]].cpu().eq(1)
    assert torch.equal(dA, kept)


def test_another_step_seed_or_example_drops_others(device: torch.device) -> None:
    p = _probe(device, torch.float32)
    steps, draws, odds = p.drops
    ones, before = torch.ones_like(p.scaling_P), _masks(p)[p.tables.order_N.long().cpu()]
    routed = before.any(1)
    for changed in (
        [steps + 1, draws, odds],
        [steps, draws + 1, odds],
        [steps, draws, odds + torch.tensor([1, 0], device=device)],
    ):
        xa = lora.shrink(p.x_NI, p.A, p.tables, p.ranks_P2, ones, p.width, [t.int() for t in changed])[:, :INPUTS]
        same = xa.cpu().eq(1)[routed] == before[routed]
        assert 0.5 < same.float().mean() < 0.85  # 0.73 for independent draws at these chances and sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [5, 40])
def test_a_slot_without_dropout_gets_the_same_bits_beside_one_that_has_it(
    device: torch.device, rank: int, dtype: torch.dtype
) -> None:
    given = {"rows": {0: [2, 0], 1: [1, 4]}, "ranks": {0: 3, 1: rank}, "units": 6, "tokens": 40, "inputs": 50, "outputs": 33}
    without, beside = (found(make(device, **given, dtype=dtype, dropout=dropout)) for dropout in ({}, {0: 0.5}))
    p = make(device, **given)
    mine, (first, _) = p.tokens_of(1), p.spots[1]
    others = [token for token in range(p.units * p.tokens) if token not in p.tokens_of(0)]
    # Triton's interpreter multiplies by numpy, which on some processors rounds by how its operands lie in memory
    rounding = 0.0 if device.type == "cuda" else 1e-5
    for name in ("change", "change and bias", "added", "x", "x added"):
        torch.testing.assert_close(without[name][others], beside[name][others], rtol=rounding, atol=rounding, msg=name)
        assert not torch.equal(without[name], beside[name]), name
    for name in ("A", "B"):
        mine_dry, mine_wet = (grads[name][first : first + rank] for grads in (without, beside))
        torch.testing.assert_close(mine_dry, mine_wet, rtol=rounding, atol=rounding, msg=name)
    assert beside["change"][mine].ne(0).all()


# ---- layers together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("count", "inputs"),
    [(2, 37), (3, 37), (4, 37), pytest.param(3, 1030, marks=pytest.mark.slow)],  # the last in two splits
)
def test_sibling_layers_draw_what_each_draws_alone(device: torch.device, count: int, inputs: int, dtype: torch.dtype) -> None:
    """Slot 1 drops nothing. Sums of a layer are the same; those over layers differ by their order."""
    p = make(
        device, rows={0: [4, 1], 1: [0, 3]}, ranks={0: 3, 1: 5}, units=5, inputs=inputs, dtype=dtype, dropout={0: 0.4, 1: 0.0}
    )
    tables, ranks, scaling, width = p.tables, p.ranks_P2, p.scaling_P, p.width
    steps, draws, odds = p.drops
    seeds = [odds + torch.tensor([i, 0], dtype=torch.int32, device=device) for i in range(count)]
    As = [p.A * (i + 1) for i in range(count)]
    apart = [[steps, draws, mine] for mine in seeds]
    routed = tables.tiles_S4[:, 0] >= 0
    entries = sum(int(n) for n in tables.tiles_S4[routed, 2])

    joint = siblings.shrink(p.x_NI, As, tables, [ranks] * count, [scaling] * count, width, [steps, draws, *seeds])
    alone = [lora.shrink(p.x_NI, A, tables, ranks, scaling, width, mine) for A, mine in zip(As, apart, strict=True)]
    for mine, theirs in zip(joint, alone, strict=True):
        torch.testing.assert_close(mine[:entries, :3], theirs[:entries, :3], rtol=1e-2, atol=1e-5)
    assert not torch.equal(joint[0][:entries, :3] * 2, joint[1][:entries, :3])

    grads = siblings.outer(joint, p.x_NI, As, tables, [ranks] * count, [steps, draws, *seeds])
    for narrow, mine, drops in zip(joint, grads, apart, strict=True):
        theirs = lora.outer(narrow, p.x_NI, p.A, tables, ranks, drops)
        for first, rank in p.spots.values():
            torch.testing.assert_close(mine[first : first + rank], theirs[first : first + rank], rtol=1e-5, atol=1e-5)

    parts = [lora.change(n.float(), A, None, tables, ranks, d).float() for n, A, d in zip(joint, As, apart, strict=True)]
    total = torch.stack(parts).sum(0)
    close = {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    dx = siblings.change(joint, As, tables, [ranks] * count, drops=[steps, draws, *seeds])
    torch.testing.assert_close(dx.float(), total, **close)
    onto = torch.ones_like(p.x_NI)
    siblings.change(joint, As, tables, [ranks] * count, out_NF=onto, drops=[steps, draws, *seeds])
    torch.testing.assert_close(onto.float(), total + 1, **close)

    plain = siblings.change(joint, As, tables, [ranks] * count)
    dry = p.tokens_of(1)
    assert torch.equal(dx[dry], plain[dry])
    assert not torch.equal(dx, plain)
