"""`route_tables`: every token once, tiles and chunks that lie inside one slot, what a kernel reads of a slot without tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabank.kernels.tables import (
    CHUNKS,
    LONGEST_CHUNK,
    SHORTEST_CHUNK,
    TILE,
    RouteTables,
    bits32,
    drop_tables,
    route_tables,
)

Rows = Mapping[int, Sequence[int]]


def check(tables: RouteTables, rows: Rows, units: int, tokens: int, slots: int) -> None:
    """All that the kernels rely on."""
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in tables.tensors)
    order = tables.order_N.tolist()
    owner = {unit: slot for slot, mine in rows.items() for unit in mine}
    expected = [unit * tokens + t for mine in rows.values() for unit in sorted(mine) for t in range(tokens)]
    left = [unit * tokens + t for unit in range(units) if unit not in owner for t in range(tokens)]
    assert order == expected + left
    assert sorted(order) == list(range(units * tokens))

    slot_of = [owner.get(token // tokens, -1) for token in order]
    _check_pieces(tables.tiles_S4[:, :3].tolist(), slot_of, list(range(len(order))), TILE)
    assert tables.tiles_S4[:, 3].eq(0).all()
    chunks, spans = tables.chunks_C4.tolist(), tables.spans_P2.tolist()
    _check_pieces(sorted((c[:3] for c in chunks), key=lambda c: c[1]), slot_of, list(range(len(order))), LONGEST_CHUNK)
    shared = [slot >= 0 and only == 0 and entries > 0 for slot, _, entries, only in chunks]
    assert shared == sorted(shared, reverse=True)
    assert sum(shared) <= tables.summed <= len(chunks)
    assert min(len(chunks), len(tables.tiles_S4)) >= 2  # torch.compile has a form of its own for one
    assert len(spans) == slots
    for slot, (first, count) in enumerate(spans):
        mine = [i for i, (of, _, entries, _) in enumerate(chunks) if of == slot and entries > 0]
        assert count == len(mine)
        assert (count > 0) == (slot in owner.values() and tokens > 0)
        assert count == 0 or mine == list(range(first, first + count))
        assert all(chunks[i][3] == int(count == 1) for i in mine)


def _check_pieces(pieces: list[list[int]], slot_of: list[int], entries: list[int], longest: int) -> None:
    """Pieces (slot, first, count) cover `entries` in order, once each; none holds two slots, or more than `longest`."""
    covered = []
    for slot, first, count in pieces:
        assert 0 <= count <= longest
        assert {*slot_of[first : first + count]} <= {slot}
        covered += range(first, first + count)
    assert covered == entries
    assert sum(count == 0 for _, _, count in pieces) == max(0, 2 - sum(count > 0 for _, _, count in pieces))  # fillers


CASES: dict[str, tuple[Rows, int, int, int]] = {
    "no rows": ({}, 0, 3, 8),
    "rows without tokens": ({0: [0], 1: [1]}, 2, 0, 8),
    "all base": ({}, 5, 9, 8),
    "one slot": ({0: [0, 1, 2]}, 3, 40, 1),
    "one token": ({2: [0]}, 1, 1, 3),
    "a tile exactly": ({0: [0], 1: [1]}, 2, TILE, 2),
    "a tile and a token": ({0: [0], 1: [1]}, 2, TILE + 1, 2),
    "interleaved rows, base between": ({3: [4, 0, 2], 1: [1, 6]}, 7, 5, 8),
    "a slot without rows": ({0: [], 1: [0], 2: []}, 2, 3, 8),
    "several chunks": ({0: [0, 2], 1: [1]}, 3, 3 * LONGEST_CHUNK + 7, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_kernels_rely_on(name: str) -> None:
    rows, units, tokens, slots = CASES[name]
    check(route_tables(rows, units, tokens, slots), rows, units, tokens, slots)


def test_a_thousand_segments_of_one_token() -> None:
    rows = {slot: [999 - slot] for slot in range(1000)}
    tables = route_tables(rows, 1000, 1, 1000)
    check(tables, rows, 1000, 1, 1000)
    assert tables.tiles_S4.shape == tables.chunks_C4.shape == (1000, 4)
    assert tables.summed == 2 * CHUNKS  # not a thousand


@pytest.mark.parametrize("slots", [1, 7, 8, 15, 16, 100])
@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("longest", [64, 128, 256, 512])
def test_chunks_that_are_summed_stay_few(slots: int, over: int, longest: int) -> None:
    tokens = longest + over  # the most chunks that share a slot for so many tokens
    rows = {slot: [slot] for slot in range(slots)}
    tables = route_tables(rows, slots + 1, tokens, slots)
    check(tables, rows, slots + 1, tokens, slots)
    assert tables.summed <= max(2 * CHUNKS, (slots + 1) * tokens * 2 / LONGEST_CHUNK)


def test_base_tokens_come_last_in_tiles_and_chunks_of_no_slot() -> None:
    tables = route_tables({1: [2]}, 4, 20, 8)
    assert tables.tiles_S4.tolist() == [[1, 0, 20, 0], [-1, 20, 32, 0], [-1, 52, 28, 0]]
    assert tables.chunks_C4.tolist() == [[1, 0, 20, 1], [-1, 20, 60, 1]]
    assert tables.spans_P2.tolist() == [[0, 0], [0, 1], *[[0, 0]] * 6]


def test_tables_are_never_empty() -> None:
    tables = route_tables({}, 0, 0, 0)
    assert tables.tiles_S4.tolist() == tables.chunks_C4.tolist() == [[0, 0, 0, 0]] * 2
    assert tables.spans_P2.tolist() == [[0, 0]]


@pytest.mark.parametrize(("tokens", "longest"), [(8, SHORTEST_CHUNK), (1000, 128), (4096, 512), (100_000, LONGEST_CHUNK)])
def test_chunks_grow_with_the_batch(tokens: int, longest: int) -> None:
    tables = route_tables({0: [0]}, 1, tokens, 1)
    counts = [count for count in tables.chunks_C4[:, 2].tolist() if count]
    assert counts[0] == min(longest, tokens)
    assert all(count == counts[0] for count in counts[:-1])
    assert tokens <= CHUNKS * SHORTEST_CHUNK or len(counts) >= CHUNKS


def test_what_moves_to_another_device_is_the_same() -> None:
    tables = route_tables({0: [1], 3: [0]}, 3, 5, 8)
    moved = tables.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(tables.tensors, moved.tensors, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    owners=st.lists(st.integers(-1, 6), max_size=14),
    tokens=st.one_of(st.integers(0, 3), st.integers(28, 70), st.integers(500, 700)),
    idle=st.sets(st.integers(0, 6)),
    order=st.randoms(use_true_random=False),
)
def test_any_route(owners: list[int], tokens: int, idle: set[int], order: Random) -> None:
    rows: dict[int, list[int]] = {slot: [] for slot in sorted(idle, reverse=True)}
    for unit, slot in enumerate(owners):
        if slot >= 0:
            rows.setdefault(slot, []).append(unit)
    for mine in rows.values():
        order.shuffle(mine)
    check(route_tables(rows, len(owners), tokens, 7), rows, len(owners), tokens, 7)


def test_dropout_is_drawn_from_each_entrys_example_and_place() -> None:
    units, tokens = 5, 7
    order_N = route_tables({1: [3, 0], 0: [4]}, units, tokens, 2).order_N
    examples_U = torch.tensor([5, 0x9E3779B1 * 12345, -1, 2**32 + 6, 2**31])
    tables = drop_tables(order_N, tokens, [2**31 + 3, 9], examples_U)
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in tables.tensors)
    assert [step & 0xFFFFFFFF for step in tables.steps_P.tolist()] == [2**31 + 3, 9]
    found = [(example & 0xFFFFFFFF, place) for example, place in tables.draws_N2.tolist()]
    assert found == [(int(examples_U[token // tokens]) & 0xFFFFFFFF, token % tokens) for token in order_N.tolist()]


def test_dropout_of_a_batch_without_tokens() -> None:
    for units, tokens in ((0, 3), (2, 0)):
        tables = drop_tables(route_tables({}, units, tokens, 1).order_N, tokens, [0], torch.arange(units))
        assert tables.draws_N2.shape == (0, 2)


def test_the_low_32_bits_stay() -> None:
    numbers = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, -1, -(2**31), -(2**63)]
    assert [bits & 0xFFFFFFFF for bits in bits32(torch.tensor(numbers)).tolist()] == [n & 0xFFFFFFFF for n in numbers]
