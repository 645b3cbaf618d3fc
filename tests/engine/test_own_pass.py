"""`TrainingPass` against a plain loop: results, gradients, what is captured, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine import own_pass
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.graphs import SEEN_BEFORE, PassGraphs
from lorabank.errors import AdapterNameError, ConfigError, DataError, RoutingError
from lorabank.kernels.native import library
from tests.engine import zoo
from tests.engine.tiny import clear, difference, gradients
from tests.engine.zoo import LIKE, MIXED, ROWS, LossOf, batch_of, loss_of, plainly, reached

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|add):RuntimeWarning"),  # numpy, in the interpreter
]
on_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for a GPU: tests/gpu/test_own_pass.py"
)
WIDTH = 32
RANKS = {"a": 2, "b": 3}


@pytest.fixture(autouse=True, scope="module")
def shared_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(family: str, **more: Any) -> AdapterBank:
    return zoo.bank_of(family, RANKS, width=WIDTH, alpha=zoo.USUAL, **more)


def assert_same(mine: AdapterBank, other: AdapterBank, tolerance: float = 1e-5) -> None:
    for name in RANKS:
        found, expected = gradients(mine, name), gradients(other, name)
        assert found.keys() == expected.keys()
        if expected:
            assert difference(found, expected) < tolerance, name


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit", "whisper"])
def test_results_and_gradients_are_a_plain_loops(family: str, rows: bool) -> None:
    """Two shapes by turns, whose gradients pile up."""
    mine, other = bank_of(family), bank_of(family)
    train, plain = lb.TrainingPass(mine, loss_of(mine.model, rows=rows)), loss_of(other.model, rows=rows)
    routes: Sequence[Any] = [MIXED, ["b", "b", BASE, "a"], "a", MIXED]
    for seed, route in enumerate(routes):
        batch = batch_of(family, seed, 7 - seed % 2)
        found, expected = train(batch, route), plainly(other, plain, batch, route)
        assert found.shape == ((ROWS,) if rows else ())
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_same(mine, other)
    assert not train.graphs._captured


def test_mixtures_and_base_rows_alone() -> None:
    mine, other = bank_of("bert"), bank_of("bert")
    train, plain = lb.TrainingPass(mine, loss_of(mine.model)), loss_of(other.model)
    batch = batch_of("bert", 0)
    for route in ([{"a": 0.5, "b": 0.5}, "a", BASE, "b"], {"a": 1.0, "b": 2.0}):
        torch.testing.assert_close(train(batch, route), plainly(other, plain, batch, route), rtol=1e-5, atol=1e-5)
    assert_same(mine, other)
    clear(mine)
    assert not train(batch, BASE).requires_grad
    assert all(leaf.grad is None for leaf in mine.parameters())


def test_the_bases_own_dropout_is_off_unless_it_is_asked_for() -> None:
    bank = bank_of("bert")
    bank.model.train()
    batch = batch_of("bert", 0)
    losses = {kept: [lb.TrainingPass(bank, loss_of(bank.model), base_dropout=kept)(batch, "a") for _ in "12"] for kept in (0, 1)}
    assert bank.model.training
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]


def test_recomputed_blocks_give_the_same() -> None:
    mine, other = bank_of("bert"), bank_of("bert")
    train = lb.TrainingPass(mine, loss_of(mine.model), gradient_checkpointing=True)
    batch = batch_of("bert", 0)
    torch.testing.assert_close(train(batch, MIXED), plainly(other, loss_of(other.model), batch, MIXED), rtol=1e-5, atol=1e-5)
    assert_same(mine, other)


@pytest.mark.parametrize("wrong", ["a list", {}, {"input_ids": [[1, 2]]}, {"n": 3}, {"x": torch.zeros(0, 4)}])
def test_a_batch_that_is_none_is_refused(wrong: Any) -> None:
    bank = bank_of("bert")
    train = lb.TrainingPass(bank, loss_of(bank.model))
    name = next(iter(wrong), "") if isinstance(wrong, dict) else "a str"
    message = rf"batch\['{name}'\]: (expected a tensor, got|has no elements)" if name and name != "a str" else "tensors by name"
    with pytest.raises(DataError, match=message):
        train(wrong if wrong != "a list" else [], "a")
    with pytest.raises(DataError, match="requires a gradient"):
        train({"x": torch.zeros(2, requires_grad=True)}, "a")


def test_routes_and_losses_that_do_not_fit_are_refused() -> None:
    bank = bank_of("bert")
    train, batch = lb.TrainingPass(bank, loss_of(bank.model)), batch_of("bert", 0)
    with pytest.raises(RoutingError, match=r"names 3 rows, and no tensor of the batch has as many: input_ids \(4, 7\)"):
        train(batch, ["a", "b", BASE])
    with pytest.raises(RoutingError, match="an empty list"):
        train(batch, [])
    with pytest.raises(RoutingError, match="expected an adapter's name"):
        train(batch, 3)  # type: ignore[arg-type]
    with pytest.raises(AdapterNameError, match="no adapter 'c'"):
        train(batch, ["a", "b", "c", BASE])
    for wrong in (lambda b: 1.0, lambda b: bank.model(b["input_ids"]).logits, lambda b: b["targets"].sum()):
        with pytest.raises(ConfigError, match=r"loss_of: expected a scalar or one number a row"):
            lb.TrainingPass(bank, wrong)(batch, "a")  # type: ignore[arg-type]
    assert all(leaf.grad is None for leaf in bank.parameters())


# ---- captured passes, with a stand-in for CUDA's graphs ----------------------------------------------------------------------


class Graphs:
    """A replay computes again what was captured, from the graph's inputs and the Python values of its capture, in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured, self.replays, self.inside = 0, 0, False
        capture = PassGraphs._capture

        def captured(graphs: Any, key: Any, tensors: Any, leaves: Any, compute: Any, holds: Any) -> Any:
            made = capture(graphs, key, tensors, leaves, compute, holds)
            if made is not None:
                self.captured += 1
                made.graph.replay = lambda: self._again(made, compute)
            return made

        @contextlib.contextmanager
        def capturing(graph: Any = None, pool: Any = None) -> Iterator[None]:
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

        self.capturing = capturing
        monkeypatch.setattr(PassGraphs, "_capture", captured)
        monkeypatch.setattr(torch.cuda, "graph", capturing)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.inside)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(own_pass, "_on_gpu", lambda device: True)
        monkeypatch.setattr(library, "loaded", lambda: None)  # attention that is traced with its block, as on a GPU

    def _again(self, made: Any, compute: Any) -> None:
        self.replays += 1
        for leaf in made.leaves:
            leaf.grad = None
        with self.capturing():
            made.row_losses.copy_(compute(made.inputs))
        for leaf, gradient in zip(made.leaves, made.gradients, strict=True):
            gradient.copy_(leaf.grad)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(monkeypatch)


def fused(bank: AdapterBank) -> AdapterBank:
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    return bank


@on_interpreter
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["q"]),
        ("bert", ["v", "pooler.dense", "classifier"]),  # two layers that are in no block
        ("vit", ["q", "classifier"]),
        ("whisper", ["cross-attention"]),  # which reads an encoder's tokens and a decoder's
    ],
)
def test_the_third_pass_of_a_shape_is_captured_and_follows_the_route(family: str, targets: Any, graphs: Graphs) -> None:
    mine, other = (reached(bank_of(family, targets=targets), family) for _ in range(2))
    train, plain = lb.TrainingPass(fused(mine), loss_of(mine.model, rows=True)), loss_of(other.model, rows=True)
    for seed, route in enumerate(LIKE):
        batch = batch_of(family, seed)
        torch.testing.assert_close(train(batch, route), plainly(other, plain, batch, route), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)  # piled up
        assert graphs.captured == (seed >= SEEN_BEFORE)
    assert graphs.replays == len(LIKE) - SEEN_BEFORE
    assert train.graphs.refused is None


@on_interpreter
def test_two_shapes_and_one_route_for_all_rows(graphs: Graphs) -> None:
    mine, other = (reached(bank_of("bert", targets=["q", "classifier"]), "bert") for _ in range(2))
    train, plain = lb.TrainingPass(fused(mine), loss_of(mine.model)), loss_of(other.model)
    for seed in range(SEEN_BEFORE + 2):
        for length in (7, 5):
            batch = batch_of("bert", seed, length)
            if length == 5:
                batch["attention_mask"][:] = 1  # hides nothing, unlike the others
            torch.testing.assert_close(train(batch, "a"), plainly(other, plain, batch, "a"), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == len(train.graphs._captured) == 2
    train(batch_of("bert", 9), "b")
    train(batch_of("bert", 9), MIXED)  # other adapters: not these graphs
    assert graphs.replays == 4


@on_interpreter
def test_what_else_is_trained_gets_its_gradients_too(graphs: Graphs) -> None:
    """A head of the user's own, whose leaves the bank doesn't know."""
    banks = [reached(bank_of("bert", targets=["q"]), "bert") for _ in range(2)]
    heads = [nn.Linear(3, 1) for _ in banks]
    heads[1].load_state_dict(heads[0].state_dict())

    def loss(which: int) -> LossOf:
        return lambda batch: heads[which](banks[which].model(batch["input_ids"]).logits).tanh().sum()

    train = lb.TrainingPass(fused(banks[0]), loss(0))
    for seed in range(SEEN_BEFORE + 3):
        if seed == SEEN_BEFORE + 1:
            for head in heads:
                head.zero_grad()
        batch = {"input_ids": batch_of("bert", seed)["input_ids"]}
        torch.testing.assert_close(train(batch, MIXED), plainly(banks[1], loss(1), batch, MIXED), rtol=1e-4, atol=1e-4)
        for mine, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert graphs.captured == 1


@on_interpreter
def test_random_numbers_of_the_host_keep_passes_from_being_captured(graphs: Graphs) -> None:
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    plain = loss_of(bank.model)
    train = lb.TrainingPass(fused(bank), lambda batch: plain(batch) * torch.rand(()))
    with pytest.warns(UserWarning, match=r"drawn on the host.*TrainingPass\(cuda_graphs=False\)") as caught:
        for seed in range(SEEN_BEFORE + 2):
            train(batch_of("bert", seed), MIXED)
    assert len([item for item in caught if "drawn on the host" in str(item.message)]) == 1
    assert graphs.captured == 0


@on_interpreter
@pytest.mark.filterwarnings("ignore:compile. BertLayer doesn't take a mixture")
@pytest.mark.parametrize("why", ["asked", "mixture", "uncompiled", "base_dropout"])
def test_passes_that_are_not_captured(why: str, graphs: Graphs) -> None:
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    if why != "uncompiled":
        fused(bank)
    train = lb.TrainingPass(bank, loss_of(bank.model), base_dropout=why == "base_dropout", cuda_graphs=why != "asked")
    route: list[RowRoute] = [{"a": 1.0, "b": 1.0} if why == "mixture" else "a", "a", BASE, "b"]
    for seed in range(SEEN_BEFORE + 1):
        train(batch_of("bert", seed), route)
    assert graphs.captured == 0
    assert train.graphs.refused is None


@on_interpreter
def test_a_capture_without_memory_leaves_gradients_right(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: Any, pool: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    mine, other = (reached(bank_of("bert", targets=["q"]), "bert") for _ in range(2))
    train, plain = lb.TrainingPass(fused(mine), loss_of(mine.model)), loss_of(other.model)
    for seed in range(SEEN_BEFORE + 2):
        batch = batch_of("bert", seed)
        torch.testing.assert_close(train(batch, MIXED), plainly(other, plain, batch, MIXED), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 0


def test_memory_that_graphs_hold_is_given_back_first() -> None:
    bank = bank_of("bert")
    whole, fails = loss_of(bank.model), [True]

    def lacking(batch: Mapping[str, Tensor]) -> Tensor:
        loss = whole(batch)
        if fails:
            fails.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    train, batch = lb.TrainingPass(bank, lacking), batch_of("bert", 0)
    with pytest.raises(torch.OutOfMemoryError):
        train(batch, "a")  # there is nothing to give back
    fails.append(True)
    train.graphs.drop = lambda: True  # type: ignore[method-assign]
    assert torch.isfinite(train(batch, "a"))


def test_a_captured_route_refuses_what_it_was_not_given() -> None:
    bank = bank_of("bert")
    routing = bank.routing(MIXED)
    size = (ROWS, 7, 8, torch.device("cpu"))
    tables = routing.tables(*size[:2], bank.slot_numbers, *size[2:])
    assert tables is not None
    followed = routing.following({size: tables}, None)
    assert followed.tables(*size[:2], bank.slot_numbers, *size[2:]) is tables
    with pytest.raises(RoutingError, match="no tables of 4 × 5 tokens"):
        followed.tables(ROWS, 5, bank.slot_numbers, 8, torch.device("cpu"))
    with pytest.raises(RoutingError, match="takes its plain path"), bank.route(followed):
        zoo.outputs(bank, "bert")
