"""The grouped products against the plain definition: outputs and every gradient, over memory that holds NaN until it is written.

Shapes as in kernels/gpu/lora.py: N tokens, I and O features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.gpu.problems import (
    INF,
    MIXED,
    NAN,
    TOLERANCES,
    Problem,
    bf16_dots,  # noqa: F401
    check,
    found,
    make,
    poisoned,  # noqa: F401
    problems,
)

SEGMENTS = 1000


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_outputs_and_gradients(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(make(device, **MIXED[name], dtype=dtype))


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 200, 512])
def test_every_rank(device: torch.device, rank: int) -> None:
    check(make(device, rows={0: [1], 2: [0]}, ranks={0: rank, 2: 2}, units=3, tokens=2, inputs=3, outputs=4, seed=rank))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [{0: [0, 1], 1: [3], 2: [4, 5, 6]}, {1: [1], 0: [0, 2, 3], 2: [6]}, {2: [0, 1, 2, 3, 4, 5, 6]}])
def test_tiles_of_a_slot_that_one_program_takes(device: torch.device, rows: dict[int, list[int]], dtype: torch.dtype) -> None:
    # 3, 2 and 4 tiles, pairs of which begin and end anywhere
    check(make(device, rows=rows, ranks={0: 70, 1: 3, 2: 64}, units=8, tokens=40, inputs=70, outputs=33, dtype=dtype))


@pytest.mark.parametrize("outputs", [1, 33, 130, 300])
@pytest.mark.parametrize("inputs", [1, 7, 130])
def test_odd_sizes(device: torch.device, inputs: int, outputs: int) -> None:
    for ranks in ({0: 3, 1: 16}, {0: 3, 1: 17}):
        check(make(device, rows={0: [2], 1: [0, 3]}, ranks=ranks, units=4, inputs=inputs, outputs=outputs))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_products_that_are_split_along_the_features(device: torch.device, dtype: torch.dtype) -> None:
    for inputs, outputs, ranks in ((1700, 3, {0: 3, 1: 16}), (3, 1030, {0: 70})):  # three splits and two, the last one shorter
        rows = {0: [1], 1: [2]}
        check(make(device, rows=rows, ranks=ranks, units=3, tokens=2, inputs=inputs, outputs=outputs, dtype=dtype))


@pytest.mark.slow  # a program takes the interpreter milliseconds
@pytest.mark.long
def test_many_segments_of_one_token(device: torch.device) -> None:
    rows = {slot: [SEGMENTS - 1 - slot] for slot in range(SEGMENTS)}
    check(make(device, rows=rows, ranks={slot: 1 + slot % 3 for slot in rows}, units=SEGMENTS, tokens=1, inputs=3, outputs=2))


def test_no_tokens(device: torch.device) -> None:
    for ranks in ({0: 3}, {0: 20}):
        p = make(device, rows={0: []}, ranks=ranks, units=0)
        mine = found(p)
        assert mine["added"].shape == mine["change and bias"].shape == (0, 5)
        assert mine["x"].shape == (0, 7)
        for name in ("A", "B", "B alone"):
            assert mine[name][2 : 2 + ranks[0]].eq(0).all()


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    p = make(device, **MIXED["several tiles and chunks"])
    once, again = found(p), found(p)
    for name in ("change", "added", "x"):
        assert torch.equal(once[name], again[name]), name
    first, rank = p.spots[0]
    assert torch.equal(once["A"][first : first + rank], again["A"][first : first + rank])


def test_a_slot_alone_gives_what_it_gives_in_company(device: torch.device) -> None:
    """Which units a slot's tokens are in, and who else is in the batch, changes no bit of its outputs."""
    p = make(device, rows={0: [3, 1], 2: [0]}, ranks={0: 3, 2: 5}, units=5)
    alone = replace(p, rows={0: [3, 1]})
    mine, theirs = found(alone), found(p)
    for name in ("change", "added", "x"):
        assert torch.equal(mine[name][p.tokens_of(0)], theirs[name][p.tokens_of(0)]), name
    first, rank = p.spots[0]
    for name in ("A", "B"):
        assert torch.equal(mine[name][first : first + rank], theirs[name][first : first + rank]), name


def _same_but_for(slot: int, p: Problem, bad: Problem) -> None:
    """Nothing outside `slot` changes by a bit when it goes bad."""
    clean, dirty = found(p), found(bad)
    others = [token for token in range(p.units * p.tokens) if token not in p.tokens_of(slot)]
    for name in ("change", "change and bias", "added", "x", "x added"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
    for other, (first, rank) in p.spots.items():
        if other != slot:
            for name in ("A", "B", "B alone"):
                mine, theirs = (t[name][first : first + rank] for t in (dirty, clean))
                assert mine.isfinite().all(), name
                assert torch.equal(mine, theirs), name
    assert not all(dirty[name].isfinite().all() for name in ("change", "x"))


POISONS: dict[str, Callable[[Problem], Problem]] = {}


def _poison(name: str) -> Callable[[Callable[[Problem], None]], None]:
    def keep(spoil: Callable[[Problem], None]) -> None:
        def made(p: Problem) -> Problem:
            p = replace(p, x_NI=p.x_NI.clone(), dy_NO=p.dy_NO.clone(), A=p.A.clone(), B=p.B.clone())
            spoil(p)
            return p

        POISONS[name] = made

    return keep


@_poison("a NaN in A")
def _(p: Problem) -> None:
    p.A[p.spots[2][0], 0] = NAN


@_poison("an inf in B")
def _(p: Problem) -> None:
    p.B[sum(p.spots[2]) - 1, -1] = INF


@_poison("a slot full of NaN")
def _(p: Problem) -> None:
    first, rank = p.spots[2]
    p.A[first : first + rank] = p.B[first : first + rank] = NAN


@_poison("an inf in a token")
def _(p: Problem) -> None:
    p.x_NI[p.tokens_of(2)[1], 0] = INF


@_poison("a NaN in a token's gradient")
def _(p: Problem) -> None:
    p.dy_NO[p.tokens_of(2)[0]] = NAN


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("poison", POISONS)
def test_a_slot_that_is_not_finite_stays_alone(device: torch.device, poison: str, rank: int) -> None:
    p = make(device, rows={0: [4, 1], 2: [0, 3], 3: [5]}, ranks={0: 3, 2: rank, 3: 2}, units=7, tokens=11)
    _same_but_for(2, p, POISONS[poison](p))


@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_base_row_that_is_not_finite_stays_alone(device: torch.device, poison: float) -> None:
    p = make(device, rows={0: [1], 2: [3]}, ranks={0: 3, 2: 4}, units=5)
    x, dy, y = p.x_NI.clone(), p.dy_NO.clone(), p.y_NO.clone()
    for tensor in (x, dy, y):
        tensor[p.untouched] = poison
    clean, dirty = found(p), found(replace(p, x_NI=x, dy_NO=dy, y_NO=y))
    for name in ("change", "change and bias", "x", "x added"):
        assert torch.equal(dirty[name], clean[name]), name
    assert torch.equal(dirty["added"][p.adapted], clean["added"][p.adapted])
    for first, rank in p.spots.values():
        for name in ("A", "B"):
            assert torch.equal(dirty[name][first : first + rank], clean[name][first : first + rank]), name


def test_spare_rows_and_missing_slots_are_neither_read_nor_written(device: torch.device) -> None:
    p = make(device, rows={0: [0], 1: [1], 2: [2]}, ranks={0: 3, 2: 2}, units=4)
    assert p.A.isnan().any()
    before = p.A.clone(), p.B.clone()
    mine = check(p)
    assert torch.equal(p.A.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(p.B.nan_to_num(), before[1].nan_to_num())
    spare = p.A.isnan().all(1)
    assert mine["A"][spare].isnan().all()
    assert mine["B"][spare].isnan().all()
    assert torch.equal(mine["added"][3:6], p.y_NO[3:6])  # slot 1's, which the layer lacks


def test_a_slot_without_tokens_gets_a_gradient_of_zero(device: torch.device) -> None:
    for ranks in ({0: 3, 1: 4}, {0: 3, 1: 40}):
        p = make(device, rows={0: [0, 1]}, ranks=ranks, units=2)
        mine = found(p)
        first, rank = p.spots[1]
        for name in ("A", "B", "B alone"):
            assert mine[name][first : first + rank].eq(0).all(), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problem=problems())
def test_random_batches(device: torch.device, problem: dict[str, Any]) -> None:
    check(make(device, **problem))
