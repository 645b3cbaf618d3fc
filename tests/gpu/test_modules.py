"""Modules in full, torch's attention and starts as differences on a GPU: as on the CPU, and base rows as the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from tests.bank import test_saved_modules as saved
from tests.bank import tiny
from tests.bank.test_multihead import CALLS, MODULES, ROUTES, Attends, bank_over
from tests.bank.test_multihead import _call as call_of
from tests.bank.test_multihead import _inputs as inputs_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ROWS = ["a", BASE, "b", {"a": 0.7, "b": -0.4}, BASE, "a"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max())


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """`limit` is of each tensor's largest entry, or a thousandth of it of the largest of all: what is zero but for rounding."""
    assert found.keys() == expected.keys()
    most = max(float(g.abs().max()) for g in expected.values())
    for key, g in expected.items():
        assert float((found[key].cpu() - g.cpu()).abs().max()) <= limit * max(float(g.abs().max()), most / 1000), key


def _pass(
    make: Callable[[], tuple[nn.Module, AdapterBank]], outputs: Callable[[nn.Module, Tensor], Tensor], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    model, bank = make()
    model.to(device)
    tiny.clear(bank)
    with bank.route(ROWS):
        y = outputs(model, tiny.ids(6).to(device)).float()
    y.flatten(1).square().mean(1).sum().backward()
    return y.detach(), tiny.gradients(bank)


@pytest.mark.parametrize("kind", saved.KINDS)
def test_modules_in_full(kind: str) -> None:
    (y, found), (expected, wanted) = (_pass(lambda: saved.two(kind), saved.outputs, device) for device in (CUDA, CPU))
    assert _distance(y, expected) < 1e-4
    _same(found, wanted, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", saved.KINDS)
def test_law1_beside_modules_in_full(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, beside rows that go through copies of their own."""
    model, bank = saved.two(kind, dtype)
    model.to(CUDA)
    x = tiny.ids(6).to(CUDA)
    with torch.no_grad():
        expected = saved.outputs(saved.made(kind, dtype).to(CUDA), x)
        with bank.route(BASE):
            assert torch.equal(saved.outputs(model, x), expected)
        with bank.route(ROWS):
            found = saved.outputs(model, x)
    for row in (1, 4):
        assert torch.equal(found[row], expected[row])
    assert not torch.allclose(found[0], expected[0])


def _attended(settings: dict[str, Any], call: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    model = Attends(**settings, batch_first=True)
    bank = bank_over(model)
    model.to(device)
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in _arguments(settings, call).items()}
    distinct: dict[int, Tensor] = {}
    inputs = inputs_of(call.get("inputs", "self"), settings, True)
    inputs = tuple(distinct.setdefault(id(x), x.detach().to(device).requires_grad_()) for x in inputs)
    with bank.route(ROUTES):
        out, weights = model(*inputs, **given)
    total = out.square().sum() + (0 if weights is None else weights.square().sum())
    total.backward()
    found = {"out": out.detach()} | ({} if weights is None else {"weights": weights.detach()})
    found |= {f"d{i}": x.grad for i, x in enumerate(distinct.values()) if x.grad is not None}
    return found | tiny.gradients(bank)


def _arguments(settings: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    return call_of(call, inputs_of(call.get("inputs", "self"), settings, True)[1].shape[1])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES.keys())
def test_multihead_attention(settings: dict[str, Any], call: dict[str, Any]) -> None:
    found, expected = (_attended(settings, call, device) for device in (CUDA, CPU))
    _same(found, expected, 1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_as_differences(init: str) -> None:
    """A start is made on the CPU for both, since an SVD's signs are free; the passes and the files' form are compared."""

    def make() -> tuple[nn.Module, AdapterBank]:
        model = tiny.make("llama")
        bank = lb.attach(model)
        for name in ("a", "b"):
            bank.add(name, lb.AdapterConfig(rank=4, alpha=8, targets="all-linear", init=init), seed=1)
            with torch.no_grad():
                for _, p in bank.named_parameters(name):
                    p.mul_(1.1 if name == "a" else 0.8)
        return model, bank

    (y, found), (expected, wanted) = (_pass(make, tiny.outputs, device) for device in (CUDA, CPU))
    assert _distance(y, expected) < 1e-4
    _same(found, wanted, 1e-3)
    model, bank = make()
    assert bank.adapter("a").layers["model.layers.0.mlp.up_proj"].A.shape[0] == 8
    model.to(CUDA)
    with torch.no_grad(), bank.route("a"):
        before = tiny.outputs(model, tiny.ids(2).to(CUDA))
    plain = lb.attach(tiny.make("llama").to(CUDA))
    plain.load("a", bank.adapter("a"))
    with torch.no_grad(), plain.route("a"):
        assert _distance(tiny.outputs(plain.model, tiny.ids(2).to(CUDA)), before) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_read_off_a_base_on_the_gpu_is_that_of_the_cpu(init: str) -> None:
    """Signs are free, so what is compared is the part of W that the start stands for: s · B₀ A₀."""
    parts = []
    for device in (CUDA, CPU):
        bank = lb.attach(tiny.make("llama").to(device))
        bank.add("a", lb.AdapterConfig(rank=4, alpha=8, targets="all-linear", init=init), seed=1)
        with torch.no_grad(), bank.route("a"):
            expected = tiny.outputs(tiny.make("llama").to(device), tiny.ids(2).to(device))
            assert _distance(tiny.outputs(bank.model, tiny.ids(2).to(device)), expected) < 1e-5
        layer = bank.adapter("a").layers["model.layers.0.mlp.up_proj"]
        parts.append(layer.B[:, :4] @ layer.A[:4])
    assert _distance(parts[0], parts[1]) < 1e-3
