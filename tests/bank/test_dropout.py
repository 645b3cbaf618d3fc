"""Dropout through the bank: drawn from identities, only where a step asks for it (trap 5)."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabank import attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import DropoutState
from lorabank.errors import RoutingError
from tests.bank.tiny import add, clear, gradients


def _bank(dropout: float = 0.5) -> tuple[nn.Sequential, AdapterBank]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    bank = attach(model)
    add(bank, "a", dropout=dropout)
    add(bank, "b", dropout=dropout, rank=2)
    add(bank, "dry")
    return model, bank


def _run(bank: AdapterBank, model: nn.Module, x: Tensor, rows: list[str], examples: list[int], step: int = 3) -> Tensor:
    state = DropoutState(steps=dict.fromkeys(bank.names, step), examples=torch.tensor(examples))
    with bank.route(bank.routing(rows, dropout=state)):
        return model(x)


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def test_trap5_the_same_step_draws_the_same_and_the_next_draws_anew() -> None:
    model, bank = _bank()
    rows = ["a", "b", "a", "dry"]
    y = _run(bank, model, X, rows, [0, 0, 1, 0])
    assert torch.equal(y, _run(bank, model, X, rows, [0, 0, 1, 0]))
    later = _run(bank, model, X, rows, [0, 0, 1, 0], step=4)
    assert not torch.isclose(later[:3], y[:3]).all(-1).all(-1).any()
    assert torch.equal(later[3], y[3])


def test_trap5_neither_the_batch_nor_padding_moves_a_real_tokens_draw() -> None:
    model, bank = _bank()
    y = _run(bank, model, X, ["a", "b", "a", "dry"], [0, 0, 1, 0])
    alone = _run(bank, model, X[2:3], ["a"], [1])
    torch.testing.assert_close(alone[0], y[2])
    padded = _run(bank, model, torch.cat([X, torch.randn(4, 2, 8)], 1), ["a", "b", "a", "dry"], [0, 0, 1, 0])
    torch.testing.assert_close(padded[:, :5], y)
    reordered = _run(bank, model, X[[2, 0]], ["a", "a"], [1, 0])
    torch.testing.assert_close(reordered, y[[2, 0]])


def test_layers_and_slots_draw_apart() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    bank = attach(model)
    bank.skip_reach_check()
    for name in ("a", "b"):
        add(bank, name, dropout=0.5, rank=64, alpha=64)
        with torch.no_grad():
            for key, p in bank.named_parameters(name):
                p.copy_(torch.eye(64)) if key.endswith((".A", ".B")) else None  # the change is the masked input itself
    masks = []
    for layer in model:
        with torch.no_grad():
            for p in layer.parameters():
                if p.shape == (64, 64) and not p.requires_grad:
                    p.zero_()
        for name in ("a", "b"):
            state = DropoutState(steps={name: 0}, examples=torch.tensor([0]))
            with bank.route(bank.routing([name], dropout=state)):
                masks.append(layer(torch.ones(1, 32, 64)) != 0)
    for i in range(4):
        assert 0.4 < masks[i].float().mean() < 0.6
        for j in range(i):
            same = (masks[i] == masks[j]).float().mean()
            assert 0.45 < same < 0.55, (i, j, same)


def test_trap5_recomputation_draws_the_same_mask() -> None:
    model, bank = _bank()
    state = DropoutState(steps=dict.fromkeys(bank.names, 3), examples=torch.tensor([0, 0, 1, 0]))
    routing = bank.routing(["a", "b", "a", "dry"], dropout=state)
    with bank.route(routing):
        model(X).square().sum().backward()
    expected = gradients(bank)
    clear(bank)
    with bank.route(routing):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False, context_fn=bank.checkpoint_context)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    for key, g in gradients(bank).items():
        assert torch.equal(g, expected[key]), key


def test_trap5_the_modules_training_flag_switches_nothing() -> None:
    model, bank = _bank()
    with torch.no_grad(), bank.route("a"):
        assert torch.equal(model.train()(X), model.eval()(X))


def test_a_forward_with_gradients_outside_a_step_says_once_that_dropout_is_off() -> None:
    model, bank = _bank(dropout=0.25)
    with bank.route("a"), torch.no_grad():
        model(X)
    with (
        bank.route(["a", "dry", "dry", "dry"]),
        pytest.warns(UserWarning, match=r"'a' has dropout 0.25.*own training step") as seen,
    ):
        model(X)
        model(X)
    assert len(seen) == 1
    with bank.route("dry"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_dropout_needs_an_example_a_row() -> None:
    _, bank = _bank()
    state = DropoutState(steps={"a": 0}, examples=torch.tensor([0, 1]))
    with pytest.raises(RoutingError, match=r"2 examples for 3 rows"):
        bank.routing(["a", "a", "b"], dropout=state)
    with pytest.raises(RoutingError, match=r"one entry a row"):
        bank.routing("a", dropout=state)
    with pytest.raises(RoutingError, match=r"leave out repeat="):
        bank.routing(["a", "a"], dropout=state, repeat=("tile", 2))
