"""`TrainingPass` against a plain loop: results, gradients, what is captured, and what is refused."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import lorabank as lb
from lorabank import BASE
from lorabank.bank import routing
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine import own_pass
from lorabank.engine.attention import BLIND, MASKED, own_attention
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.fused_norm import FusedNorm, norms_beside
from lorabank.engine.graphs import SEEN_BEFORE, PassGraphs
from lorabank.errors import AdapterNameError, ConfigError, DataError, RoutingError
from lorabank.kernels.native import library
from lorabank.kernels.tables import route_tables
from lorabank.notices import warn_once
from tests.engine import pictures, zoo
from tests.engine.tiny import clear, difference, gradients
from tests.engine.zoo import LIKE, MIXED, ROWS, LossOf, batch_of, loss_of, plainly, reached, weighed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|add):RuntimeWarning"),  # numpy, in the interpreter
]
on_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for a GPU: tests/gpu/test_own_pass.py"
)
WIDTH = 32
CUDA = torch.device("cuda")
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
    with pytest.raises(RoutingError, match=r"names 3 rows, but the layer's input has 4"):
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
        def capturing(graph: Any = None, **more: Any) -> Iterator[None]:
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
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(own_pass, "_on_gpu", lambda device: True)
        monkeypatch.setattr(own_pass, "own_attention", lambda modules, _, **more: own_attention(modules, CUDA, **more))
        set_state = torch.random.set_rng_state

        def set_rng_state(state: Tensor) -> None:
            """Which Dynamo does after each look at code, on a GPU too, where a capture doesn't allow it."""
            set_state(state)
            if self.inside:
                raise TorchDynamoException("a block was compiled in a capture")

        monkeypatch.setattr(torch.random, "set_rng_state", set_rng_state)
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


@pytest.mark.slow
@on_interpreter
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["q"]),
        ("bert", ["v", "pooler.dense", "classifier"]),  # two layers that are in no block
        ("bert", ["q", "classifier"]),
        ("vit", ["q"]),  # with a head of each adapter's own
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


def unmasked(model: Any) -> LossOf:
    """A causal model's loss, without an attention mask."""
    return lambda batch: weighed(model(input_ids=batch["input_ids"], use_cache=False).logits)


@pytest.mark.slow
@on_interpreter
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_causal_models_without_masks_are_captured(family: str, graphs: Graphs) -> None:
    """transformers would make none outside of a capture and one inside."""
    mine, other = (reached(bank_of(family, targets="attention"), family) for _ in range(2))
    train, plain = lb.TrainingPass(fused(mine), unmasked(mine.model)), unmasked(other.model)
    for seed in range(SEEN_BEFORE + 2):
        batch = {"input_ids": batch_of(family, seed)["input_ids"]}
        torch.testing.assert_close(train(batch, LIKE[seed]), plainly(other, plain, batch, LIKE[seed]), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 1
    assert train.graphs.refused is None


@pytest.mark.slow
@on_interpreter
def test_rows_that_are_packed_by_their_positions_stay_apart_in_a_replay(graphs: Graphs) -> None:
    mine, other = (reached(bank_of("llama", targets=["q"]), "llama") for _ in range(2))

    def loss(model: Any) -> LossOf:
        return lambda batch: weighed(model(**batch, use_cache=False).logits)

    train, plain = lb.TrainingPass(fused(mine), loss(mine.model)), loss(other.model)
    for seed in range(SEEN_BEFORE + 3):
        places = torch.arange(7).expand(ROWS, 7) if seed % 2 else torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(ROWS, 7)
        batch = {"input_ids": batch_of("llama", seed)["input_ids"], "position_ids": places.contiguous()}
        torch.testing.assert_close(train(batch, MIXED), plainly(other, plain, batch, MIXED), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 1


@pytest.mark.slow
@on_interpreter
def test_a_block_that_a_capture_would_compile_stays_compiled(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models whose masks aren't ours."""
    monkeypatch.setattr(own_pass, "own_attention", lambda *_, **__: contextlib.nullcontext())
    mine, other = (reached(bank_of("llama", targets=["q"]), "llama") for _ in range(2))
    norms = norms_beside(mine.model, repeated_blocks(mine.model))
    for norm in norms:
        norm._compiled_call_impl = FusedNorm(norm, backend="aot_eager")
    train, plain = lb.TrainingPass(fused(mine), unmasked(mine.model)), unmasked(other.model)
    with pytest.warns(UserWarning, match=r"a capture can't compile.*give it an attention mask and position_ids") as caught:
        for seed in range(SEEN_BEFORE + 2):
            batch = {"input_ids": batch_of("llama", seed)["input_ids"]}
            torch.testing.assert_close(train(batch, MIXED), plainly(other, plain, batch, MIXED), rtol=1e-4, atol=1e-4)
            assert_same(mine, other, 1e-3)
    assert not [item for item in caught if "runs uncompiled" in str(item.message)]
    compiled = [module._compiled_call_impl for module in (*repeated_blocks(mine.model), *norms)]
    assert not any(each.failed for each in compiled if isinstance(each, FusedBlock | FusedNorm))
    assert len(norms) == 1
    assert graphs.captured == 0


@on_interpreter
@pytest.mark.parametrize("error", [TorchDynamoException("no"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("capturing", [True, False])
def test_a_norm_that_a_capture_would_compile_stays_compiled(
    error: Exception, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = FusedNorm(nn.LayerNorm(4))

    def failing(*_: Any) -> None:
        raise error

    norm._compiled = failing
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    if not capturing and isinstance(error, TorchDynamoException):
        with pytest.warns(UserWarning, match="torch can't compile LayerNorm"):
            norm(torch.ones(2, 4))
        return
    with pytest.raises(type(error)):
        norm(torch.ones(2, 4))
    assert not norm.failed


@on_interpreter
@pytest.mark.parametrize("captured", [True, False])
def test_attention_on_a_gpu_does_without_cudnns(captured: bool, graphs: Graphs) -> None:
    """With masks, which any model may make itself, its gradients can be NaN."""
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    plain, seen = loss_of(bank.model), list[tuple[bool, str]]()

    def watched(batch: Mapping[str, Tensor]) -> Tensor:
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), bank.model.config._attn_implementation))  # type: ignore[union-attr]
        return plain(batch)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    lb.TrainingPass(fused(bank), watched, cuda_graphs=captured)(batch_of("bert", 0), MIXED)
    assert seen == [(False, BLIND if captured else MASKED)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.variants(1)
@on_interpreter
@pytest.mark.parametrize("what", ["leaf", "base", "own"])
def test_what_is_frozen_or_unfrozen_is_noticed(what: str, graphs: Graphs) -> None:
    """A parameter that was trained and isn't, or wasn't and is: an adapter's, the model's, the user's own."""
    banks = [reached(bank_of("bert", targets=["q"]), "bert") for _ in range(2)]
    heads = [nn.Linear(3, 1) for _ in banks]
    heads[1].load_state_dict(heads[0].state_dict())

    def loss(which: int) -> LossOf:
        return lambda batch: heads[which](banks[which].model(batch["input_ids"]).logits).tanh().sum()

    def switched(which: int) -> list[nn.Parameter]:
        classifier: Any = banks[which].model.get_submodule("classifier")
        return {"leaf": banks[which].parameters("a")[:1], "base": [classifier.weight], "own": [heads[which].weight]}[what]

    train = lb.TrainingPass(fused(banks[0]), loss(0))
    for seed in range(3 * (SEEN_BEFORE + 1) + 1):
        if seed and seed % (SEEN_BEFORE + 1) == 0:
            for leaf in (*switched(0), *switched(1)):
                leaf.requires_grad_(not leaf.requires_grad)
        batch = {"input_ids": batch_of("bert", seed)["input_ids"]}
        torch.testing.assert_close(train(batch, MIXED), plainly(banks[1], loss(1), batch, MIXED), rtol=1e-4, atol=1e-4)
        assert_same(banks[0], banks[1], 1e-3)
        for mine, other in zip((*switched(0), *heads[0].parameters()), (*switched(1), *heads[1].parameters()), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert graphs.captured >= 2
    assert train.graphs.refused is None


@pytest.mark.slow
@on_interpreter
def test_a_capture_that_finds_another_leaf_is_not_kept(graphs: Graphs) -> None:
    """The user's own, unfrozen where nothing that is looked at shows it."""
    banks = [reached(bank_of("bert", targets=["q"]), "bert") for _ in range(2)]
    heads = [nn.Linear(3, 1).requires_grad_(False) for _ in banks]
    heads[1].load_state_dict(heads[0].state_dict())

    def loss(which: int) -> LossOf:
        return lambda batch: heads[which](banks[which].model(batch["input_ids"]).logits).tanh().sum()

    train = lb.TrainingPass(fused(banks[0]), loss(0))
    for seed in range(2 * SEEN_BEFORE + 2):
        if seed == SEEN_BEFORE:
            for head in heads:
                head.requires_grad_(True)
        batch = {"input_ids": batch_of("bert", seed)["input_ids"]}
        torch.testing.assert_close(train(batch, MIXED), plainly(banks[1], loss(1), batch, MIXED), rtol=1e-4, atol=1e-4)
        assert_same(banks[0], banks[1], 1e-3)
        for mine, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
        assert graphs.captured == (seed > SEEN_BEFORE + 1)  # which is counted anew, less the pass that showed it
    assert train.graphs.refused is None


@on_interpreter
def test_rows_that_the_loss_puts_together(graphs: Graphs) -> None:
    """As for preferences: no tensor of the batch has as many rows as the route. A Routing is taken, but not captured."""
    mine, other = (reached(bank_of("bert", targets=["q"]), "bert") for _ in range(2))

    def loss(bank: AdapterBank) -> LossOf:
        return lambda batch: weighed(bank.model(torch.cat([batch["chosen"], batch["rejected"]])).logits)

    train, plain = lb.TrainingPass(fused(mine), loss(mine)), loss(other)
    for seed in range(SEEN_BEFORE + 3):
        ids = batch_of("bert", seed)["input_ids"]
        batch = {"chosen": ids[:2], "rejected": ids[2:]}
        route = mine.routing(MIXED) if seed == SEEN_BEFORE + 2 else MIXED
        torch.testing.assert_close(train(batch, route), plainly(other, plain, batch, MIXED), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 1
    assert graphs.replays == 2


@pytest.mark.slow
@on_interpreter
@pytest.mark.parametrize("inner", [BASE, "b", ["b", "a", BASE, "b"], {"a": 0.5, "b": 0.5}])
@pytest.mark.filterwarnings("ignore:compile. BertLayer doesn't take a mixture")
def test_a_route_that_the_loss_puts_in_force_itself(inner: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """BASE, as a reference, or one name: captured, with tables made before. Others can't be followed, which is said."""
    mine, other = (reached(bank_of("bert", targets=["q", "classifier"]), "bert") for _ in range(2))

    def loss(bank: AdapterBank) -> LossOf:
        def both(batch: Mapping[str, Tensor]) -> Tensor:
            with bank.route(inner):
                reference = bank.model(batch["input_ids"]).logits
            return weighed(bank.model(batch["input_ids"]).logits * reference)

        return both

    def tables(*given: Any) -> Any:
        assert not graphs.inside, "tables were made in a capture"
        return route_tables(*given)

    monkeypatch.setattr(routing, "route_tables", tables)
    train, plain = lb.TrainingPass(fused(mine), loss(mine)), loss(other)
    fixed = inner is BASE or inner == "b"
    said = contextlib.nullcontext() if fixed else pytest.warns(UserWarning, match="put in force inside of the pass's")
    with said:
        for seed in range(SEEN_BEFORE + 2):
            batch = {"input_ids": batch_of("bert", seed)["input_ids"]}
            torch.testing.assert_close(
                train(batch, LIKE[seed]), plainly(other, plain, batch, LIKE[seed]), rtol=1e-4, atol=1e-4
            )  # fmt: skip
            assert_same(mine, other, 1e-3)
    assert graphs.captured == fixed
    assert (train.graphs.refused is None) == fixed


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_adapters_outside_of_blocks_alone_are_captured(graphs: Graphs) -> None:
    mine, other = (reached(bank_of("bert", targets=["classifier"]), "bert") for _ in range(2))
    train, plain = lb.TrainingPass(fused(mine), loss_of(mine.model, rows=True)), loss_of(other.model, rows=True)
    for seed, route in enumerate(LIKE):
        batch = batch_of("bert", seed)
        torch.testing.assert_close(train(batch, route), plainly(other, plain, batch, route), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 1 and graphs.replays == len(LIKE) - SEEN_BEFORE


@on_interpreter
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("model", pictures.MADE)
def test_convolutions_and_windows_are_captured_and_their_blocks_run_as_they_are(
    model: str, recomputed: bool, graphs: Graphs
) -> None:
    made, size = pictures.MADE[model]
    mine, other = fused(made()), made()
    compiled = [m._compiled_call_impl for m in mine.model.modules() if isinstance(m._compiled_call_impl, FusedBlock)]
    assert {type(each.block).__name__ for each in compiled} == {"ResNetBasicLayer" if model == "resnet" else "SwinLayer"}
    for each in compiled:
        each.recompute = recomputed
        each._compiled = each._recomputing = _refused
    train, plain = (lb.TrainingPass(bank, picture_loss(bank)) for bank in (mine, other))
    plain.cuda_graphs = False
    for seed, route in enumerate(LIKE):
        batch = {"pixels": torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))}
        torch.testing.assert_close(train(batch, route), plain(batch, route), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 1 and graphs.replays == len(LIKE) - SEEN_BEFORE


@on_interpreter
@pytest.mark.parametrize("model", ["resnet", "swin"])
def test_rows_that_come_again_side_by_side_get_a_graph_of_their_own(
    model: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many arrangements; rows of others are read as numbers, in one graph for all of them."""
    monkeypatch.setattr(own_pass, "ARRANGEMENTS", 2)
    first, second, third = ["a", "a", "b", BASE], [BASE, "b", "b", "a"], ["b", "a", "a", BASE]
    made, size = pictures.MADE[model]
    mine, other = fused(made()), made()
    train, plain = (lb.TrainingPass(bank, picture_loss(bank)) for bank in (mine, other))
    plain.cuda_graphs = False
    turns = [*[first] * 4, *[second] * 4, *[third] * 2, ["a", BASE, "b", "a"], first, second]
    for seed, route in enumerate(turns):
        batch = {"pixels": torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))}
        torch.testing.assert_close(train(batch, route), plain(batch, route), rtol=1e-4, atol=1e-4)
        assert_same(mine, other, 1e-3)
    assert graphs.captured == 3
    (known,) = train._known.values()
    assert known.chosen == {(("a", 0, 2), ("b", 2, 1)), (("b", 1, 2), ("a", 3, 1))}


def picture_loss(bank: AdapterBank) -> LossOf:
    return lambda batch: weighed(bank.model(pixel_values=batch["pixels"])[0])


def _refused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a block that should stay plain was compiled")


@on_interpreter
def test_a_first_passs_own_draws_on_the_host_are_not_judged(graphs: Graphs) -> None:
    """What a pass sets up once, at its first, may be drawn."""
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    plain, first = loss_of(bank.model), [True]

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        if first:
            torch.rand(int(first.pop()))
        return plain(batch)

    train = lb.TrainingPass(fused(bank), loss)
    for seed in range(SEEN_BEFORE + 1):
        train(batch_of("bert", seed), MIXED)
    assert graphs.captured == 1


@pytest.mark.slow
@on_interpreter
@pytest.mark.filterwarnings("ignore:compile. BertLayer doesn't take a mixture")
@pytest.mark.parametrize("why", ["asked", "mixture", "uncompiled", "base_dropout"])
def test_passes_that_are_not_captured(why: str, graphs: Graphs) -> None:
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    if why != "uncompiled":
        fused(bank)
    train = lb.TrainingPass(bank, loss_of(bank.model), base_dropout=why == "base_dropout", cuda_graphs=why != "asked")
    route: list[RowRoute] = [{"a": 1.0, "b": 1.0} if why == "mixture" else "a", "a", BASE, "b"]
    told = (
        pytest.warns(UserWarning, match="blocks of .* aren't compiled.*compile_blocks")
        if why == "uncompiled"
        else contextlib.nullcontext()
    )
    warn_once.cache_clear()
    with told:
        for seed in range(SEEN_BEFORE + 1):
            train(batch_of("bert", seed), route)
    assert graphs.captured == 0
    assert train.graphs.refused is None


@on_interpreter
def test_another_loss_is_captured_by_itself(graphs: Graphs) -> None:
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    train = lb.TrainingPass(fused(bank), loss_of(bank.model))
    batch = batch_of("bert", 0)
    for _ in range(SEEN_BEFORE + 1):
        once = train(batch, MIXED)
    usual = train.loss_of
    train.loss_of = lambda batch: 2 * usual(batch)
    torch.testing.assert_close(train(batch, MIXED), 2 * once)
    assert (graphs.captured, graphs.replays) == (1, 1)


def captured() -> tuple[AdapterBank, lb.TrainingPass, dict[str, Tensor]]:
    """(bank, passes, batch): the passes were captured for such a batch."""
    bank = reached(bank_of("bert", targets=["q"]), "bert")
    train, batch = lb.TrainingPass(fused(bank), loss_of(bank.model)), batch_of("bert", 0)
    for _ in range(SEEN_BEFORE + 1):
        train(batch, MIXED)
    return bank, train, batch


@on_interpreter
def test_a_vocabulary_that_was_resized_is_captured_anew(graphs: Graphs) -> None:
    """A graph holds on to where the table was."""
    bank, train, batch = captured()
    assert graphs.replays == 1
    model: Any = bank.model
    model.resize_token_embeddings(zoo.WORDS + 8)
    train(batch, MIXED)
    assert graphs.replays == 1


@on_interpreter
def test_graphs_of_a_bank_that_changed_are_let_go(graphs: Graphs) -> None:
    bank, train, batch = captured()
    assert train.graphs.any
    bank.add("c", lb.AdapterConfig(rank=2, targets=["q"]))
    train(batch, MIXED)
    assert not train.graphs.any


@on_interpreter
def test_a_capture_without_memory_leaves_gradients_right(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: Any, pool: Any, **more: Any) -> Iterator[None]:
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


def test_memory_that_graphs_hold_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that of the pass that failed, before anything is copied out of the graphs."""
    bank = bank_of("bert")
    whole, fails, held = loss_of(bank.model), [True], list[weakref.ref[Tensor]]()

    def lacking(batch: Mapping[str, Tensor]) -> Tensor:
        loss = whole(batch)
        if fails:
            fails.clear()
            held[:] = [weakref.ref(loss)]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    train, batch = lb.TrainingPass(bank, lacking), batch_of("bert", 0)
    with pytest.raises(torch.OutOfMemoryError):
        train(batch, "a")  # there is nothing to give back
    fails.append(True)
    monkeypatch.setattr(PassGraphs, "any", True)
    dropped: list[bool] = []
    monkeypatch.setattr(train.graphs, "drop", lambda: dropped.append(held[0]() is None))
    assert torch.isfinite(train(batch, "a"))
    assert dropped == [True]


def test_a_second_try_adds_no_gradient_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own head's, whose gradient was there before memory ran out."""
    bank, head, fails = bank_of("bert"), nn.Linear(3, 1), [True]

    def full(gradient: Tensor) -> None:
        if fails:
            fails.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")

    def lacking(batch: Mapping[str, Tensor]) -> Tensor:
        logits = bank.model(batch["input_ids"]).logits
        logits.register_hook(full)
        return head(logits).tanh().sum()

    train, batch = lb.TrainingPass(bank, lacking), {"input_ids": batch_of("bert", 0)["input_ids"]}
    monkeypatch.setattr(PassGraphs, "any", True)
    train(batch, "a")
    found = [leaf.grad.clone() for leaf in head.parameters() if leaf.grad is not None]
    head.zero_grad()
    train(batch, "a")
    torch.testing.assert_close(found, [leaf.grad for leaf in head.parameters()])


def test_a_captured_route_refuses_what_it_was_not_given() -> None:
    bank = bank_of("bert")
    route = bank.routing(MIXED)
    size = (ROWS, 7, 8, torch.device("cpu"))
    tables = route.tables(*size[:2], bank.slot_numbers, *size[2:])
    assert tables is not None
    followed = route.following({size: tables}, None)
    assert followed.tables(*size[:2], bank.slot_numbers, *size[2:]) is tables
    with pytest.raises(RoutingError, match="no tables of 4 × 5 tokens"):
        followed.tables(ROWS, 5, bank.slot_numbers, 8, torch.device("cpu"))
    with pytest.raises(RoutingError, match="takes its plain path"), bank.route(followed):
        zoo.outputs(bank, "bert")
