"""A wrapped layer's own hooks, its own forward and its own gradient go on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, attach
from tests.bank.tiny import add


class DeviceHook:
    """Replaces `forward` on the instance, as accelerate's offloading does."""

    def __init__(self, layer: nn.Linear) -> None:
        self.calls = 0
        self.own = layer.forward
        layer.forward = self  # type: ignore[method-assign]

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.own(x * 2)


def test_a_layer_with_a_hook_or_forward_of_its_own_is_called_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    layer = model[0]
    hook = DeviceHook(layer)  # type: ignore[arg-type]
    x = torch.randn(3, 4)
    expected = model(x).detach()
    bank = attach(model)
    add(bank, "a")
    calls = hook.calls
    with bank.route(["a", BASE, "a"]):
        y = model(x)
    assert hook.calls == calls + 1
    assert torch.equal(y[1], expected[1])
    part = bank.adapter("a").layers["0"]
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]] + x[[0, 2]] @ part.delta().t())
    y.sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
    assert layer.weight.grad is None

    seen: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    bank = attach(model)
    add(bank, "a")
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_accelerates_hooks_are_called() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model = nn.Sequential(nn.Linear(4, 4))
    hook = Count()
    add_hook_to_module(model[0], hook)
    bank = attach(model)
    add(bank, "a")
    with bank.route("a"):
        y = model(torch.ones(2, 4))
    assert hook.calls == 1
    assert y.grad_fn is not None
    bank.detach()
    assert hook.calls == 1
    remove_hook_from_module(model[0])
    with torch.no_grad():
        assert not torch.allclose(model(torch.ones(2, 4)), y)


def test_a_base_weight_that_is_trained_all_the_same_gets_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    bank = attach(model)
    add(bank, "a")
    weight = model[0].weight.requires_grad_()
    assert isinstance(weight, nn.Parameter)
    with bank.route(["a", BASE]):
        model(torch.ones(2, 4)).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 4), 2.0))
    assert all(p.grad is not None for p in bank.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_what_comes_out_of_a_linear_layer_may_be_written_into(bias: bool, shape: tuple[int, ...]) -> None:
    """As DeBERTa, Longformer and Swin v2 do: `scores /= scale` on a view of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=bias))
    bank = attach(model)
    add(bank, "a")
    x = torch.randn(shape)
    results = []
    for in_place in (True, False):
        for p in bank.parameters():
            p.grad = None
        with bank.route(["a", BASE]):
            y = model(x)
        turned = y.transpose(0, 1)
        turned = turned.div_(3.0) if in_place else turned / 3.0
        turned.square().sum().backward()
        results.append([turned.detach(), *(p.grad for p in bank.parameters())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
