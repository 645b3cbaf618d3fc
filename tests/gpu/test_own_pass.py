"""Captured passes of a loop of one's own on a GPU, against a plain loop over uncompiled blocks.

tests/engine/test_own_pass.py does the same on a CPU, with a stand-in for CUDA's graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import compile_blocks
from tests.engine import zoo
from tests.engine.tiny import clear, difference, gradients
from tests.engine.zoo import LIKE, ROWS, batch_of, loss_of, plainly, reached, weighed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
TOLERANCE = 1e-3
PASSES = 6
RANKS = {"a": 2, "b": 3}


def banks_of(family: str, **more: Any) -> tuple[AdapterBank, AdapterBank]:
    """Compiled, and plain: the same weights and adapters."""
    torch._dynamo.reset()  # families share the code that is compiled, which holds only so many forms
    mine, other = (
        reached(zoo.bank_of(family, RANKS, width=128, device="cuda", alpha=zoo.USUAL, **more), family) for _ in range(2)
    )
    compile_blocks(mine.model)
    return mine, other


def there(batch: zoo.Batch) -> zoo.Batch:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def assert_same(mine: AdapterBank, other: AdapterBank) -> None:
    for name in RANKS:
        assert difference(gradients(mine, name), gradients(other, name)) < TOLERANCE, name


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit", "whisper"])
def test_captured_passes_are_a_plain_loops(family: str, recomputed: bool) -> None:
    """Fresh batches, from the host, and routes that change; gradients of two shapes pile up."""
    mine, other = banks_of(family)
    train = lb.TrainingPass(mine, loss_of(mine.model, rows=True), gradient_checkpointing=recomputed)
    plain = loss_of(other.model, rows=True)
    lengths = (7,) if family == "vit" else (7, 12)
    for seed in range(PASSES):
        for bank in (mine, other):
            clear(bank)
        route = LIKE[seed % len(LIKE)]
        for length in lengths:
            batch = batch_of(family, seed, length)
            found, expected = train(batch, route), plainly(other, plain, there(batch), route)
            assert found.shape == (ROWS,)
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert_same(mine, other)
    assert train.graphs.refused is None
    assert len(train.graphs._captured) == len(lengths)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_causal_models_without_masks(family: str) -> None:
    """transformers would make none outside of a capture and one inside. A reference is computed, too."""
    mine, other = banks_of(family)

    def loss(bank: AdapterBank) -> zoo.LossOf:
        def found(batch: Mapping[str, Tensor]) -> Tensor:
            with bank.route(BASE), torch.no_grad():
                reference = bank.model(input_ids=batch["ids"], use_cache=False).logits
            return weighed(bank.model(input_ids=batch["ids"], use_cache=False).logits * reference)

        return found

    train, plain = lb.TrainingPass(mine, loss(mine)), loss(other)
    for seed in range(PASSES):
        batch, route = {"ids": batch_of(family, seed)["input_ids"].cuda()}, LIKE[seed % len(LIKE)]
        torch.testing.assert_close(train(batch, route), plainly(other, plain, batch, route), rtol=TOLERANCE, atol=TOLERANCE)
        assert_same(mine, other)
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)


def test_what_is_frozen_after_a_capture_is_noticed() -> None:
    mine, other = banks_of("bert")
    train, plain = lb.TrainingPass(mine, loss_of(mine.model)), loss_of(other.model)
    for seed in range(PASSES):
        if seed == PASSES - 2:
            for bank in (mine, other):
                clear(bank)
                bank.parameters("a")[0].requires_grad_(False)
        batch = there(batch_of("bert", seed))
        torch.testing.assert_close(train(batch, "a"), plainly(other, plain, batch, "a"), rtol=TOLERANCE, atol=TOLERANCE)
        assert difference(gradients(mine, "a"), gradients(other, "a")) < TOLERANCE
    assert mine.parameters("a")[0].grad is None
    assert train.graphs.refused is None


def test_one_route_for_all_rows_and_masks_that_hide_nothing_until_late() -> None:
    mine, other = banks_of("bert")
    train, plain = lb.TrainingPass(mine, loss_of(mine.model)), loss_of(other.model)
    for seed in range(PASSES):
        batch = there(batch_of("bert", seed))
        if seed < 4:  # two passes before the capture, it, and one after
            batch["attention_mask"][:] = 1
        found, expected = train(batch, "a"), plainly(other, plain, batch, "a")
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert difference(gradients(mine, "a"), gradients(other, "a")) < TOLERANCE
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)


def test_a_head_that_is_trained_too() -> None:
    banks = banks_of("vit", targets=["q", "v"])
    heads = [nn.Linear(3, 1).cuda() for _ in banks]
    heads[1].load_state_dict(heads[0].state_dict())

    def loss(which: int) -> zoo.LossOf:
        def found(batch: Mapping[str, Tensor]) -> Tensor:
            return heads[which](banks[which].model(batch["pixel_values"]).logits).tanh().sum()

        return found

    train = lb.TrainingPass(banks[0], loss(0))
    optimizers = [
        torch.optim.AdamW([*bank.parameters(), *head.parameters()], lr=1e-3) for bank, head in zip(banks, heads, strict=True)
    ]
    for seed in range(PASSES):
        batch, route = {"pixel_values": batch_of("vit", seed)["pixel_values"].cuda()}, LIKE[seed % len(LIKE)]
        torch.testing.assert_close(train(batch, route), plainly(banks[1], loss(1), batch, route), rtol=TOLERANCE, atol=TOLERANCE)
        for mine, theirs in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)
        assert_same(*banks)
        for optimizer in optimizers:
            if seed % 2:  # else gradients pile up
                optimizer.step()
                optimizer.zero_grad()
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)


def test_what_waits_for_the_gpu_runs_all_the_same() -> None:
    mine, other = banks_of("bert", targets=["q"])
    whole, plain = loss_of(mine.model), loss_of(other.model)
    train = lb.TrainingPass(mine, lambda batch: whole(batch) * (1 if batch["targets"].sum().item() < 100 else 2))
    with pytest.warns(UserWarning, match=r"can't be captured as CUDA graphs.*TrainingPass\(cuda_graphs=False\)"):
        for seed in range(PASSES):
            batch = there(batch_of("bert", seed))
            found, expected = train(batch, LIKE[0]), plainly(other, plain, batch, LIKE[0])
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same(mine, other)
    assert train.graphs.refused is not None


def test_a_capture_that_fails_leaves_the_allocator_as_it_was() -> None:
    """Else torch 2.11 gives no ordinary memory back any more."""
    mine, _ = banks_of("bert", targets=["q"])
    whole = loss_of(mine.model)
    train = lb.TrainingPass(mine, lambda batch: whole(batch) * (1 if batch["targets"].sum().item() < 100 else 2))
    with pytest.warns(UserWarning, match="can't be captured as CUDA graphs"):
        for seed in range(PASSES):
            train(there(batch_of("bert", seed)), LIKE[0])
    large = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    held = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held - 2**30


def test_a_thread_that_pins_memory_disturbs_no_capture() -> None:
    """As a loader's does, which asks CUDA for it."""
    mine, _ = banks_of("bert")
    train, done, failed = lb.TrainingPass(mine, loss_of(mine.model)), threading.Event(), list[BaseException]()

    def pin() -> None:
        size = 2**20
        try:
            while not done.is_set():
                torch.empty(size, dtype=torch.uint8).pin_memory()
                size += 2**20  # another each time, which torch has none of
                if size > 2**28:
                    size = 2**20
                    torch._C._host_emptyCache()
        except BaseException as error:  # noqa: BLE001  looked at below
            failed.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for seed in range(PASSES):
            train(batch_of("bert", seed), LIKE[seed % len(LIKE)])
    finally:
        done.set()
        thread.join()
    assert not failed
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)
