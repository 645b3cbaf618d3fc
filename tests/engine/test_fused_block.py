"""Blocks with the LoRA products compiled into them: on a CPU through Triton's interpreter, traced by torch.compile, not lowered.

What is held together: the same engine, or a loop of one's own, on the same model with plain blocks. tests/gpu/test_fused.py does
the same on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import RowRoute
from lorabank.engine import packed_attention
from lorabank.engine.batch import pack_batch
from lorabank.engine.compiled import fused_blocks, takes_tables
from lorabank.engine.compiling import repeated_blocks, uncompile_blocks
from lorabank.engine.fused_block import FEW, FusedBlock
from lorabank.engine.step import Engine, forward_backward
from lorabank.errors import RoutingError
from lorabank.kernels.gpu import lora
from lorabank.kernels.native import library as native_library
from lorabank.notices import warn_once
from tests.engine.tiny import add, backward, batch_of, clear, difference, gradients, make_bank, make_model, tokens

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for a GPU here: see tests/gpu/test_fused.py"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look at its inputs
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|add):RuntimeWarning"),  # numpy, in the interpreter
    pytest.mark.filterwarnings("ignore:compile. LlamaDecoderLayer doesn't take"),  # said once: see test_fallbacks.py
]
TOLERANCE = 2e-3
"""fp32: the order of sums, by which some processors differ by 1.1e-3. As `difference` has it; weights that change by 1e-7 of
themselves change these gradients by 2e-4."""
TWO: Sequence[str] = ["q", "down_proj"]
"""Targets where nothing depends on them: each product takes the interpreter its time."""
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "opt", "bert"]


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_shared_code() -> Iterator[None]:
    """Tiny models run fastest on one thread. What one test compiles serves the next: all models of a family share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def torch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with LORABANK_NATIVE=0: attention that is traced with its block, as on a GPU."""
    monkeypatch.setattr(native_library, "loaded", lambda: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The blocks whose products were compiled into them, one entry a call."""
    seen: list[nn.Module] = []
    run = FusedBlock._run

    def counted(self: FusedBlock, *args: Any) -> Any:
        seen.append(self.block)
        return run(self, *args)

    monkeypatch.setattr(FusedBlock, "_run", counted)
    return seen


def fuse(bank: AdapterBank) -> list[nn.Module]:
    """Compile the model's blocks as `compile_blocks` does on a GPU."""
    blocks = repeated_blocks(bank.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    return blocks


def bank_of(family: str = "llama", names: Sequence[str] = ("a", "b"), *, targets: Any = TWO, **config: Any) -> AdapterBank:
    """A bank over a model whose weights aren't spread so far that rounding grows from block to block."""
    return make_bank(family, names, model=make_model(family, spread=1.5), targets=targets, **config)


def pair(family: str = "llama", names: Sequence[str] = ("a", "b"), **config: Any) -> tuple[AdapterBank, AdapterBank]:
    """The same model and adapters twice: with plain blocks and with fused ones."""
    plain, fused = bank_of(family, names, **config), bank_of(family, names, **config)
    fuse(fused)
    return plain, fused


def graphs() -> int:
    """Graphs that torch.compile has made so far, in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same(fused: tuple[Mapping[str, Any], Any], plain: tuple[Mapping[str, Any], Any]) -> None:
    """Losses and gradients of two passes, as `backward` gives them."""
    (losses, found), (expected_losses, expected) = fused, plain
    assert losses.keys() == expected_losses.keys()
    for name, loss in expected_losses.items():
        assert losses[name].tokens == loss.tokens
        assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=TOLERANCE)
        assert difference(found[name], expected[name]) < TOLERANCE, name


MIXED: Sequence[RowRoute] = ["a", "b", BASE, "a"]


def own_loop(bank: AdapterBank, ids: Tensor) -> Tensor:
    """A sum that every logit enters differently."""
    logits = bank.model(ids, use_cache=False).logits
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def taken(bank: AdapterBank) -> dict[str, dict[str, Tensor]]:
    """Gradients by adapter and leaf, which are dropped."""
    found = {name: gradients(bank, name) for name in bank.names}
    clear(bank)
    return found


def assert_same_gradients(fused: AdapterBank, plain: AdapterBank) -> None:
    mine, theirs = taken(fused), taken(plain)
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mine[name].keys() == expected.keys(), name
        if expected:
            assert difference(mine[name], expected) < TOLERANCE, name


IDS = torch.randint(14, 61, (4, 7), generator=torch.Generator().manual_seed(5))


@pytest.mark.variants(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_plain_engines(family: str, calls: list[nn.Module]) -> None:
    plain, fused = pair(family, targets="all-linear")
    engines = Engine(plain), Engine(fused)
    for lengths in ((5, 9, 7, 12), (6, 4, 8, 5)):
        batch = batch_of(lengths, MIXED)
        assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    assert {*calls} == {*repeated_blocks(fused.model)}
    outside = family == "bert"  # whose head has a linear layer before the last
    assert [found.block for found in fused_blocks(fused)] == ([] if outside else repeated_blocks(fused.model))
    assert fused_blocks(plain) == []


def test_recomputation_gives_the_same(calls: list[nn.Module]) -> None:
    plain, fused = pair()
    for _ in range(2):
        for lengths in ((5, 9, 7, 12), (6, 4, 8, 5)):
            batch = batch_of(lengths, MIXED)
            mine = backward(fused, batch, Engine(fused, gradient_checkpointing=True))
            assert_same(mine, backward(plain, batch, Engine(plain)))
    assert len(calls) == 4 * 2  # each block once a pass: backward's code computes again what it needs
    assert not any(block._compiled_call_impl.recompute for block in repeated_blocks(fused.model))


def test_with_attention_that_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    plain, fused = pair()
    batch = batch_of((5, 9, 7, 12), MIXED)
    assert_same(backward(fused, batch), backward(plain, batch))


@pytest.mark.slow
def test_nothing_is_compiled_again(calls: list[nn.Module]) -> None:
    """Over lengths, numbers of rows, routes and adapters that come and go: one graph for all blocks, forward and backward."""
    torch._dynamo.reset()
    plain, fused = pair()
    engines = Engine(plain), Engine(fused)
    batches = [
        batch_of((5, 9, 7, 12), MIXED),
        batch_of((6, 4, 8, 5), ["b", "b", "a", "a"]),
        batch_of((21, 3, 40), ["b", BASE, "b"]),
        batch_of((3,) * 32 + (2,), ["a", "b", BASE] * 11),
        batch_of((2, 3, 1, 2), ["a", "a", "a", "a"]),  # one tile, and one chunk
        batch_of((12, 30), ["b", "b"]),
    ]
    before = graphs()
    assert_same(backward(fused, batches[0], engines[1]), backward(plain, batches[0], engines[0]))
    made = graphs()
    assert made == before + 1
    for batch in batches:
        assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    for bank in (plain, fused):
        add(bank, "c", rank=7, targets=TWO)
        add(bank, "d", rank=12, targets=["q"])  # which makes the buffers longer
    batch = batch_of((6, 4, 8, 5, 4), ["c", "a", "d", BASE, "c"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    for bank in (plain, fused):
        bank.remove("a")
    batch = batch_of((6, 4, 8, 5, 4), ["c", "b", "d", BASE, "c"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    assert graphs() == made
    assert len(calls) == 2 * 9


@pytest.mark.slow
def test_the_first_adapter_of_a_class_of_ranks_compiles_once() -> None:
    """Up to 16, then up to 64; what was compiled before is still there when it is gone again. Borders have forms of their own."""
    torch._dynamo.reset()
    plain, fused = pair()
    for block in repeated_blocks(fused.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    engines = Engine(plain), Engine(fused)
    made = []
    for name, rank in ((None, 0), ("c", 16), ("d", 20), ("e", 30), ("d", 0), ("e", 0)):
        for bank in (plain, fused):
            if rank:
                add(bank, str(name), rank=rank, targets=TWO)
            elif name is not None:
                bank.remove(name)
        batch = batch_of((6, 4, 8, 5), [name if rank else "b", "a", BASE, "b"])
        assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
        made.append(graphs())
    assert [count - made[0] for count in made] == [0, 0, 1, 1, 1, 1]


@pytest.mark.slow
def test_borders_that_grow_compile_nothing() -> None:
    """Nor those that don't beside them; borders that are given up, since they no longer pay, do once."""
    torch._dynamo.reset()
    warn_once.cache_clear()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp"]
    plain, fused = pair(targets=targets)
    engines = Engine(plain), Engine(fused)
    batch = batch_of((5, 9), ["a", "b"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    made = graphs()
    # columns for the MLP, for joined queries, keys and values, for the output projection; forms compiled since
    steps = (("c", [64, 128, 64], 0), ("d", [64, 128, 64], 0), ("e", [64, 0, 64], 1), ("f", [128, 0, 128], 1))
    for name, *expected in steps:
        for bank in (plain, fused):
            add(bank, name, rank=16, targets=targets)
        batch = batch_of((6, 4, 8), [name, "a", BASE])
        told = (
            pytest.warns(
                UserWarning, match="54 ranks together don't fit in the borders.* room for 42 ranks of 64 adapters, 64 of each"
            )
            if name == "e"
            else nullcontext()
        )
        with told:
            found = backward(fused, batch, engines[1])
        assert_same(found, backward(plain, batch, engines[0]))
        block = repeated_blocks(fused.model)[0]._compiled_call_impl
        assert isinstance(block, FusedBlock)
        assert [[borders._pad for borders in block._borders._all], graphs() - made] == expected


@pytest.mark.slow
def test_more_slots_and_a_higher_rank_are_right_too() -> None:
    plain, fused = pair()
    engines = Engine(plain), Engine(fused)
    batch = batch_of((5, 9, 7, 12), MIXED)
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    for bank in (plain, fused):
        for i in range(9):  # past eight slots the tables grow
            add(bank, f"n{i}", rank=1 + i, targets=["q"])
        add(bank, "high", rank=20, targets=["q"])
    batch = batch_of((5, 9, 7, 12, 6), ["high", "n8", "a", BASE, "n3"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))


@pytest.mark.slow
def test_rows_and_tokens_of_the_same_number() -> None:
    plain, fused = pair()
    engines = Engine(plain), Engine(fused)
    for lengths in ((4,) * 4, (5,) * 4, (4,) * 5, (32,) * 2, (7,), (7, 7)):
        batch = batch_of(lengths, (["a", "b", BASE] * 2)[: len(lengths)])
        assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))


@pytest.mark.slow
def test_routes_change_from_call_to_call(calls: list[nn.Module]) -> None:
    plain, fused = pair()
    routes: list[Any] = [MIXED, [BASE] * 4, "b", ["b", "a", "a", "b"], BASE]
    with torch.no_grad(), fused.route("a"):
        fused.model(IDS)  # so that every layer has been reached
    for route in routes:
        for bank in (plain, fused):
            with bank.route(route):
                total = own_loop(bank, IDS)
            if total.requires_grad:
                total.backward()  # outside of the route
        assert_same_gradients(fused, plain)
    assert len(calls) == 2 * len(routes)


@pytest.mark.parametrize("given", [{"tokens": (["a"] * 9 + [BASE] * 5 + ["b"] * 14)}, {"repeat": ("tile", 2)}])
def test_packed_tokens_and_multiplied_rows(given: dict[str, Any], calls: list[nn.Module]) -> None:
    plain, fused = pair()
    rows = None if "tokens" in given else ["b", BASE]
    with torch.no_grad(), fused.route("a"):
        fused.model(IDS)
    for bank in (plain, fused):
        with bank.route(rows, **given):
            own_loop(bank, IDS).backward()
    assert_same_gradients(fused, plain)
    assert len(calls) == 2


PACKED: Sequence[Sequence[Sequence[int]]] = [
    [[5, 9], [7], [3, 1, 2], [12]],
    [[6, 1, 1, 4], [8, 5], [2, 2, 2, 2, 2], [1, 1]],
    [[21, 3, 40, 1, 7], [30], [4, 4], [1]],
]


@pytest.mark.slow
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows(traced: bool, checkpointing: bool, calls: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their boundaries are tensors: however many examples a row holds, nothing is compiled again where attention is traced."""
    torch._dynamo.reset()
    if traced:  # the form that takes the mask, as on a GPU whose kernels don't take the heads; else a graph break
        monkeypatch.setattr(packed_attention, "asks_nothing", lambda kwargs: False)
    plain, fused = pair()
    engines = Engine(plain), Engine(fused, gradient_checkpointing=checkpointing)
    before, made = graphs(), []
    engines[1].packing(8)
    assert graphs() == before, "a probe compiles nothing"
    calls.clear()
    for lengths in PACKED:
        texts = iter(tokens([n for row in lengths for n in row]))
        batch = pack_batch([[(next(texts), [1.0] * n) for n in row] for row in lengths], MIXED)
        assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
        made.append(graphs())
    assert made[2] == made[1] == made[0] or not traced
    assert len(calls) == 2 * 3


def test_use_in_a_loop_of_ones_own(calls: list[nn.Module]) -> None:
    plain, fused = pair()
    for bank in (plain, fused):
        bank.use("b")
        optimizer = torch.optim.SGD(bank.parameters("b"), lr=1e-3)
        for _ in range(3):
            own_loop(bank, IDS).backward()
            optimizer.step()
            optimizer.zero_grad()
        own_loop(bank, IDS).backward()
    assert len(calls) == 2 * 3  # the first pass shows that every layer is reached
    assert_same_gradients(fused, plain)


def test_autograd_grad_on_leaves() -> None:
    plain, fused = pair()
    found = []
    for bank in (plain, fused):
        with torch.no_grad(), bank.route("a"):
            bank.model(IDS)
        with bank.route(MIXED):
            total = own_loop(bank, IDS)
        named = dict(bank.named_parameters("a"))
        found.append(dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True)))
        assert all(p.grad is None for p in bank.parameters())
    assert difference(found[1], found[0]) < TOLERANCE


def test_adapters_outside_the_batch_get_no_gradient() -> None:
    _, fused = pair(names=("a", "b", "c"))
    engine = Engine(fused)
    for _ in range(2):
        clear(fused)
        forward_backward(engine, batch_of((5, 9, 7), ["a", BASE, "c"]))
        assert all(p.grad is None for p in fused.parameters("b"))
        assert all(p.grad is not None and p.grad.isfinite().all() for name in "ac" for p in fused.parameters(name))


def test_gradients_pile_up_over_passes() -> None:
    plain, fused = pair()
    batches = [batch_of((5, 9, 7, 12), MIXED), batch_of((6, 4, 8, 5), ["b", "a", "a", BASE], seed=1)]
    for engine in (Engine(plain), Engine(fused)):
        for batch in batches:
            forward_backward(engine, batch)
    assert_same_gradients(fused, plain)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", ["add", "remove"])
def test_a_bank_that_changes_before_backward_is_an_error(how: str, recompute: bool) -> None:
    _, fused = pair(names=("a", "b", "c"))
    with torch.no_grad(), fused.route("a"):
        fused.model(IDS)
    for block in repeated_blocks(fused.model):
        block._compiled_call_impl.recompute = recompute
    with fused.route(MIXED):
        total = own_loop(fused, IDS)
        if how == "add":
            add(fused, "d", rank=2, targets=TWO)
        else:
            fused.remove("c")
        with pytest.raises(RoutingError, match=r"added or removed between"):
            total.backward()
    assert all(p.grad is None for p in fused.parameters())


def test_an_adapter_that_takes_the_room_of_another(calls: list[nn.Module]) -> None:
    plain, fused = pair(names=("a", "b", "c"))
    engines = Engine(plain), Engine(fused)
    batch = batch_of((5, 9, 7, 12), ["a", "b", BASE, "c"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    for bank in (plain, fused):
        bank.remove("b")
        add(bank, "new", rank=3, targets=TWO)  # of four ranks that "b" had
        layer = next(module for module in bank.model.modules() if isinstance(module, LoRALayer))
        assert layer.slots["new"].tensors.start < layer.slots["c"].tensors.start
    batch = batch_of((5, 9, 7, 12), ["new", "c", BASE, "a"])
    assert_same(backward(fused, batch, engines[1]), backward(plain, batch, engines[0]))
    assert len(calls) == 2 * 2


def test_mixtures_take_the_plain_path(calls: list[nn.Module]) -> None:
    plain, fused = pair()
    for route in ([{"a": 0.5, "b": 0.5}, "a", BASE, "b"], {"a": 0.5, "b": -0.5}, [{"a": 0.0, "b": 0.7}, "a", "a", "b"]):
        for bank in (plain, fused):
            with bank.route(route):
                own_loop(bank, IDS).backward()
        assert_same_gradients(fused, plain)
    assert calls == []
    assert not takes_tables(fused.routing([{"a": 0.5, "b": 0.5}]))
    assert takes_tables(fused.routing(MIXED))


def test_passes_without_gradients(calls: list[nn.Module]) -> None:
    """Few tokens, and a cache, in which each block has a place of its own, go through the plain blocks."""
    plain, fused = pair()
    long = torch.randint(14, 61, (4, FEW // 4), generator=torch.Generator().manual_seed(6))
    for ids, cache, fused_calls in ((IDS, False, 0), (long, True, 0), (long, False, 2), (long[:, :-1], False, 2)):
        found = []
        for bank in (plain, fused):
            with torch.no_grad(), bank.route(MIXED):
                found.append(bank.model(ids, use_cache=cache).logits)
        torch.testing.assert_close(found[1], found[0], rtol=TOLERANCE, atol=TOLERANCE)
        assert len(calls) == fused_calls


@pytest.mark.slow
def test_two_threads_under_different_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabank.kernels.gpu import border_writing, sums

    interpreter = threading.RLock()  # which knows one grid at a time

    class Launched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                with interpreter:
                    self.kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(sums, "launch", Launched)
    monkeypatch.setattr(border_writing, "_write", Launched(border_writing._write))
    _, fused = pair()
    with torch.no_grad(), fused.route("a"):
        fused.model(IDS)
    leaves = fused.parameters()

    def once(route: Any) -> list[Tensor | None]:
        with fused.route(route):
            total = own_loop(fused, IDS)
        return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True)]

    routes: list[Any] = ["a", ["b", BASE, "a", "b"]]
    expected = [once(route) for route in routes]
    start = threading.Barrier(2)
    found: list[list[list[Tensor | None]]] = [[], []]

    def run(i: int) -> None:
        start.wait()
        for _ in range(5):
            found[i].append(once(routes[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(2):
        assert len(found[i]) == 5
        for result in found[i]:
            for mine, theirs in zip(result, expected[i], strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_slot_that_is_not_finite_stays_alone() -> None:
    _, fused = pair()
    engine, batch = Engine(fused), batch_of((5, 9, 7, 12), MIXED)
    backward(fused, batch, engine)
    clean, expected = backward(fused, batch, engine)
    with torch.no_grad():
        fused.parameters("b")[1].fill_(float("nan"))
    dirty, found = backward(fused, batch, engine)
    assert not dirty["b"].finite
    assert dirty["a"] == clean["a"]
    assert all(torch.equal(found["a"][key], value) for key, value in expected["a"].items())


def test_without_its_compiled_blocks_a_model_is_the_plain_one(calls: list[nn.Module]) -> None:
    plain, fused = pair()
    batch = batch_of((5, 9, 7, 12), MIXED)
    backward(fused, batch)
    uncompile_blocks(repeated_blocks(fused.model))
    calls.clear()
    losses, found = backward(fused, batch)
    expected_losses, expected = backward(plain, batch)
    assert losses == expected_losses
    assert all(torch.equal(found[name][key], value) for name, part in expected.items() for key, value in part.items())
    assert calls == []


def test_a_detached_model_is_the_old_one_and_can_be_attached_again(calls: list[nn.Module]) -> None:
    _, fused = pair()
    with torch.no_grad(), fused.route(BASE):
        expected = fused.model(IDS).logits
    fused.use("a")
    backward(fused, batch_of((5, 9, 7, 12), MIXED))
    assert calls
    model = fused.detach()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    calls.clear()
    again, plain = make_bank(model=model, targets=TWO), bank_of()
    batch = batch_of((5, 9, 7, 12), MIXED)
    assert_same(backward(again, batch), backward(plain, batch))
    assert {*calls} == {*repeated_blocks(model)}


def test_kernels_are_started_on_the_inputs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dynamo is told to run a compiled block eagerly, as probes do."""
    inside, seen = [0], list[bool]()

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            assert tensor.shape[-1] == 32

        def __enter__(self) -> None:
            inside[0] += 1

        def __exit__(self, *_: object) -> None:
            inside[0] -= 1

    def shrink(*args: Any, **kwargs: Any) -> Any:
        seen.append(inside[0] > 0)
        return real(*args, **kwargs)

    bank = bank_of()
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    backward(bank, batch_of((5, 9), ["a", "b"]))
    real = lora.shrink
    monkeypatch.setattr(lora, "shrink", shrink)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    with torch.compiler.set_stance("force_eager"):
        backward(bank, batch_of((5, 9), ["a", "b"]))
    assert seen
    assert all(seen)


def test_tables_follow_a_model_that_was_moved() -> None:
    bank = bank_of()
    fuse(bank)
    for _ in range(2):
        backward(bank, batch_of((5, 9), ["a", "b"]))
    (block, *_) = fused_blocks(bank)
    assert block._ready()
    before = block._tables[0].ranks_P2
    assert block._ready()
    assert block._tables[0].ranks_P2 is before
    for layer in block._layers:
        layer.store.device = torch.device("meta")  # as `RankStore.to` leaves it
    assert block._moved()
