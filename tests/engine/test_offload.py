"""Activation checkpointing whose block inputs wait on the host."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.backends.registry import register_backend

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.storages.quantized import quantize_base
from lorabank.engine import fused_block, host_memory, offload, step
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.graphs import SEEN_BEFORE
from lorabank.engine.host_memory import SMALLEST
from lorabank.engine.offload import Offload, storages
from lorabank.engine.step import Engine, forward_backward
from lorabank.errors import TooLargeError
from lorabank.kernels.gpu.keeping import KeepAttention
from lorabank.kernels.native import library
from lorabank.notices import warn_once
from tests.engine.tiny import batch_of, clear, difference, gradients, make_bank, make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|add):RuntimeWarning"),  # numpy, in the interpreter
]
LENGTHS, ROUTES = (5, 9, 7, 12), ["a", "b", BASE, "a"]


@pytest.fixture(autouse=True, scope="module")
def shared_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(family: str) -> AdapterBank:
    return make_bank(family, model=make_model(family, spread=1.5))


def fused(bank: AdapterBank, backend: str = "aot_eager") -> AdapterBank:
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend=backend)
    return bank


def keeping_eager(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """As `aot_eager`, but forward keeps what inductor's would."""
    compiler: Any = boxed_nop
    made = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=KeepAttention(), keep_inference_input_mutations=True
    )
    return made(graph_module, inputs)


register_backend(keeping_eager, name="keeping_eager")


def as_it_is(bank: AdapterBank) -> AdapterBank:
    return bank


on_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for a GPU here: see tests/gpu")


@pytest.mark.parametrize(
    ("family", "prepared"),
    [("llama", as_it_is), ("gpt2", as_it_is), ("bart", as_it_is), pytest.param("llama", fused, marks=on_interpreter)],
)
def test_gradients_are_those_without(
    family: str, prepared: Callable[[AdapterBank], AdapterBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    if prepared is fused:
        monkeypatch.setattr(library, "loaded", lambda: None)  # attention.c isn't part of a compiled block
    plain = Engine(bank_of(family), gradient_checkpointing=True)
    engine = Engine(prepared(bank_of(family)), activation_offloading=True)
    assert engine.gradient_checkpointing
    for lengths in (LENGTHS, (6, 4, 8, 5)):
        batch = batch_of(lengths, ROUTES)
        for one in (plain, engine):
            clear(one.bank)
            forward_backward(one, batch)
        for name in "ab":
            assert difference(gradients(engine.bank, name), gradients(plain.bank, name)) < 1e-3
    # two blocks and two passes of 4 × 12 and 4 × 8 tokens, 32 wide
    assert engine.offload.bytes == 2 * 4 * (4 * 12 * 32 + 4 * 8 * 32)


@pytest.mark.variants(1)
@on_interpreter
@pytest.mark.parametrize(
    ("family", "backend", "kept"),
    [
        ("llama", "keeping_eager", 3),
        ("gpt2", "keeping_eager", 3),
        ("neox", "keeping_eager", 2),  # attention and MLP side by side: nothing behind the output projection needs its result
        ("gemma2", "keeping_eager", 1),  # a soft-capped attention is many operations, but one where transformers ignores the cap
        pytest.param("llama", "inductor", 3, marks=pytest.mark.slow),
    ],
)
def test_what_attention_gave_leaves_too(family: str, backend: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "loaded", lambda: None)
    monkeypatch.setattr(fused_block, "WORTH_MORE", 0)  # these blocks are small
    plain = Engine(bank_of(family), gradient_checkpointing=True)
    engine = Engine(fused(bank_of(family), backend), activation_offloading=True)
    if family == "gemma2" and engine.bank.model.config._attn_implementation == "sdpa":
        kept = 3
    batch = batch_of(LENGTHS, ROUTES)
    forward_backward(plain, batch)
    for _ in range(2):
        clear(engine.bank)
        forward_backward(engine, batch)
        for name in "ab":
            assert difference(gradients(engine.bank, name), gradients(plain.bank, name)) < 1e-3
    # of each token in each of two blocks: the input, attention's output and a sum for each of its heads, the state behind it
    numbers = kept * 32 + 4 * (kept > 1)
    assert engine.offload.bytes == 2 * 2 * 4 * 4 * 12 * numbers
    forms = {(kept.host.shape, kept.host.stride()) for block in engine.offload._blocks for kept in block}
    if kept == 3:
        assert ((4, 4, 12, 8), (12 * 32, 8, 32, 1)) in forms  # as attention left it: a token's heads side by side


@on_interpreter
def test_small_blocks_keep_their_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(iter(repeated_blocks(fused(bank_of("llama")).model)))
    compiled, x = block._compiled_call_impl, torch.zeros(1, 3, 32)
    assert isinstance(compiled, FusedBlock)
    assert not compiled._worth_more((x,))
    assert not compiled._worth_more(())
    frozen = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # adapters aside
    for least, worth in ((frozen // 32, True), (frozen // 32 + 1, False)):
        monkeypatch.setattr(fused_block, "WORTH_MORE", least)
        assert compiled._worth_more((x,)) == worth


def test_a_quantised_block_counts_as_what_it_stands_for() -> None:
    block = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32, bias=False)).requires_grad_(False)
    numbers = FusedBlock(block)._weights
    assert numbers == 2 * 32 * 64 + 64
    quantize_base(block, "fp8", say=lambda text: None)  # which keeps a weight twice, in rows and in columns
    assert FusedBlock(block)._weights == numbers


class Saving(torch.autograd.Function):
    """Gives its input and asks for what was saved with it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[Any], *saved: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*saved)
        ctx.seen, ctx.count = seen, len(saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ctx.seen += ctx.saved_tensors
        return grad_outputs[0], None, *[None] * ctx.count


def test_what_comes_back_lies_as_it_lay() -> None:
    x, weight, mask = torch.randn(2, 6, 8, requires_grad=True), torch.randn(8, 8), torch.randn(2, 6, 6)
    places = torch.arange(12)
    made: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def block(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        made[:] = [torch.randn(2, 6, 4, 2).transpose(1, 2), torch.randn(2, 4, 6), torch.randn(2, 6, 9)[..., :8], torch.randn(3)]
        return Saving.apply(x, seen, x, weight.t(), mask, places, *made)  # pyright: ignore[reportReturnType]

    def call(block: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return block(*args)

    for lasting, count in ((None, 1), (storages([weight]), 3)):
        offload = Offload()
        offload.start()
        seen.clear()
        y = offload.around(call, lasting)(block, x, mask)
        offload.around(call)(torch.square, y).sum().backward()  # a block behind it
        assert [len(kept) for kept in offload._blocks] == [count, 1]
        for found, saved in zip(seen, [x, weight.t(), mask, places, *made], strict=True):
            assert torch.equal(found, saved)
            assert found.stride() == saved.stride()
        left = [found.data_ptr() != saved.data_ptr() for found, saved in zip(seen, [x, weight, mask, places, *made], strict=True)]
        assert left == [True, False, False, False, lasting is not None, lasting is not None, False, False]


def test_host_memory_is_used_again() -> None:
    engine = Engine(bank_of("llama"), activation_offloading=True)
    seen = []
    for _ in range(3):
        forward_backward(engine, batch_of(LENGTHS, ROUTES))
        seen.append({kept.host.data_ptr() for block in engine.offload._blocks for kept in block})
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2
    assert all(kept.back is None for block in engine.offload._blocks for kept in block)  # nothing waits on the device any more


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [as_it_is, pytest.param(fused, marks=on_interpreter)])
def test_inputs_are_gone_from_the_device_after_forward(
    prepared: Callable[[AdapterBank], AdapterBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(prepared(bank_of("llama")), activation_offloading=True)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    blocks = repeated_blocks(engine.bank.model)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    backward = torch.Tensor.backward

    def look(total: torch.Tensor) -> None:
        alive.extend(ref() is not None for ref in seen)
        backward(total)

    monkeypatch.setattr(torch.Tensor, "backward", look)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert alive == [False] * (len(blocks) - 1) + [True]  # backward begins with the last one's


def test_passes_of_all_shapes_share_the_hosts_memory() -> None:
    engine = Engine(bank_of("llama"), activation_offloading=True)
    for lengths in ((12, 9), (7, 3), (5, 9, 4), (12, 4)):
        forward_backward(engine, batch_of(lengths, ["a", "b", "a"][: len(lengths)]))
    (memory,) = engine.offload._memory.values()
    assert memory.nbytes == SMALLEST


def test_a_pass_that_the_host_has_no_room_for_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs out in the middle of a pass; parts of it use what was pinned by then."""
    monkeypatch.setattr(host_memory, "SMALLEST", 512)
    plain, engine = Engine(bank_of("llama")), Engine(bank_of("llama"), activation_offloading=True)
    batch = batch_of([12] * 8, ["a", "b"] * 4)
    for one in (plain, engine):
        forward_backward(one, batch)
    (memory,) = engine.offload._memory.values()
    most = sum(memory.sizes)  # of two blocks
    assert most == 2 * 8 * 12 * 32 * 4
    for share, least in ((0.6, 2), (0.3, 4), (0.2, 8)):
        tight = Engine(bank_of("llama"), activation_offloading=True)
        most_left = host_memory.KEPT_FREE + int(share * most)

        def available(tight: Engine = tight, most_left: int = most_left) -> int:
            return most_left - sum(memory.nbytes for memory in tight.offload._memory.values())

        monkeypatch.setattr(host_memory, "available", available)
        forward_backward(tight, batch)
        assert tight.fits.tokens is not None
        assert tight.fits.tokens <= 8 * 12 // least
        for name in "ab":
            assert difference(gradients(tight.bank, name), gradients(plain.bank, name)) < 1e-4
        (memory,) = tight.offload._memory.values()
        assert memory.nbytes <= share * most
        clear(tight.bank)
        forward_backward(tight, batch)  # and again, knowing
    monkeypatch.setattr(host_memory, "available", lambda: 0)
    with pytest.raises(TooLargeError, match=r"of the host's memory are wanted .* Set activation_offloading: false where"):
        forward_backward(Engine(bank_of("llama"), activation_offloading=True), batch)


def test_a_captured_pass_keeps_its_host_memory() -> None:
    """It takes buffers that are free, which no other pass gets as long as it is held."""
    x = torch.randn(2, 6, 8, requires_grad=True)

    def call(block: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return block(*args)

    def passed(offload: Offload) -> set[int]:
        offload.start()
        y = x
        for _ in range(3):
            y = offload.around(call)(lambda x: x.square() / 2, y)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, x * x.square() / 2 * (x.square() / 2).square() / 2)
        return {kept.host.data_ptr() for block in offload._blocks for kept in block}

    usual = Offload()
    first = passed(usual)
    usual.remember("this")
    usual.start()
    usual.reserve("this")
    captured = usual.for_capture("this")
    mine = passed(captured)
    captured.end_capture()
    assert mine == first
    with pytest.raises(torch.OutOfMemoryError, match=r"weren't set aside: the passes before kept less"):
        passed(usual.for_capture("that"))
    assert passed(usual).isdisjoint(mine)
    usual.start()
    usual.reserve("this")
    assert passed(usual.for_capture("this")).isdisjoint(mine)
    assert all(kept.back is None for block in captured._blocks for kept in block)
    held = usual._memory[x.device].nbytes
    del captured
    gc.collect()
    assert usual._memory[x.device].nbytes == held + SMALLEST  # it is back
    usual.start()
    assert passed(usual)


@pytest.mark.variants(1)
@pytest.mark.parametrize("wanted", [True, False])
def test_passes_are_captured_where_the_host_has_room(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs, which computes in the capture, and replays nothing."""

    monkeypatch.setattr(host_memory, "available", lambda: 2**40 if wanted else host_memory.KEPT_FREE + SMALLEST)
    monkeypatch.setattr(offload, "SHARE", 0.25 if wanted else 1e-4)
    begun: list[Any] = []

    @contextlib.contextmanager
    def capture(graph: Any, pool: Any, **more: Any) -> Iterator[None]:
        begun.append(pool)
        capturing.append(True)
        yield
        capturing.clear()

    capturing: list[bool] = []
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(step, "_graphed", lambda engine, *_: engine.activation_offloading)
    engine = Engine(fused(bank_of("llama")), activation_offloading=True)
    plain = Engine(bank_of("llama"))
    batch = batch_of(LENGTHS, ROUTES)
    forward_backward(plain, batch)
    for _ in range(SEEN_BEFORE):
        clear(engine.bank)
        forward_backward(engine, batch)
    warn_once.cache_clear()
    told = (
        contextlib.nullcontext()
        if wanted
        else pytest.warns(UserWarning, match=r"aren't captured .* of the host's memory are wanted")
    )
    with told:
        forward_backward(engine, batch)  # its gradients are added to those of the pass before
    assert len(begun) == wanted
    for name in "ab":
        twice = {leaf: 2 * value for leaf, value in gradients(plain.bank, name).items()}
        assert difference(gradients(engine.bank, name), twice) < 1e-3
    (*held,) = (thing for made in engine.graphs._captured.values() for thing in made.held)
    assert [type(thing) for thing in held] == ([Offload] if wanted else [])
    hosts = {kept.host.data_ptr() for offload in held for block in offload._blocks for kept in block}  # type: ignore[attr-defined]
    assert len(hosts) == (2 if wanted else 0)
    engine.graphs.drop()
    forward_backward(engine, batch)
    assert hosts.isdisjoint(kept.host.data_ptr() for block in engine.offload._blocks for kept in block)


def test_nothing_leaves_without_being_asked() -> None:
    engine = Engine(bank_of("llama"), gradient_checkpointing=True)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert engine.offload.bytes == 0
