"""A replay reads all that a pass depends on from its inputs. CUDA's graphs have a stand-in here, which computes anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine import replaying, step
from lorabank.engine.batch import Batch
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.graphs import IDLE, SEEN_BEFORE, PassGraphs, _Captured
from lorabank.engine.packing import packed_tensors
from lorabank.engine.replaying import EXAMPLE_GRANULE, LENGTH_GRANULE, comes_again, granule, uncaptured
from lorabank.engine.step import Engine
from lorabank.kernels.native import library
from tests.engine.test_packing import pair
from tests.engine.tiny import add, backward, batch_of, difference, make_bank

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for a GPU here: see tests/gpu"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
]
ROUTES = ["b", "a", BASE]
PACKED = [
    [[4, 3], [7], [2, 5]],
    [[2, 2, 3], [7], [6, 1]],
    [[7], [1, 6], [3, 4]],
    [[3, 1, 2, 1], [2, 5], [7]],
    [[5, 2], [4, 3], [7]],
]
"""Tokens of the examples of each row, batch after batch: rows are as long in all, examples are not as many."""


class _StandIn:
    """For `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Set by `recomputing`."""


@pytest.fixture(autouse=True)
def recomputing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Captures compute, and replays do so again, on the tensors that were captured. Yields the number of each replay."""
    inside, replays = [False], list[int]()

    @contextlib.contextmanager
    def capture(*args: Any, **more: Any) -> Iterator[None]:
        inside[0] = True
        try:
            yield
        finally:
            inside[0] = False

    original = PassGraphs._capture

    def _capture(
        self: PassGraphs, key: Any, tensors: Any, leaves: Sequence[nn.Parameter], compute: Callable[..., Tensor], holds: Any
    ) -> _Captured | None:
        made = original(self, key, tensors, leaves, compute, holds)
        assert made is not None

        def replay() -> None:
            kept = [leaf.grad for leaf in made.leaves]
            for leaf in made.leaves:
                leaf.grad = None
            with capture():
                made.row_losses.copy_(compute(made.inputs))
            for leaf, gradient, before in zip(made.leaves, made.gradients, kept, strict=True):
                assert leaf.grad is not None
                gradient.copy_(leaf.grad)
                leaf.grad = before
            replays.append(len(replays))

        made.graph.replay = replay
        return made

    monkeypatch.setattr(PassGraphs, "_capture", _capture)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _StandIn)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: inside[0])
    monkeypatch.setattr(step, "_graphed", lambda engine, batch, *_: engine.cuda_graphs and not uncaptured(engine, batch, None))
    monkeypatch.setattr(library, "loaded", lambda: None)  # attention.c isn't part of a compiled block
    torch._dynamo.reset()
    yield replays
    torch._dynamo.reset()


def banks(dropout: float) -> tuple[AdapterBank, AdapterBank]:
    """(compiled, plain)."""
    made = make_bank(), make_bank()
    for bank in made:
        bank.remove("b")
        add(bank, "b", rank=5, dropout=dropout)
    for block in repeated_blocks(made[0].model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    return made


def assert_replayed(batches: Sequence[Batch], dropout: float, replays: Sequence[int]) -> None:
    """Losses and gradients of each batch are those of plain passes."""
    fused, plain = banks(dropout)
    engine, other = Engine(fused), Engine(plain, cuda_graphs=False)
    for number, batch in enumerate(batches):
        steps = {"a": number, "b": number}
        losses, found = backward(fused, batch, engine, steps=steps)
        expected_losses, expected = backward(plain, batch, other, steps=steps)
        for name, loss in expected_losses.items():
            assert losses[name].tokens == loss.tokens
            assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=1e-4, abs=1e-5)
            assert difference(found[name], expected[name]) < 5e-3  # fp32, other sums, adapters that are strong
    assert len(engine.graphs._captured) == 1
    assert len(replays) == len(batches) - SEEN_BEFORE


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows(dropout: float, recomputing: list[int]) -> None:
    routes = [ROUTES, ROUTES, ROUTES[::-1], ["a", "b", BASE], ["a", BASE, "b"]]
    assert_replayed([batch_of([5, 7, 3], routes[i], seed=i) for i in range(5)], dropout, recomputing)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_rows(dropout: float, recomputing: list[int]) -> None:
    batches = [pair(lengths, ROUTES)[0] for lengths in PACKED]
    assert len({len(batch.examples_E) for batch in batches}) > 1
    assert_replayed(batches, dropout, recomputing)


def test_spans_are_filled_up_to_few_numbers() -> None:
    for lengths in PACKED:
        batch = pair(lengths, ROUTES)[0]
        exact, filled = (packed_tensors(batch, torch.device("cpu"), spans=each) for each in (0, EXAMPLE_GRANULE))
        assert len(filled.cu_S) == EXAMPLE_GRANULE + 1
        assert filled.cu_S.unique().tolist() == exact.cu_S.tolist()
        assert torch.equal(filled.positions_NL, exact.positions_NL)


def test_parts_of_a_batch_have_boundaries_of_their_own() -> None:
    batch = pair(PACKED[0], ROUTES)[0]
    told = replace(batch, boundaries=packed_tensors(batch, torch.device("cpu")))
    assert (
        told.select([1, 0]).boundaries is told.lengthened(64, None).boundaries is told.to(torch.device("cpu")).boundaries is None
    )


@pytest.mark.parametrize(("length", "expected"), [(7, 8), (130, 8), (520, 32), (1000, 32), (2047, 64), (2048, 128), (8000, 128)])
def test_short_packed_rows_are_filled_up_by_little(length: int, expected: int) -> None:
    batch = pair([[length - 2, 2]], ["a"])[0]
    assert granule(batch) == expected
    assert batch.lengthened(expected, None).input_ids_NL.shape[1] <= max(8, length * 17 / 16)
    assert granule(batch_of([length], "a")) == LENGTH_GRANULE


def test_what_is_lengthened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows only where a graph may come of it."""
    engine, batch = Engine(make_bank()), pair(PACKED[0], ROUTES)[0]
    monkeypatch.setattr(Engine, "blocks", [object()])
    assert comes_again(engine, batch, None)
    monkeypatch.setattr(replaying, "SMALL", 20)  # the batch has 21 tokens
    assert not comes_again(engine, batch, None)
    monkeypatch.setattr(replaying, "SMALL", 21)
    engine.base_dropout = True
    assert not comes_again(engine, batch, None)
    engine.base_dropout = False
    engine.fits.times = 1
    assert comes_again(engine, batch, None)
    assert not comes_again(engine, batch.select([0]), None)  # a row that may just fit
    engine.fits.times = 0
    engine.graphs.refused = "why"
    assert not comes_again(engine, batch, None)
    engine.graphs.refused = None
    monkeypatch.setattr(Engine, "blocks", [])
    assert not comes_again(engine, batch, None)


def test_graphs_that_memory_has_no_room_for_are_not_captured_over_and_over() -> None:
    graphs = PassGraphs()

    def drop(replays: int) -> bool:
        graphs._captured["key"] = _Captured(torch.cuda.CUDAGraph(), [], torch.zeros(1), [], [])
        graphs._replays = replays
        return graphs.drop()

    for replays in (0, IDLE, 0, 10 * IDLE):
        assert drop(replays)
        assert graphs.refused is None
    with pytest.warns(UserWarning, match="too little memory for passes of other shapes"):
        drop(IDLE - 1)
    assert graphs.refused is not None
