"""Activation checkpointing: recomputation sees the forward's route, or says that it doesn't. Never wrong in silence (trap 3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import PreTrainedModel

from lorabank import BASE, attach
from lorabank.bank.bank import AdapterBank
from lorabank.errors import RoutingError
from tests.bank.tiny import Handwritten, add, clear, gradients, ids, outputs, two

ROUTES = ["a", "b", BASE, "a"]


def _enable(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """transformers' switch, under the name that the installed version has for it."""
    new = "activation_checkpointing_enable" in vars(PreTrainedModel)
    getattr(model, "activation_checkpointing_enable" if new else "gradient_checkpointing_enable")(arguments)


class Checkpointed(Handwritten):
    """The hand-written module with its blocks checkpointed."""

    arguments: dict[str, Any]

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids).requires_grad_()  # reentrant checkpointing needs an input with a gradient
        for block in self.blocks:
            h = h + (checkpoint(block, h, **self.arguments) if torch.is_grad_enabled() else block(h))
        return self.head(h)


def _bank(only: bool = False, **arguments: Any) -> tuple[Checkpointed, AdapterBank]:
    torch.manual_seed(0)
    model = Checkpointed()
    bank = attach(model)
    model.arguments = arguments
    add(bank, "a")
    if not only:
        add(bank, "b", rank=5)
    return model, bank


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return outputs(model, x).float().square().mean()


def _expected(routes: Any, only: bool = False) -> dict[str, Tensor]:
    """Gradients without checkpointing."""
    torch.manual_seed(0)
    model = Handwritten()
    bank = attach(model)
    add(bank, "a")
    if not only:
        add(bank, "b", rank=5)
    with bank.route(routes):
        _loss(model, ids(4)).backward()
    return gradients(bank)


def _assert_gradients(bank: AdapterBank, expected: dict[str, Tensor]) -> None:
    for key, found in gradients(bank).items():
        torch.testing.assert_close(found, expected[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("inside", [True, False])
def test_trap3_transformers_checkpointing_with_context_fn(kind: str, inside: bool) -> None:
    model, bank = two(kind)
    assert isinstance(model, PreTrainedModel)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    x, rows = ids(4), list(ROUTES)
    with bank.route(rows):
        _loss(model, x).backward()
    expected = gradients(bank)
    assert all(g.abs().max() > 0 for g in expected.values())
    clear(bank)
    calls: list[int] = []

    def context_fn() -> Any:
        calls.append(1)
        return bank.checkpoint_context()

    _enable(model, {"use_reentrant": False, "context_fn": context_fn})
    with bank.route(rows):
        loss = _loss(model, x)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert calls
    _assert_gradients(bank, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap3_transformers_checkpointing_without_context_fn(reentrant: bool) -> None:
    model, bank = two("llama")
    assert isinstance(model, PreTrainedModel)
    model.train()
    x, rows = ids(4), list(ROUTES)
    with bank.route(rows):
        _loss(model, x).backward()
    expected = gradients(bank)
    clear(bank)
    _enable(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with bank.route(rows):
        _loss(model, x).backward()
    _assert_gradients(bank, expected)
    clear(bank)
    with bank.route(rows):
        loss = _loss(model, x)
    with pytest.raises(RoutingError, match=r"no route was captured"):
        loss.backward()


def test_trap3_context_fn_captures_use_and_the_only_adapter_too() -> None:
    model, bank = _bank(use_reentrant=False)
    model.arguments["context_fn"] = bank.checkpoint_context
    bank.use("a")
    loss = _loss(model, ids(4))
    bank.use("b")  # the recomputation must not see this
    loss.backward()
    _assert_gradients(bank, _expected("a"))

    model, bank = _bank(only=True, use_reentrant=False)
    model.arguments["context_fn"] = bank.checkpoint_context
    loss = _loss(model, ids(4))
    bank.use(BASE)
    loss.backward()
    _assert_gradients(bank, _expected("a", only=True))


def test_trap3_a_captured_route_serves_two_passes_with_one_backward() -> None:
    model, bank = _bank(use_reentrant=False)
    model.arguments["context_fn"] = bank.checkpoint_context
    with bank.route(["a"] * 4):
        loss = _loss(model, ids(4))
    with bank.route(["b"] * 4):
        loss = loss + _loss(model, ids(4))
    loss.backward()
    first, second = _expected(["a"] * 4), _expected(["b"] * 4)
    _assert_gradients(bank, {key: first[key] + second[key] for key in first})


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap3_without_context_fn_backward_inside_the_block_is_right(reentrant: bool) -> None:
    model, bank = _bank(use_reentrant=reentrant)
    with bank.route(ROUTES):
        _loss(model, ids(4)).backward()
    _assert_gradients(bank, _expected(ROUTES))


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap3_without_context_fn_a_lost_route_is_an_error(reentrant: bool) -> None:
    model, bank = _bank(use_reentrant=reentrant)
    with bank.route(ROUTES):
        loss = _loss(model, ids(4))
    with pytest.raises(RoutingError, match=r"recomputed in backward and no route was captured.*checkpoint_context"):
        loss.backward()
    assert all(p.grad is None for key, p in bank.named_parameters() if ":blocks.1" in key)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("later", ["the only adapter", "use", "another with"])
def test_trap3_without_context_fn_another_route_is_an_error(later: str, reentrant: bool) -> None:
    model, bank = _bank(only=later == "the only adapter", use_reentrant=reentrant)
    first = ["a", BASE, BASE, "a"]
    with bank.route(first):
        loss = _loss(model, ids(4))

    def backward() -> None:
        if later == "use":
            bank.use("b")
        if later == "another with":
            with bank.route(["b", BASE, BASE, "b"]):
                loss.backward()
        else:
            loss.backward()

    with pytest.raises(RoutingError, match=r"recomputed.* under another route than its forward saw"):
        backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["use", "only"])
def test_trap3_use_and_the_only_adapter_need_no_context_fn(how: str, reentrant: bool) -> None:
    """What transformers.Trainer does, with an evaluation under another route in between."""
    model, bank = _bank(only=how == "only", use_reentrant=reentrant)
    if how == "use":
        bank.use("a")
    with bank.route(BASE), torch.no_grad():
        outputs(model, ids(2))
    for _ in range(2):
        clear(bank)
        _loss(model, ids(4)).backward()
        _assert_gradients(bank, _expected("a", only=how == "only"))
        with bank.route(BASE), torch.no_grad():
            outputs(model, ids(2))


def test_trap3_base_rows_alone_save_nothing_and_a_later_route_is_still_an_error() -> None:
    model, bank = _bank(use_reentrant=False)
    with bank.route(["a"] * 4):
        with bank.route(BASE):
            loss = _loss(model, ids(4))
        with pytest.raises((RoutingError, CheckpointError)):
            loss.backward()


def test_trap3_a_context_fn_that_brings_another_route_is_an_error() -> None:
    model, bank = _bank(use_reentrant=False, context_fn=lambda: (nullcontext(), bank.route([BASE, BASE, "a", "a"])))
    with bank.route(["a", "a", BASE, BASE]):
        loss = _loss(model, ids(4))
    with pytest.raises(RoutingError, match=r"recomputed this layer under another route than its forward saw"):
        loss.backward()


def test_trap3_backward_needs_no_route_without_checkpointing() -> None:
    model, bank = two("llama")
    with bank.route(ROUTES):
        inside = _loss(model, ids(4))
    inside.backward()
    expected = gradients(bank)
    clear(bank)
    with bank.route(ROUTES):
        loss = _loss(model, ids(4))
    with bank.route(["b", "a", "a", BASE]):
        loss.backward()
    _assert_gradients(bank, expected)


def _with_hook(backward: Callable[[], None], bank: AdapterBank) -> None:
    with bank.route("b"):
        backward()


def test_trap3_a_model_call_inside_someone_elses_backward_uses_its_own_route() -> None:
    """A hook that calls the model during backward is no recomputation when a forward of its own is inside `with`."""
    model, bank = two("handwritten")
    x = ids(2)
    with bank.route("a"), torch.no_grad():
        expected = outputs(model, x)
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> None:
        with bank.route("a"), torch.no_grad():
            seen.append(outputs(model, x))

    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(hook)
    _with_hook((leaf * 2).sum().backward, bank)
    assert torch.equal(seen[0], expected)
