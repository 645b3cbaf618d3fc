"""A model on the second GPU while the first is current: the same results, captured there, and nothing on the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import Engine
from tests.engine import zoo
from tests.engine.test_packing import pair
from tests.engine.tiny import backward, batch_of, clear, difference, gradients, make_bank

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
PASSES = 5
TOLERANCE = 1e-3
SIZES = {
    "vocab_size": 61,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def bank_on(device: str) -> AdapterBank:
    """Rows of 80 tokens reach beyond its windows of 70, so that probes are long enough for compiled blocks."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=70)).eval()  # pyright: ignore[reportArgumentType]
    return make_bank(model=model.to(device), strength=0.05, targets="all-linear")  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def the_first_stays_current() -> Iterator[None]:
    torch._dynamo.reset()
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("first", [False, True])
def test_passes_are_captured_there(first: bool) -> None:
    """`first`: when the process has captured on the first GPU already, whose stream torch would take again."""
    batches = [batch_of((80, 33, 51), ["a", "b", BASE], seed=seed) for seed in range(PASSES)]
    expected_bank = bank_on("cuda:0")
    engine = Engine(expected_bank, cuda_graphs=first)
    if first:
        compile_blocks(expected_bank.model)
    expected = [backward(expected_bank, batch, engine) for batch in batches]
    bank = bank_on("cuda:1")
    compile_blocks(bank.model)
    engine = Engine(bank)
    for batch, (losses, leaves) in zip(batches, expected, strict=True):
        found_losses, found = backward(bank, batch, engine)
        for name, loss in losses.items():
            assert list(found_losses[name].row_losses.values()) == pytest.approx(list(loss.row_losses.values()), rel=TOLERANCE)
            there = {key: value.to("cuda:1") for key, value in leaves[name].items()}
            assert difference(found[name], there) < TOLERANCE
    assert (engine.graphs.refused, len(engine.graphs._captured)) == (None, 1)


@pytest.mark.filterwarnings("ignore:packed rows of .* take a mask in every attention")  # so they do in fp32
def test_packed_rows_there() -> None:
    bank = bank_on("cuda:1")
    compile_blocks(bank.model)
    packed, plain = pair([[40, 30, 7], [64], [9, 1, 50], [33]], ["a", "b", "a", BASE])
    expected_losses, expected = backward(bank, plain, Engine(bank))
    losses, found = backward(bank, packed, Engine(bank))
    for name, leaves in expected.items():
        assert losses[name].row_losses == pytest.approx(expected_losses[name].row_losses, rel=TOLERANCE, abs=1e-5)
        assert difference(found[name], leaves) < TOLERANCE


def test_a_loop_of_ones_own_is_captured_there() -> None:
    ranks = {"a": 2, "b": 3}
    mine, other = (
        zoo.reached(zoo.bank_of("bert", ranks, width=128, device=device, alpha=zoo.USUAL), "bert")
        for device in ("cuda:1", "cuda:0")
    )
    compile_blocks(mine.model)
    train, plain = lb.TrainingPass(mine, zoo.loss_of(mine.model, rows=True)), zoo.loss_of(other.model, rows=True)
    for seed in range(PASSES):
        for bank in (mine, other):
            clear(bank)
        batch = zoo.batch_of("bert", seed)
        on_first = {name: tensor.to("cuda:0") for name, tensor in batch.items()}
        found, expected = train(batch, zoo.MIXED), zoo.plainly(other, plain, on_first, zoo.MIXED)
        torch.testing.assert_close(found.to("cuda:0"), expected, rtol=TOLERANCE, atol=TOLERANCE)
        for name in ranks:
            theirs = {key: value.to("cuda:1") for key, value in gradients(other, name).items()}
            assert difference(gradients(mine, name), theirs) < TOLERANCE
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)


def test_a_model_that_moves_takes_its_tables_along() -> None:
    bank = bank_on("cuda:0")
    compile_blocks(bank.model)
    engine, batch = Engine(bank), batch_of((80, 33, 51), ["a", "b", BASE])
    expected = backward(bank, batch, engine)
    bank.model.to("cuda:1")
    found = [backward(bank, batch, engine) for _ in range(PASSES)][-1]
    for name, leaves in expected[1].items():
        assert difference(found[1][name], {key: value.to("cuda:1") for key, value in leaves.items()}) < TOLERANCE
