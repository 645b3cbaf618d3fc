"""Modules that adapters train in full, in the engine: joint training, resumption, the loss over a head of one's own, samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.generate import sample
from lorabank.engine.sampling import SamplingConfig
from lorabank.engine.state import load_state, save_state
from lorabank.engine.step import Engine, forward_backward, logprobs, optim_step
from lorabank.optim.rules import OPTIMIZERS
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from tests.engine.test_joint_training import JOBS
from tests.engine.tiny import END_IDS, add, backward, batch_of, difference, make_bank, make_model, tokens, train, values

SAVED: Mapping[str, list[str]] = {"long": ["lm_head"], "single": ["lm_head", "model.norm"], "wide": ["embed_tokens"]}
"""Some alike, some alone, one adapter without."""
ROUTES = ["a", "b", BASE, "a", "b"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_law3_joint_training_equals_training_alone(checkpointing: bool) -> None:
    jobs = [replace(job, modules_to_save=SAVED.get(job.name), steps=min(job.steps, 10)) for job in JOBS]

    def base() -> nn.Module:
        return make_model(spread=2.0)

    joint = train(base, jobs, gradient_checkpointing=checkpointing)
    alone = {name: leaves for job in jobs for name, leaves in train(base, [job]).items()}
    started = train(base, [replace(job, steps=0) for job in jobs])
    for job in jobs:
        assert difference(joint[job.name], alone[job.name]) < 1e-4, job.name
        mine = [key for key in joint[job.name] if key.endswith(".weight")]
        assert len(mine) == len(SAVED.get(job.name, ()))
        assert all(not torch.equal(joint[job.name][key], started[job.name][key]) for key in mine)


def _head_bank(names: tuple[str, ...] = ("a", "b")) -> AdapterBank:
    return make_bank(names=names, modules_to_save=["lm_head"])


def test_the_loss_is_that_of_a_head_of_ones_own() -> None:
    """Held to plain models with the copies in place: the loss in chunks over the base's head would be another's."""
    bank = _head_bank()
    batch = batch_of([6, 9, 5, 7, 4], ROUTES)
    found = logprobs(Engine(bank), batch)
    for name, rows in {"a": [0, 3], "b": [1, 4]}.items():
        adapter, plain = bank.adapter(name), make_model()
        with torch.no_grad():
            plain.get_submodule("lm_head").load_state_dict(adapter.modules["lm_head"])
            for path, layer in adapter.layers.items():
                plain.get_submodule(path).get_parameter("weight").add_(layer.delta())
            logits = plain(batch.input_ids_NL, attention_mask=batch.attention_mask_NL).logits[:, :-1].float().log_softmax(-1)
        picked = logits.gather(-1, batch.input_ids_NL[:, 1:, None]).squeeze(-1) * (batch.weights_NL[:, 1:] != 0)
        torch.testing.assert_close(found[rows, 1:], picked[rows], rtol=1e-4, atol=1e-4)
    plain_bank = attach(make_model())
    plain_bank.add("x", AdapterConfig(rank=2))
    assert torch.equal(
        logprobs(Engine(plain_bank), batch_of([5], BASE, seed=3)), logprobs(Engine(bank), batch_of([5], BASE, seed=3))
    )


def test_that_the_logits_of_all_tokens_are_held_is_said_once_for_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    small = make_model()
    model = type(small)(small.config.__class__(**{**small.config.to_dict(), "vocab_size": 16384}))
    bank = attach(model)
    add(bank, "a", rank=2, targets=["q"], modules_to_save=["lm_head"])
    engine = Engine(bank)
    with pytest.warns(UserWarning, match=r"holds the 16,384 logits of every token at once.*its output head is adapted"):
        forward_backward(engine, batch_of([5], "a"))
    forward_backward(engine, batch_of([5], "a"))  # a warning would be an error here


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_law6_a_loaded_state_goes_on_to_the_same_bytes(rule: str) -> None:
    def start() -> tuple[AdapterBank, SlotOptimizer, Engine]:
        bank = make_bank(dropout=0.2, modules_to_save=["lm_head", "layernorm"])
        optimizer = SlotOptimizer(bank)
        for name in bank.names:
            optimizer.add(name, OptimizerConfig(rule=rule, weight_decay=0.1))
        return bank, optimizer, Engine(bank)

    def go(engine: Engine, optimizer: SlotOptimizer, seed: int, *, step: bool = True) -> None:
        batch = batch_of([6, 9, 5, 7], ["a", "b", "a", "b"], seed=seed)
        losses = forward_backward(engine, batch, steps={name: optimizer.steps(name) for name in ("a", "b")})
        if step:
            optim_step(optimizer, dict.fromkeys(("a", "b"), 1e-2), {name: losses[name].tokens for name in ("a", "b")})

    bank, optimizer, engine = start()
    go(engine, optimizer, 1)
    go(engine, optimizer, 2, step=False)
    saved = save_state(bank, optimizer)
    assert {"a/param/lm_head.weight", "a/grad/lm_head.weight"} <= saved.tensors.keys()
    fresh, resumed, again = start()
    go(again, resumed, 7)
    load_state(fresh, resumed, saved)
    for seed in (3, 4):
        go(engine, optimizer, seed)
        go(again, resumed, seed)
    first, second = save_state(bank, optimizer), save_state(fresh, resumed)
    for key, tensor in first.tensors.items():
        assert tensor.numpy().tobytes() == second.tensors[key].numpy().tobytes(), key


def test_law4_a_copy_that_goes_nan_stops_alone() -> None:
    bank, healthy = _head_bank(), _head_bank()
    with torch.no_grad():
        dict(bank.named_parameters("b"))["lm_head.weight"][0, 0] = torch.nan
    optimizers = []
    for each in (bank, healthy):
        optimizer = SlotOptimizer(each)
        for name in each.names:
            optimizer.add(name)
        optimizers.append(optimizer)
    batch = batch_of([6, 9, 5, 7, 4], ROUTES)
    before = values(bank, "b")
    losses, expected = forward_backward(Engine(bank), batch), forward_backward(Engine(healthy), batch)
    assert losses["a"] == expected["a"]
    assert not losses["b"].finite
    done = optim_step(optimizers[0], {"a": 0.1, "b": 0.1}, {"a": 10.0, "b": 10.0})
    optim_step(optimizers[1], {"a": 0.1}, {"a": 10.0})
    assert (done["a"].finite, done["b"].finite) == (True, False)
    for key, leaf in values(bank, "b").items():
        assert torch.equal(leaf.view(torch.int32), before[key].view(torch.int32))
    assert all(torch.equal(leaf, values(healthy, "a")[key]) for key, leaf in values(bank, "a").items())


def test_a_copys_gradient_counts_in_its_adapters_norm() -> None:
    bank = _head_bank(("a",))
    optimizer = SlotOptimizer(bank)
    optimizer.add("a", OptimizerConfig(rule="sgd", max_grad_norm=0.0))
    losses = forward_backward(Engine(bank), batch_of([8, 6], "a"))
    grads: list[Tensor] = [p.grad.flatten() for p in bank.parameters("a") if p.grad is not None]
    assert len(grads) == len(bank.parameters("a"))
    expected = float(torch.cat(grads).norm()) / losses["a"].tokens
    done = optim_step(optimizer, {"a": 0.1}, {"a": losses["a"].tokens})
    assert done["a"].grad_norm == pytest.approx(expected, rel=1e-5)


def test_greedy_tokens_are_those_of_each_adapters_own_head() -> None:
    bank, prompts = _head_bank(), tokens([9, 4, 7])
    config = SamplingConfig(max_new_tokens=6)
    together = sample(bank, prompts, ["a", "b", BASE], config=config, end_ids=END_IDS)
    for i, route in enumerate(("a", "b", BASE)):
        (alone,) = sample(bank, [prompts[i]], [route], config=config, end_ids=END_IDS)
        assert alone.tokens == together[i].tokens
    bank.remove("b")
    assert sample(bank, [prompts[2]], [BASE], config=config, end_ids=END_IDS)[0].tokens == together[2].tokens


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
def test_inside_compiled_blocks_a_module_is_called_as_it_is() -> None:
    def made() -> AdapterBank:
        bank = attach(make_model())
        for name in ("a", "b"):
            add(bank, name, rank=2, targets=["q", "v"], modules_to_save=["layers.0.mlp", "layers.1.mlp"])
        return bank

    batch = batch_of([6, 9, 5, 7, 4], ROUTES)
    losses, expected = backward(made(), batch)
    bank = made()
    assert compile_blocks(bank.model)
    compiled, found = backward(bank, batch)
    for name in ("a", "b"):
        assert difference(found[name], expected[name]) < 1e-4
        for row, loss in losses[name].row_losses.items():
            assert compiled[name].row_losses[row] == pytest.approx(loss, rel=1e-5)
