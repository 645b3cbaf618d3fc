"""Laws 4 and 6 at the engine's level: slots never touch one another, and a saved state goes on to the same bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.state import EngineState, load_state, save_state
from lorabank.engine.step import Engine, forward_backward, logprobs, optim_step
from lorabank.errors import CheckpointError, LorabankError
from lorabank.optim.rules import OPTIMIZERS
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from tests.engine.tiny import batch_of, gradients, make_bank, values

RATE = 1e-2


def _optimizer(bank: AdapterBank, rule: str = "adamw") -> SlotOptimizer:
    optimizer = SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name, OptimizerConfig(rule=rule, weight_decay=0.1))
    return optimizer


def _bytes(bank: AdapterBank, optimizer: SlotOptimizer, name: str) -> dict[str, bytes]:
    tensors: dict[str, Tensor] = {**values(bank, name), **{f"grad {k}": g for k, g in gradients(bank, name).items()}}
    step, state = optimizer.state(name)
    return {"step": bytes(step), **{key: t.contiguous().numpy().tobytes() for key, t in {**tensors, **state}.items()}}


def _pass(engine: Engine, optimizer: SlotOptimizer, names: list[str], seed: int, *, step: bool = True) -> None:
    batch = batch_of([6, 9, 5, 7][: 2 * len(names)], [name for name in names for _ in range(2)], seed=seed)
    losses = forward_backward(engine, batch, steps={name: optimizer.steps(name) for name in names})
    if step:
        optim_step(optimizer, dict.fromkeys(names, RATE), {name: 2 * losses[name].tokens for name in names})


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_law4_a_step_leaves_every_other_slot_byte_identical(rule: str) -> None:
    bank = make_bank(names=("a", "b", "c"))
    optimizer, engine = _optimizer(bank, rule), Engine(bank)
    _pass(engine, optimizer, ["a", "b"], 1)
    _pass(engine, optimizer, ["a", "b"], 2, step=False)
    before = {name: _bytes(bank, optimizer, name) for name in bank.names}
    base = {name: p.detach().clone() for name, p in bank.model.named_parameters() if ".lora." not in name}
    optim_step(optimizer, {"a": RATE}, {"a": 10.0, "b": 10.0})
    assert _bytes(bank, optimizer, "b") == before["b"]
    assert _bytes(bank, optimizer, "c") == before["c"]
    changed = _bytes(bank, optimizer, "a")
    assert all(changed[key] != before["a"][key] for key in values(bank, "a"))
    assert not gradients(bank, "a")
    assert all(torch.equal(p, base[name]) for name, p in bank.model.named_parameters() if name in base)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_law4_a_slot_that_is_not_finite_stops_alone(broken: float, family: str, checkpointing: bool) -> None:
    bank, healthy = make_bank(family), make_bank(family)
    with torch.no_grad():
        bank.parameters("b")[1].fill_(broken)
    optimizer, engine = _optimizer(bank), Engine(bank, gradient_checkpointing=checkpointing)
    other, plain = _optimizer(healthy), Engine(healthy)
    batch = batch_of([6, 9, 5, 7, 4], ["a", "b", BASE, "b", "a"])
    for _ in range(3):
        stuck = values(bank, "b")
        losses = forward_backward(engine, batch)
        expected = forward_backward(plain, batch)
        assert losses["a"] == expected["a"]
        assert losses["a"].finite
        assert not losses["b"].finite
        assert gradients(bank, "a").keys() == gradients(healthy, "a").keys()
        assert all(torch.equal(g, gradients(healthy, "a")[key]) for key, g in gradients(bank, "a").items())
        done = optim_step(optimizer, {"a": RATE, "b": RATE}, {"a": 10.0, "b": 10.0})
        optim_step(other, {"a": RATE}, {"a": 10.0})
        assert done["a"].finite
        assert not done["b"].finite
        assert done["b"].step == 0
        assert optimizer.state("b") == (0, {})
        assert not gradients(bank, "b")
        assert all(torch.equal(leaf.view(torch.int32), stuck[key].view(torch.int32)) for key, leaf in values(bank, "b").items())
        assert all(torch.equal(leaf, values(healthy, "a")[key]) for key, leaf in values(bank, "a").items())
    found = logprobs(engine, batch)
    assert bool(found[[0, 2, 4]].isfinite().all())


def test_law4_a_nan_gradient_changes_neither_its_adapter_nor_its_state() -> None:
    bank = make_bank()
    optimizer, engine = _optimizer(bank), Engine(bank)
    _pass(engine, optimizer, ["a", "b"], 1)
    _pass(engine, optimizer, ["a", "b"], 2, step=False)
    leaf = bank.parameters("b")[-1]
    assert leaf.grad is not None
    leaf.grad[0, 0] = math.nan
    before = {key: value for key, value in _bytes(bank, optimizer, "b").items() if not key.startswith("grad ")}
    done = optim_step(optimizer, {"b": RATE}, {"b": 10.0})["b"]
    assert (done.finite, done.step) == (False, 1)
    assert math.isnan(done.grad_norm)
    assert _bytes(bank, optimizer, "b") == before


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_law6_a_loaded_state_goes_on_to_the_same_bytes(rule: str) -> None:
    """Saved in the middle of an accumulation, loaded into a fresh bank, two optimizer steps further."""
    bank = make_bank(dropout=0.2)
    optimizer, engine = _optimizer(bank, rule), Engine(bank)
    _pass(engine, optimizer, ["a"], 0)
    _pass(engine, optimizer, ["a", "b"], 1)
    _pass(engine, optimizer, ["a", "b"], 2, step=False)
    saved = save_state(bank, optimizer)
    kept = {key: tensor.clone() for key, tensor in saved.tensors.items()}

    fresh = make_bank(dropout=0.2)
    resumed, again = _optimizer(fresh, rule), Engine(fresh)
    _pass(again, resumed, ["a", "b"], 7)  # whatever it did before is overwritten
    load_state(fresh, resumed, saved)
    assert (resumed.steps("a"), resumed.steps("b")) == (2, 1)
    for seed in (3, 4):
        _pass(engine, optimizer, ["a", "b"], seed)
        _pass(again, resumed, ["a", "b"], seed)
    first, second = save_state(bank, optimizer), save_state(fresh, resumed)
    assert first.values == second.values == {name: {"steps": n, "rule": rule} for name, n in (("a", 4), ("b", 3))}
    assert first.tensors.keys() == second.tensors.keys()
    for key, tensor in first.tensors.items():
        assert tensor.numpy().tobytes() == second.tensors[key].numpy().tobytes(), key
    assert all(torch.equal(tensor, saved.tensors[key]) for key, tensor in kept.items())  # a snapshot, not a view


def test_a_state_has_parameters_state_and_pending_gradients_by_leaf() -> None:
    bank = make_bank()
    optimizer, engine = _optimizer(bank), Engine(bank)
    _pass(engine, optimizer, ["a"], 0)
    _pass(engine, optimizer, ["a"], 1, step=False)
    state = save_state(bank, optimizer)
    leaves = [key for key, _ in bank.named_parameters("a")]
    expected = {f"{name}/param/{key}" for name in ("a", "b") for key in leaves}
    expected |= {f"a/grad/{key}" for key in leaves} | {
        f"a/optim/{key}.{what}" for key in leaves for what in ("exp_avg", "exp_avg_sq")
    }
    assert state.tensors.keys() == expected


def _changed(state: EngineState, key: str, tensor: Tensor | None) -> EngineState:
    tensors = {k: t for k, t in state.tensors.items() if k != key}
    return replace(state, tensors=tensors if tensor is None else {**tensors, key: tensor})


def test_a_state_that_does_not_fit_is_refused_before_anything_changes() -> None:
    bank = make_bank()
    optimizer, engine = _optimizer(bank), Engine(bank)
    _pass(engine, optimizer, ["a", "b"], 0)
    state = save_state(bank, optimizer)
    _pass(engine, optimizer, ["a", "b"], 1)
    before = {name: _bytes(bank, optimizer, name) for name in bank.names}
    leaf = next(key for key, _ in bank.named_parameters("b"))
    wrong = torch.zeros(3, 1)
    bad = {
        "has adapters": replace(state, values={"a": state.values["a"]}),
        "was trained with sgd": replace(state, values={**state.values, "b": {"steps": 1, "rule": "sgd"}}),
        "param .*none": _changed(state, f"b/param/{leaf}", None),
        r"param .*\(3, 1\)": _changed(state, f"b/param/{leaf}", wrong),
        r"grad .*\(3, 1\)": _changed(state, f"b/grad/{leaf}", wrong),
        r"optimizer state .*\(3, 1\)": _changed(state, f"b/optim/{leaf}.exp_avg", wrong),
        "optimizer state .*got none": _changed(state, f"b/optim/{leaf}.exp_avg", None),
        "optimizer state .*expected none": _changed(state, "b/optim/nowhere.A.exp_avg", wrong),
    }
    for message, snapshot in bad.items():
        with pytest.raises(CheckpointError, match=message):
            load_state(bank, optimizer, snapshot)
        assert {name: _bytes(bank, optimizer, name) for name in bank.names} == before


def test_a_state_of_other_token_ids_is_refused() -> None:
    """As many rows of other ids fit in shape, and would be another text's."""
    bank = make_bank(names=("a",), trainable_token_indices=[20, 21])
    optimizer, engine = _optimizer(bank), Engine(bank)
    _pass(engine, optimizer, ["a"], 0)
    state = save_state(bank, optimizer)
    assert state.values["a"]["ids"] == {"model.embed_tokens.rows": [20, 21]}
    load_state(bank, optimizer, state)
    for ids in ([20, 22], [21, 20]):
        other = make_bank(names=("a",), trainable_token_indices=ids)
        resumed = _optimizer(other)
        before = _bytes(other, resumed, "a")
        said = rf"'a', model\.embed_tokens\.rows: its rows are of other token ids \(20, 21\) than .*\({ids[0]}, {ids[1]}\)\. Add"
        with pytest.raises(CheckpointError, match=said):
            load_state(other, resumed, state)
        assert _bytes(other, resumed, "a") == before


def test_an_adapter_that_took_anothers_name_does_not_inherit_its_state() -> None:
    bank = make_bank()
    optimizer, engine = _optimizer(bank), Engine(bank)
    _pass(engine, optimizer, ["a", "b"], 0)
    config = bank.config("a")
    bank.remove("a")
    bank.add("a", config)
    with pytest.raises(LorabankError, match="'a' was removed from the bank and added again"):
        optimizer.step({"a": RATE}, {"a": 1.0})
    optimizer.add("a")
    assert optimizer.steps("a") == 0
    _pass(engine, optimizer, ["a", "b"], 1)
    assert (optimizer.steps("a"), optimizer.steps("b")) == (1, 2)
