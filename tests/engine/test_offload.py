"""Activation checkpointing whose block inputs wait on the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.step import Engine, forward_backward
from tests.engine.tiny import batch_of, clear, difference, gradients, make_bank, make_model

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's look
LENGTHS, ROUTES = (5, 9, 7, 12), ["a", "b", BASE, "a"]


@pytest.fixture(autouse=True, scope="module")
def shared_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(family: str) -> AdapterBank:
    return make_bank(family, model=make_model(family, spread=1.5))


def fused(bank: AdapterBank) -> AdapterBank:
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    return bank


def as_it_is(bank: AdapterBank) -> AdapterBank:
    return bank


on_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for a GPU here: see tests/gpu")


@pytest.mark.parametrize(
    ("family", "prepared"),
    [("llama", as_it_is), ("gpt2", as_it_is), ("bart", as_it_is), pytest.param("llama", fused, marks=on_interpreter)],
)
def test_gradients_are_those_without(family: str, prepared: Callable[[AdapterBank], AdapterBank]) -> None:
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


def test_host_memory_is_used_again() -> None:
    engine = Engine(bank_of("llama"), activation_offloading=True)
    seen = []
    for _ in range(3):
        forward_backward(engine, batch_of(LENGTHS, ROUTES))
        seen.append({kept.host.data_ptr() for kept in engine.offload._kept})
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2
    assert all(kept.back is None for kept in engine.offload._kept)  # nothing waits on the device any more


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
    assert alive == [False] * len(blocks)


def test_buffers_of_other_shapes_are_given_back() -> None:
    engine = Engine(bank_of("llama"), activation_offloading=True)
    for lengths in ((5, 9), (7, 3), (12, 4), (5, 9)):
        forward_backward(engine, batch_of(lengths, ["a", "b"]))
    assert {kind[0][1] for kind in engine.offload._free} <= {12, 9}


def test_nothing_leaves_without_being_asked() -> None:
    engine = Engine(bank_of("llama"), gradient_checkpointing=True)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert engine.offload.bytes == 0
