"""A base in fp16: each adapter's losses are scaled for backward, its gradients scaled back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.loss_scale import FIRST, GOOD_PASSES, SMALLEST, LossScale, LossScales
from lorabank.engine.state import load_state, save_state
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer
from tests.engine.tiny import add, batch_of, clear, gradients, make_model

LENGTHS, ROUTES = (5, 9, 7, 12), ["a", "b", BASE, "a"]


def bank_in(dtype: torch.dtype, family: str = "llama") -> AdapterBank:
    model: nn.Module = make_model(family, spread=1.0)
    bank = attach(model.to(dtype))
    for rank, name in ((2, "a"), (4, "b")):
        add(bank, name, rank=rank, strength=0.05, targets="all-linear")
    return bank


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    gap = sum(float((found[key].double() - value.double()).square().sum()) for key, value in expected.items())
    return (gap / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])  # cohere's logits are scaled: the plain loss
def test_gradients_are_those_of_fp32_within_fp16s_rounding(family: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        engine = Engine(bank_in(dtype, family))
        assert engine.scales_losses == (dtype == torch.float16)
        losses = forward_backward(engine, batch_of(LENGTHS, ROUTES))
        found.append((losses, {name: gradients(engine.bank, name) for name in "ab"}))
    for name in "ab":
        assert found[1][0][name].loss_sum == pytest.approx(found[0][0][name].loss_sum, rel=2e-3)
        assert distance(found[1][1][name], found[0][1][name]) < 0.03
        assert all(g.dtype == torch.float32 for g in found[1][1][name].values())


def test_small_gradients_survive_by_the_scale_alone() -> None:
    """Weights of 1e-6 a token: their gradients lie below fp16's smallest numbers."""
    batch = batch_of(LENGTHS, ROUTES)
    faint = replace(batch, weights_NL=batch.weights_NL * 1e-6)
    exact = Engine(bank_in(torch.float32))
    forward_backward(exact, faint)
    gaps = {}
    for first in (1.0, 2.0**14):
        engine = Engine(bank_in(torch.float16))
        for name in "ab":
            engine.loss_scales[name].value = first
        forward_backward(engine, faint)
        gaps[first] = distance(gradients(engine.bank, "a"), gradients(exact.bank, "a"))
    assert gaps[2.0**14] < 0.1
    assert gaps[1.0] > 0.3


def test_an_overflow_costs_its_adapter_a_step_and_no_other() -> None:
    engine = Engine(bank_in(torch.float16))
    optimizer = SlotOptimizer(engine.bank)
    optimizer.add("a")
    optimizer.add("b")
    engine.loss_scales["a"].value = 2.0**24  # times a gradient of ordinary size: above 65,504
    before = {name: [p.detach().clone() for p in engine.bank.parameters(name)] for name in "ab"}
    losses = forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert losses["a"].finite
    done = optim_step(optimizer, {"a": 1e-3, "b": 1e-3}, {name: losses[name].tokens for name in "ab"})
    assert (done["a"].finite, done["b"].finite) == (False, True)
    assert all(torch.equal(p, q) for p, q in zip(engine.bank.parameters("a"), before["a"], strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(engine.bank.parameters("b"), before["b"], strict=True))
    assert (engine.loss_scales["a"].value, engine.loss_scales["b"].value) == (2.0**23, FIRST)

    alone = Engine(bank_in(torch.float16))
    forward_backward(alone, batch_of(LENGTHS, [BASE, "b", BASE, BASE]))
    clear(engine.bank)
    with torch.no_grad():
        for p, q in zip(engine.bank.parameters("b"), before["b"], strict=True):
            p.copy_(q)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert distance(gradients(engine.bank, "b"), gradients(alone.bank, "b")) < 1e-3


def test_gradients_pile_up_whatever_the_scale_is_by_then() -> None:
    steady, moved = Engine(bank_in(torch.float16)), Engine(bank_in(torch.float16))
    for engine in (steady, moved):
        for seed in (0, 1):
            forward_backward(engine, batch_of(LENGTHS, ROUTES, seed=seed))
            if engine is moved:
                engine.loss_scales["a"].value = 2.0**3
    assert distance(gradients(moved.bank, "a"), gradients(steady.bank, "a")) < 5e-3


def test_how_a_scale_moves() -> None:
    scale = LossScale()
    for _ in range(GOOD_PASSES):
        assert scale.value == FIRST
        scale.saw(True)
    assert scale == LossScale(2 * FIRST, 0)
    scale.saw(True)
    scale.saw(False)
    assert scale == LossScale(FIRST, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_no_scale_helps_exhausts_it(value: float) -> None:
    scales, leaf = LossScales(), nn.Parameter(torch.zeros(2))
    passes = 0
    while not scales.exhausted("a"):
        leaf.grad = torch.tensor([1.0, value])
        scales.divide({"a": [leaf]})
        passes += 1
    assert scales["a"].value < SMALLEST
    assert passes == 16


def test_scales_are_part_of_the_state() -> None:
    engine = Engine(bank_in(torch.float16))
    optimizer = SlotOptimizer(engine.bank)
    optimizer.add("a")
    optimizer.add("b")
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    engine.loss_scales["b"].value = 16.0
    state = save_state(engine.bank, optimizer, engine.loss_scales)
    assert state.values["b"]["loss_scale"] == [16.0, 1]
    fresh = LossScales()
    load_state(engine.bank, optimizer, state, fresh)
    assert fresh.state() == engine.loss_scales.state() == {"a": (FIRST, 1), "b": (16.0, 1)}
