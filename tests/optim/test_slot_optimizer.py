"""`SlotOptimizer`: clipping, accounting, state by leaf, growth of the bank beneath it, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorabank import AdapterConfig
from lorabank.bank.bank import AdapterBank
from lorabank.errors import AdapterNameError, CheckpointError, ConfigError, LorabankError
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from tests.optim.test_rules import make_bank

RATE = 1e-2


def _give(bank: AdapterBank, name: str, value: float = 1.0) -> None:
    for p in bank.parameters(name):
        p.grad = torch.full_like(p, value)


def _made(rule: str = "sgd", **config: Any) -> tuple[AdapterBank, SlotOptimizer]:
    bank = make_bank(("a", "b"))
    optimizer = SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name, OptimizerConfig(rule=rule, **{"betas": (0.0, 0.0), **config}))
    return bank, optimizer


def test_a_gradient_above_the_limit_is_scaled_down_to_it_and_one_below_is_not() -> None:
    bank, optimizer = _made(max_grad_norm=0.5)
    n = sum(p.numel() for p in bank.parameters("a"))
    for value, tokens in ((3.0, 2.0), (0.01, 2.0)):
        before = [p.detach().clone() for p in bank.parameters("a")]
        _give(bank, "a", value)
        done = optimizer.step({"a": RATE}, {"a": tokens})["a"]
        mean = value / tokens
        norm = mean * math.sqrt(n)
        assert done.grad_norm == pytest.approx(norm, rel=1e-5)
        expected = mean * min(1.0, 0.5 / norm)
        for p, old in zip(bank.parameters("a"), before, strict=True):
            assert torch.allclose(old - p, torch.full_like(p, RATE * expected), rtol=1e-3, atol=1e-7)


def test_clipping_is_by_the_adapters_own_norm() -> None:
    (bank, joint), (other, alone) = _made(max_grad_norm=1.0), _made(max_grad_norm=1.0)
    _give(bank, "a", 0.01)
    _give(bank, "b", 100.0)
    _give(other, "a", 0.01)
    joint.step({"a": RATE, "b": RATE}, {"a": 1.0, "b": 1.0})
    alone.step({"a": RATE}, {"a": 1.0})
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters("a"), other.parameters("a"), strict=True))


def test_loraplus_scales_the_step_of_b_alone() -> None:
    bank, optimizer = _made(loraplus_ratio=4.0, max_grad_norm=0.0)
    before = {key: p.detach().clone() for key, p in bank.named_parameters("a")}
    _give(bank, "a")
    optimizer.step({"a": RATE}, {"a": 1.0})
    for key, p in bank.named_parameters("a"):
        moved = RATE * (4.0 if key.endswith(".B") else 1.0)
        assert torch.allclose(before[key] - p, torch.full_like(p, moved), rtol=1e-3)


def test_gradients_are_cleared_and_only_those_of_the_stepped() -> None:
    bank, optimizer = _made()
    _give(bank, "a")
    _give(bank, "b")
    optimizer.step({"a": RATE}, {"a": 1.0})
    assert all(p.grad is None for p in bank.parameters("a"))
    assert all(p.grad is not None for p in bank.parameters("b"))
    optimizer.zero_grad("b")
    assert all(p.grad is None for p in bank.parameters("b"))


def test_a_leaf_that_no_row_reached_counts_as_gradient_zero() -> None:
    (bank, optimizer), (other, twin) = _made("adamw"), _made("adamw")
    for step in range(3):
        for each in (bank, other):
            _give(each, "a")
        first = bank.parameters("a")[0], other.parameters("a")[0]
        if step == 1:
            first[0].grad = None
            first[1].grad = torch.zeros_like(first[1])
        for each in (optimizer, twin):
            each.step({"a": RATE}, {"a": 1.0})
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters("a"), other.parameters("a"), strict=True))


def test_state_is_made_at_the_first_step_and_only_for_the_slots_own_leaves() -> None:
    bank, optimizer = _made("adamw")
    assert optimizer.state("a") == (0, {})
    _give(bank, "a")
    optimizer.step({"a": RATE}, {"a": 1.0})
    step, state = optimizer.state("a")
    assert step == 1
    assert {key: t.shape for key, t in state.items()} == {
        f"{key}.{what}": p.shape for key, p in bank.named_parameters("a") for what in ("exp_avg", "exp_avg_sq")
    }
    assert optimizer.state("b") == (0, {})


def test_adapters_that_come_and_go_leave_a_slots_training_alone() -> None:
    """Growth moves the leaves to a larger buffer; removal leaves a gap. Neither changes a byte of the others."""
    (bank, optimizer), (other, twin) = _made("adamw"), _made("adamw")
    for step in range(6):
        if step == 2:
            for name in ("c", "d", "e"):  # 2 + 3 + 15 ranks don't fit into the first buffer of 16
                bank.add(name, AdapterConfig(rank=5, targets="*"))
                optimizer.add(name)
        if step == 4:
            bank.remove("b")
            optimizer.remove("b")
        for each, stepper in ((bank, optimizer), (other, twin)):
            _give(each, "a", 0.1 * step + 0.1)
            stepper.step({"a": RATE}, {"a": 1.0})
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters("a"), other.parameters("a"), strict=True))
    found, expected = optimizer.state("a"), twin.state("a")
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], t) for key, t in expected[1].items())
    assert optimizer.names == ("a", "c", "d", "e")


def test_a_loaded_state_is_a_copy_that_goes_on_alike() -> None:
    (bank, optimizer), (other, twin) = _made("adamw"), _made("adamw")
    _give(bank, "a")
    optimizer.step({"a": RATE}, {"a": 1.0})
    with torch.no_grad():
        for p, q in zip(other.parameters("a"), bank.parameters("a"), strict=True):
            p.copy_(q)
    twin.load_state("a", *optimizer.state("a"))
    for each, stepper in ((bank, optimizer), (other, twin)):
        _give(each, "a", -0.3)
        stepper.step({"a": RATE}, {"a": 1.0})
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters("a"), other.parameters("a"), strict=True))
    twin.load_state("a", 0, {})
    assert twin.state("a") == (0, {})
    step, state = optimizer.state("a")
    with pytest.raises(CheckpointError, match="doesn't belong to this adapter"):
        twin.load_state("b", step, state)  # of another rank


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, None])
def test_token_weights_must_sum_to_a_number_above_zero(bad: float | None) -> None:
    bank, optimizer = _made()
    _give(bank, "a")
    _give(bank, "b")
    before = [p.detach().clone() for p in bank.parameters()]
    tokens = {"a": 1.0} if bad is None else {"a": 1.0, "b": bad}
    with pytest.raises(ConfigError, match=r"tokens\['b'\]: expected"):
        optimizer.step({"a": RATE, "b": RATE}, tokens)
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters(), before, strict=True))
    assert all(p.grad is not None for p in bank.parameters())


def test_a_step_without_a_gradient_is_an_error_not_a_step() -> None:
    bank, optimizer = _made()
    _give(bank, "a")
    with pytest.raises(LorabankError, match="'b' has no gradient"):
        optimizer.step({"a": RATE, "b": RATE}, {"a": 1.0, "b": 1.0})
    assert (optimizer.steps("a"), optimizer.steps("b")) == (0, 0)


def test_names_are_checked() -> None:
    _, optimizer = _made()
    with pytest.raises(LorabankError, match=r"'aa' is not in this optimizer \(did you mean 'a'\?\)"):
        optimizer.step({"aa": RATE}, {"aa": 1.0})
    with pytest.raises(AdapterNameError, match="no adapter 'c'"):
        optimizer.add("c")


@pytest.mark.parametrize(
    "bad",
    [
        {"rule": "adam"},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"loraplus_ratio": 0.0},
        {"max_grad_norm": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match={"rule": "adamw"}.get(next(iter(bad)), next(iter(bad)))):
        OptimizerConfig(**bad)
