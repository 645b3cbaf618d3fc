"""Laws 1, 2, 4 and 8 on a GPU: compiled blocks, fp32 and bf16, with CUDA graphs and without, few ranks and many.

Tolerances are in laws.py.

The other laws are in test_laws_of_training.py, the same path against the plain one in test_fused.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.step import forward_backward, logprobs, optim_step
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from tests.engine.tiny import backward, clear, gradients, values
from tests.gpu.conftest import SETTINGS
from tests.gpu.laws import MIXED, Setting, assert_same, content, distance, mixed_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
RATE = 1e-2
WIDE = {"a": 32, "b": 64}
"""Ranks whose tiles go together, in 16 bits; too many for a border but that of the output projection."""


@pytest.fixture(params=[*SETTINGS, pytest.param((torch.bfloat16, True, WIDE), id="bfloat16-graphs-ranks 32 and 64")])
def setting(request: pytest.FixtureRequest) -> Setting:
    """One more than other laws have."""
    dtype, graphs, *more = request.param
    few = Setting(dtype=dtype, graphs=graphs, fuse=compile_blocks)
    return replace(few, ranks=more[0]) if more else few


def optimizer_of(bank: AdapterBank) -> SlotOptimizer:
    optimizer = SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name, OptimizerConfig(weight_decay=0.1))
    return optimizer


def everything(bank: AdapterBank, optimizer: SlotOptimizer, name: str) -> dict[str, bytes]:
    """The bytes of an adapter, its gradients, its optimizer state and its step count."""
    step, state = optimizer.state(name)
    grads = {f"grad {key}": g for key, g in gradients(bank, name).items()}
    return {**content({**values(bank, name), **grads, **state}), "step": bytes([step])}


def test_law1_base_rows_are_the_base(setting: Setting) -> None:
    bank = setting.bank()
    with torch.no_grad():
        expected = setting.model()(setting.ids(), use_cache=False).logits.float()
    found = setting.logits(bank, MIXED)
    assert distance(found[2], expected[2]) < setting.tolerance
    assert distance(found[[0, 1, 3]], expected[[0, 1, 3]]) > 2 * setting.tolerance


def test_law1_a_row_beside_others_has_the_bases_loss(setting: Setting) -> None:
    """In a training pass: an adapter whose B is zero, beside one that does something, against the base's log-probabilities."""
    bank = setting.bank()
    with torch.no_grad():
        for key, p in bank.named_parameters("b"):
            if key.endswith(".B"):
                p.zero_()
    engine, batch = setting.engine(bank), mixed_batch()
    losses, _ = setting.settled(bank, batch, engine)
    base = logprobs(engine, mixed_batch([BASE] * 4))
    assert losses["b"].loss_sum == pytest.approx(-float(base[1].sum()), rel=setting.tolerance / 3)
    assert losses["a"].loss_sum != -float(base[[0, 3]].sum())


def test_law1_a_detached_model_is_the_old_one_bit_for_bit(setting: Setting) -> None:
    bank = setting.bank()
    optimizer, engine = optimizer_of(bank), setting.engine(bank)
    for _ in range(5):
        losses = forward_backward(engine, mixed_batch())
        optim_step(optimizer, dict.fromkeys(losses, RATE), {name: loss.tokens for name, loss in losses.items()})
    model, untouched = bank.detach(), setting.model()
    uncompile_blocks(list(model.modules()))
    assert content(model.state_dict()) == content(untouched.state_dict())
    with torch.no_grad():
        assert torch.equal(model(setting.ids()).logits, untouched(setting.ids()).logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_law2_a_mixed_batch_equals_the_separate_ones(setting: Setting, recompute: bool) -> None:
    bank = setting.bank()
    engine, whole = setting.engine(bank, gradient_checkpointing=recompute), mixed_batch()
    losses, found = setting.settled(bank, whole, engine)
    for name, rows in (("a", [0, 3]), ("b", [1])):
        alone = setting.settled(bank, whole.select(rows), engine)
        assert_same(({name: losses[name]}, {name: found[name]}), alone, setting.tolerance)
    mixed = setting.logits(bank, MIXED)
    for row, route in enumerate(MIXED):
        assert distance(mixed[row], setting.logits(bank, route)[row]) < setting.tolerance


def test_law4_a_step_leaves_every_other_slot_byte_identical(setting: Setting) -> None:
    bank = setting.bank({**setting.ranks, "c": 2})
    optimizer, engine = optimizer_of(bank), setting.engine(bank)
    for seed in range(5):  # so that "b" has state, and gradients that wait
        losses = forward_backward(engine, mixed_batch(seed=seed))
        if seed < 4:
            optim_step(optimizer, {"a": RATE, "b": RATE}, {name: loss.tokens for name, loss in losses.items()})
    before = {name: everything(bank, optimizer, name) for name in bank.names}
    base = content({key: p for key, p in bank.model.named_parameters() if ".lora." not in key})
    optim_step(optimizer, {"a": RATE}, {"a": 10.0, "b": 10.0})
    assert everything(bank, optimizer, "b") == before["b"]
    assert everything(bank, optimizer, "c") == before["c"]
    changed = everything(bank, optimizer, "a")
    assert all(changed[key] != before["a"][key] for key in values(bank, "a"))
    assert (optimizer.steps("a"), optimizer.steps("b"), optimizer.steps("c")) == (5, 4, 0)
    assert content({key: p for key, p in bank.model.named_parameters() if ".lora." not in key}) == base
    waiting = gradients(bank, "b")
    forward_backward(engine, mixed_batch(["a"] * 4))
    assert content(gradients(bank, "b")) == content(waiting)  # a pass of "a" alone doesn't reach them either


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_law4_a_slot_that_is_not_finite_stops_alone(setting: Setting, broken: float) -> None:
    bank = setting.bank()
    optimizer, engine, batch = optimizer_of(bank), setting.engine(bank), mixed_batch()
    clean = setting.settled(bank, batch, engine)
    before = setting.logits(bank, MIXED)
    with torch.no_grad():
        bank.parameters("b")[1].fill_(broken)
    stuck = content(values(bank, "b"))
    losses, found = backward(bank, batch, engine)
    assert not losses["b"].finite
    assert_same(({"a": losses["a"]}, {"a": found["a"]}), ({"a": clean[0]["a"]}, {"a": clean[1]["a"]}), setting.same_shape)
    after = setting.logits(bank, MIXED)
    assert not after[1].isfinite().all()
    assert distance(after[[0, 2, 3]], before[[0, 2, 3]]) < setting.same_shape
    for step in (1, 2):
        done = optim_step(optimizer, {"a": RATE, "b": RATE}, {name: loss.tokens for name, loss in losses.items()})
        assert (done["a"].finite, done["a"].step) == (True, step)
        assert (done["b"].finite, done["b"].step) == (False, 0)
        assert optimizer.state("b") == (0, {})
        assert content(values(bank, "b")) == stuck
        assert all(leaf.isfinite().all() for leaf in values(bank, "a").values())
        losses, _ = backward(bank, batch, engine)
        assert losses["a"].mean < clean[0]["a"].mean
    assert bool(logprobs(engine, batch)[[0, 2, 3]].isfinite().all())


def test_law8_spare_capacity_is_neither_read_nor_written(setting: Setting) -> None:
    bank = setting.bank({"a": setting.ranks["a"], "gone": 8, "b": setting.ranks["b"]})
    bank.remove("gone")  # which leaves a hole between the two
    setting.reach(bank)
    engine, batch = setting.engine(bank), mixed_batch()
    expected = backward(bank, batch, engine)
    before = setting.logits(bank, MIXED)
    spare = spoil(bank)
    assert spare > 0
    assert_same(setting.settled(bank, batch, engine), expected, setting.tolerance)
    assert distance(setting.logits(bank, MIXED), before) < setting.same_shape
    optimizer = optimizer_of(bank)
    losses, _ = backward(bank, batch, engine)
    optim_step(optimizer, {"a": RATE, "b": RATE}, {name: loss.tokens for name, loss in losses.items()})
    clear(bank)
    for name in ("a", "b"):
        layers = bank.adapter(name).layers.values()
        assert all(t.isfinite().all() for layer in layers for t in (layer.A, layer.B))
        assert {layer.A.shape[0] for layer in layers} == {setting.ranks[name]}
        assert all(t.isfinite().all() for t in optimizer.state(name)[1].values())
    assert spoiled(bank) == spare


def _spare_rows(layer: LoRALayer) -> list[int]:
    used = {row for slot in layer.slots.values() for row in range(slot.tensors.start, slot.tensors.stop)}
    return [row for row in range(layer.store.capacity) if row not in used]


def spoil(bank: AdapterBank) -> int:
    """Fill what no slot owns with NaN; how many numbers that were."""
    with torch.no_grad():
        for layer in bank.model.modules():
            if isinstance(layer, LoRALayer):
                for buffer in layer.store.buffers:
                    buffer[_spare_rows(layer)] = math.nan
    return spoiled(bank)


def spoiled(bank: AdapterBank) -> int:
    """NaNs in what no slot owns."""
    layers = [layer for layer in bank.model.modules() if isinstance(layer, LoRALayer)]
    return sum(int(buffer[_spare_rows(layer)].isnan().sum()) for layer in layers for buffer in layer.store.buffers)
