"""Trap 6: the base is deterministic in a step whatever mode it was left in, and is left in that mode again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.generate import stream
from lorabank.engine.modes import step_mode
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.errors import ConfigError, RoutingError
from tests.engine.tiny import VOCABULARY, backward, batch_of, difference, make_bank, make_model

WITH_DROPOUT = ["gpt2", "opt", "bert", "bart"]
LENGTHS, ROUTES = [6, 9, 5], ["a", "b", BASE]


OWN = ("reached", "read")
"""What an adapted layer notes about its calls."""


def _flags(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every plain attribute of every module: modes, switches, probabilities."""
    return {
        path: {key: value for key, value in vars(m).items() if isinstance(value, bool | int | float | str) and key not in OWN}
        for path, m in model.named_modules()
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*WITH_DROPOUT, "llama"])
def test_a_model_left_in_training_mode_steps_without_its_own_dropout(family: str, checkpointing: bool) -> None:
    expected_loss, expected = backward(make_bank(family), batch_of(LENGTHS, ROUTES))
    bank = make_bank(family)
    bank.model.train()
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    state = torch.get_rng_state()
    for _ in range(2):
        losses, found = backward(bank, batch_of(LENGTHS, ROUTES), engine)
        assert losses["a"].loss_sum == pytest.approx(expected_loss["a"].loss_sum, rel=1e-6)
        for name in ("a", "b"):
            assert difference(found[name], expected[name]) < 1e-4
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_the_bases_dropout_is_kept_where_asked_with_and_without_checkpointing(family: str) -> None:
    results = []
    for checkpointing in (False, True):
        bank = make_bank(family)
        engine = Engine(bank, base_dropout=True, gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        first, found = backward(bank, batch_of(LENGTHS, ROUTES), engine)
        second, _ = backward(bank, batch_of(LENGTHS, ROUTES), engine)
        assert first["a"].loss_sum != second["a"].loss_sum
        results.append((first["a"].loss_sum, found["a"]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert difference(results[1][1], results[0][1]) < 1e-4  # recomputation draws the forward's masks again


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart", "gemma2"])
def test_checkpointing_really_recomputes_and_gives_the_same_gradients(family: str) -> None:
    _, expected = backward(make_bank(family), batch_of(LENGTHS, ROUTES))
    bank = make_bank(family)
    calls = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    blocks = [m for m in bank.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    norm = next(m for m in blocks[0].modules() if "Norm" in type(m).__name__)
    norm.register_forward_hook(count)
    engine = Engine(bank, gradient_checkpointing=True)
    engine.head()
    calls = 0
    _, found = backward(bank, batch_of(LENGTHS, ROUTES), engine)
    assert calls == 2
    for name in ("a", "b"):
        assert len(found[name]) == len(bank.parameters(name))
        assert difference(found[name], expected[name]) < 1e-5


def _fails(bank: AdapterBank, engine: Engine) -> None:
    with pytest.raises(RoutingError):
        forward_backward(engine, batch_of([5], [{"a": 1.0, "b": 1.0}]))

    def broken(module: nn.Module, inputs: Any) -> None:
        raise KeyboardInterrupt

    handle = list(bank.model.modules())[-1].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        forward_backward(engine, batch_of(LENGTHS, ROUTES))
    with pytest.raises(KeyboardInterrupt):
        logprobs(engine, batch_of(LENGTHS, ROUTES))
    handle.remove()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_is_as_before_after_a_step_and_after_an_exception(training: bool, checkpointing: bool) -> None:
    bank = make_bank("bart")
    bank.model.train(training)
    next(m for m in bank.model.modules() if isinstance(m, nn.LayerNorm)).train(not training)
    bank.skip_reach_check()
    before = _flags(bank.model)
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    forward_backward(engine, batch_of(LENGTHS, ROUTES))
    assert _flags(bank.model) == before
    _fails(bank, engine)
    assert _flags(bank.model) == before


def test_a_users_own_checkpointing_is_off_inside_a_step_and_on_again_after() -> None:
    bank = make_bank()
    bank.model.train()
    calls = 0

    def own(function: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*args)

    blocks = [m for m in bank.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.gradient_checkpointing = True
        setattr(block, "_gradient_checkpointing_func", own)  # noqa: B010  (for type checkers a module holds only modules)
    forward_backward(Engine(bank), batch_of(LENGTHS, ROUTES))
    forward_backward(Engine(bank, gradient_checkpointing=True), batch_of(LENGTHS, ROUTES))
    assert calls == 0
    assert all(block.gradient_checkpointing and block._gradient_checkpointing_func is own for block in blocks)


class _Normed(nn.Module):
    """A causal module with BatchNorm, and dropout that ignores modes if asked."""

    def __init__(self, *, running: bool = True, stubborn: float = 0.0) -> None:
        super().__init__()
        self.stubborn = stubborn
        self.embed, self.mix = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16, track_running_stats=running)
        self.out = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = (
            nn.functional.dropout(self.mix(self.embed(input_ids)), self.stubborn)
            if self.stubborn
            else self.mix(self.embed(input_ids))
        )
        return self.out(self.norm(h.transpose(1, 2)).transpose(1, 2).cumsum(1))


def _normed(**kwargs: Any) -> AdapterBank:
    torch.manual_seed(0)
    return make_bank(model=_Normed(**kwargs), targets=["mix"])


@pytest.mark.parametrize("base_dropout", [False, True])
def test_batch_normalisation_uses_and_keeps_its_running_statistics(base_dropout: bool) -> None:
    bank = _normed()
    bank.model.train()
    before = {name: b.clone() for name, b in bank.model.named_buffers()}
    mixed, found = backward(bank, batch_of([6, 9, 5], ["a", "b", "a"]), Engine(bank, base_dropout=base_dropout))
    alone, expected = backward(bank, batch_of([6, 9, 5], ["a", "b", "a"]).select([0, 2]), Engine(bank, base_dropout=base_dropout))
    assert mixed["a"].loss_sum == pytest.approx(alone["a"].loss_sum, rel=1e-5)
    assert difference(found["a"], expected["a"]) < 1e-4
    assert all(torch.equal(b, before[name]) for name, b in bank.model.named_buffers())
    assert bank.model.get_submodule("norm").training


def test_batch_normalisation_without_running_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 'norm' \(BatchNorm1d\) keeps no running statistics"):
        forward_backward(Engine(_normed(running=False)), batch_of([5, 6], ["a", "b"]))


def test_a_base_that_draws_random_numbers_all_the_same_is_refused_every_time() -> None:
    bank = _normed(stubborn=0.1)
    engine = Engine(bank)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"draws random numbers .* base_dropout=True"):
            forward_backward(engine, batch_of([5, 6], ["a", "b"]))
    assert not any(p.grad is not None for p in bank.parameters())
    assert forward_backward(Engine(bank, base_dropout=True), batch_of([5, 6], ["a", "b"]))["a"].finite


def test_a_block_that_draws_under_checkpointing_alone_is_refused() -> None:
    bank = make_bank("llama")
    block = next(m for m in bank.model.modules() if isinstance(m, GradientCheckpointingLayer))

    def noise(module: nn.Module, inputs: Any, output: Any) -> None:
        if block.training:
            torch.rand(1)

    next(block.children()).register_forward_hook(noise)
    assert forward_backward(Engine(bank), batch_of([5], "a"))["a"].finite
    with pytest.raises(ConfigError, match=r"random numbers .*\(with gradient_checkpointing\)"):
        forward_backward(Engine(bank, gradient_checkpointing=True), batch_of([5], "a"))


def test_checkpointing_of_a_module_without_blocks_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="_Normed has no blocks"),
        step_mode(_normed(), gradient_checkpointing=True, base_dropout=False),
    ):
        pass


def test_between_streamed_tokens_the_callers_modes_are_in_force() -> None:
    bank = make_bank(model=make_model("gpt2"))
    bank.model.train()
    before = _flags(bank.model)
    tokens = stream(bank, [[20, 21], [22]], ["a", "b"])
    for _ in range(3):
        next(tokens)
        assert torch.is_grad_enabled()
        assert _flags(bank.model) == before
        with pytest.raises(RoutingError, match="no route is in force"):
            bank.model(input_ids=torch.tensor([[20]]))
