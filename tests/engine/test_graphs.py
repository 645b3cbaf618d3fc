"""The bookkeeping of captured passes, with a stand-in for CUDA's graphs: replays write into memory that graphs share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank.engine import graphs
from lorabank.engine.graphs import IDLE, KEPT, MOST, SEEN_BEFORE, PassGraphs

BETWEEN = 100.0
"""What stands in a gradient's memory once another graph has run."""


class World:
    """Leaves, a pass over some of them, and graphs that scribble over each other's results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.leaves = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        self.graphs = PassGraphs()
        self.captured = self.run_plainly = 0
        self.fails: BaseException | None = None
        self.given: dict[str, object] = {}
        """To the capture."""
        self._made: list[StandIn] = []
        self._current: StandIn | None = None

        @contextlib.contextmanager
        def capture(graph: StandIn, **more: object) -> Iterator[None]:
            self.given = more
            if self.fails is not None:
                raise self.fails
            self._current = graph
            yield
            self._current = None
            self.captured += 1

        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: StandIn(self._made))
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def run(self, which: Sequence[int], number: float) -> float:
        """A pass whose gradient of each leaf in `which` is `number`."""
        mine = [self.leaves[i] for i in which]

        def compute(given: Sequence[Tensor]) -> Tensor:
            if self._current is None:
                self.run_plainly += 1
            sum((leaf * given[0]).sum() for leaf in mine).backward()  # pyright: ignore[reportAttributeAccessIssue]
            losses = given[0].sum()[None].clone()
            if self._current is not None:
                graph = self._current
                graph.results = [leaf.grad for leaf in mine if leaf.grad is not None]
                graph.again = lambda: [given[0] for _ in mine]
                graph.losses, graph.given = losses, given[0]
            return losses

        return float(self.graphs.run(tuple(which), [torch.full((2,), number)], lambda: mine, compute))

    def gradients(self) -> list[float | None]:
        return [None if leaf.grad is None else float(leaf.grad[0]) for leaf in self.leaves]

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class StandIn:
    """A graph: a replay computes its results again, in place, and ruins those of all others."""

    def __init__(self, made: list[StandIn]) -> None:
        self.made = made
        self.results: list[Tensor] = []
        self.again: Callable[[], list[Tensor]] = list
        self.losses = self.given = torch.zeros(1)
        made.append(self)

    def replay(self) -> None:
        for other in self.made:
            for gradient in other.results:
                gradient.fill_(BETWEEN)
        for gradient, value in zip(self.results, self.again(), strict=True):
            gradient.copy_(value)
        self.losses.copy_(self.given.sum()[None])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def warmed(world: World, *ways: Sequence[int]) -> None:
    for which in ways:
        for _ in range(SEEN_BEFORE + 1):
            world.run(which, 1.0)
    world.clear()
    assert world.captured == len(ways)


def test_captured_at_its_third_time_and_the_same_before_and_after(world: World) -> None:
    for i in range(5):
        world.clear()
        assert world.run([0, 1], 2.0 + i) == 2 * (2.0 + i)
        assert world.gradients() == [2.0 + i, 2.0 + i, None]
    assert (world.captured, world.run_plainly) == (1, SEEN_BEFORE)


def test_gradients_pile_up_over_graphs_that_share_their_memory(world: World) -> None:
    warmed(world, [0], [1], [0, 1, 2])
    world.run([0], 1.0)
    world.run([1], 2.0)  # writes over what the first left
    assert world.gradients() == [1.0, 2.0, None]
    world.run([0, 1, 2], 4.0)
    assert world.gradients() == [5.0, 6.0, 4.0]
    world.run([0], 8.0)
    world.run([0], 16.0)
    assert world.gradients() == [29.0, 6.0, 4.0]


def test_gradients_that_were_changed_by_hand_in_between(world: World) -> None:
    warmed(world, [0, 1, 2])
    world.run([0, 1, 2], 1.0)
    mine = torch.tensor([7.0, float("nan")])
    world.leaves[0].grad, world.leaves[1].grad = None, mine
    world.run([0, 1, 2], 2.0)
    assert world.gradients() == [2.0, 9.0, 3.0]
    assert world.leaves[1].grad is not None
    assert world.leaves[1].grad.isnan().tolist() == [False, True]
    assert float(mine[0]) == 7.0  # a tensor that was handed in isn't written to
    world.run([0, 1, 2], 4.0)
    assert world.gradients() == [6.0, 13.0, 7.0]


def test_a_plain_pass_between_captured_ones(world: World) -> None:
    warmed(world, [0, 1])
    world.run([0, 1], 1.0)
    world.run([2], 2.0)
    world.leaves[0].grad += 10.0  # in place, as autograd adds
    world.run([0, 1], 4.0)
    assert world.gradients() == [15.0, 5.0, 2.0]


def test_losses_stay_what_they_were(world: World) -> None:
    warmed(world, [0])
    first = world.graphs.run((0,), [torch.full((2,), 3.0)], list, lambda given: given[0])
    world.run([0], 5.0)
    assert float(first) == 6.0


@pytest.mark.slow
def test_shapes_that_come_and_go_are_not_captured_over_and_over(world: World) -> None:
    for _ in range(8):
        for number in range(2 * KEPT):
            world.graphs.run(("shape", number), [torch.ones(2)], list, lambda given: given[0].sum()[None])
    assert world.captured == KEPT


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "kept"), [(0, KEPT), (64 * 8 * 6, 6), (10**9, MOST)])
def test_more_graphs_are_kept_where_gradients_are_small(
    memory: int, kept: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient here has two numbers of fp32."""
    monkeypatch.setattr(graphs, "_memory", lambda tensors: memory)
    for _ in range(SEEN_BEFORE + 2):
        for number in range(2 * MOST):
            world.graphs.run(("shape", number), [torch.ones(2)], lambda: [world.leaves[0]], lambda given: _through(world, given))
    assert world.captured == kept
    assert world.graphs.kept == kept
    assert world.graphs.drop()
    assert world.graphs.kept == KEPT // 2


def _through(world: World, given: Sequence[Tensor]) -> Tensor:
    (world.leaves[0] * given[0]).sum().backward()
    losses = given[0].sum()[None].clone()
    if world._current is not None:
        world._current.losses, world._current.given = losses, given[0]
    return losses


def test_a_graph_that_lies_idle_makes_room(world: World) -> None:
    warmed(world, *([i] for i in range(3)), [0, 1])
    assert world.captured == KEPT
    for _ in range(IDLE + SEEN_BEFORE + 2):
        world.run([1, 2], 1.0)
    assert world.captured == KEPT + 1
    world.clear()
    assert world.run([1, 2], 3.0) == 6.0
    assert world.gradients() == [None, 3.0, 3.0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_a_pass_too_large_to_capture_is_run_plainly_and_not_tried_again(world: World, error: RuntimeError) -> None:
    world.fails = error
    for i in range(6):
        assert world.run([0], float(i)) == 2.0 * i
    assert world.gradients() == [15.0, None, None]
    assert world.run_plainly == 6
    assert world.graphs.refused is None
    world.fails = None
    warmed(world, [1])


def test_giving_memory_back_keeps_gradients(world: World) -> None:
    warmed(world, [0])
    world.run([0], 1.0)
    assert world.graphs.drop()
    assert not world.graphs.drop()
    world._made[0].results[0].fill_(BETWEEN)
    assert world.gradients() == [1.0, None, None]


@pytest.mark.parametrize("where", ["replay", "losses"])
def test_what_raises_around_a_replay_leaves_gradients_as_they_were(
    where: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass may be tried again: nothing of it may be there already, and nothing of those before may be gone."""
    warmed(world, [0, 1])
    world.run([0, 1], 1.0)
    before = world.gradients()
    with monkeypatch.context() as patch:
        patch.setattr(*((StandIn, "replay") if where == "replay" else (torch, "empty_like")), lacking)
        with pytest.raises(torch.OutOfMemoryError):
            world.run([0, 1], 2.0)
    assert world.gradients() == before
    world.run([0, 1], 2.0)
    assert world.gradients() == [3.0, 3.0, None]


def lacking(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_capture_without_room_for_its_inputs_is_a_plain_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(SEEN_BEFORE):
        world.run([0, 1], 1.0)
    clone, short = torch.Tensor.clone, [True]

    def first(*args: Any, **kwargs: Any) -> Tensor:
        if short:
            short.clear()
            lacking()
        return clone(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", first)
    assert world.run([0, 1], 2.0) == 4.0
    assert world.gradients() == [SEEN_BEFORE + 2.0] * 2 + [None]
    assert world.captured == 0


def test_an_interrupt_in_a_capture_loses_nothing(world: World) -> None:
    for _ in range(SEEN_BEFORE):
        world.run([0, 1], 1.0)
    world.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run([0, 1], 1.0)
    assert world.gradients() == [float(SEEN_BEFORE)] * 2 + [None]


def test_other_threads_may_work_during_a_capture(world: World) -> None:
    warmed(world, [0])
    assert world.given["capture_error_mode"] == "thread_local"


def test_graphs_that_nothing_replays_again_are_let_go(world: World) -> None:
    warmed(world, [0])
    world.run([0], 1.0)
    kept = world.graphs.kept
    world.graphs.forget()
    assert not world.graphs.any
    assert world.graphs.kept == kept  # no memory was short
    world._made[0].results[0].fill_(BETWEEN)
    assert world.gradients() == [1.0, None, None]
