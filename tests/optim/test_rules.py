"""Every rule of the table against a twin: torch's AdamW and SGD, and Lion written out an element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.config.train import OPTIMIZERS as CONFIGURABLE
from lorabank.kernels.native import adamw as native_adamw
from lorabank.kernels.native import library
from lorabank.optim import plain, slots
from lorabank.optim.rules import OPTIMIZERS, RuleNumbers
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer

RATE, STEPS = 1e-2, 50


def make_bank(names: tuple[str, ...] = ("a",)) -> AdapterBank:
    torch.manual_seed(0)
    bank = attach(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9)))
    for i, name in enumerate(names):
        bank.add(name, AdapterConfig(rank=2 + i, targets="*"), seed=i)
        with torch.no_grad():
            for p in bank.parameters(name):
                p.add_(torch.randn_like(p))
    return bank


class Lion(torch.optim.Optimizer):
    """arXiv:2302.06675, algorithm 2."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p.copy_(p - group["lr"] * (update + group["weight_decay"] * p))
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def _twin(rule: str, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if rule == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if rule == "lion":
        return Lion(groups, RATE, config.betas, config.weight_decay)
    # torch couples SGD's decay with its momentum; ours is decoupled, so the twin decays by hand
    return torch.optim.SGD(groups, momentum=config.betas[0])


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_every_rule_equals_its_twin_over_many_steps(rule: str, decay: float, ratio: float) -> None:
    config = OptimizerConfig(rule=rule, betas=(0.85, 0.97), weight_decay=decay, loraplus_ratio=ratio, max_grad_norm=0.0)
    bank, other = make_bank(), make_bank()
    optimizer = SlotOptimizer(bank)
    optimizer.add("a", config)
    groups = other.parameter_groups("a", RATE, ratio)
    twin = _twin(rule, groups, config)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        rate = RATE * (1 - step / STEPS)
        for group, factor in zip(twin.param_groups, (1.0, ratio), strict=True):
            group["lr"] = rate * factor
        for p, q in zip(bank.parameters(), other.parameters(), strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = 8.0 * gradient, gradient  # ours are sums, here of 8 tokens
        if rule == "sgd" and decay:
            with torch.no_grad():
                for group in twin.param_groups:
                    for p in group["params"]:
                        p.mul_(1 - group["lr"] * decay)
        done = optimizer.step({"a": rate}, {"a": 8.0})["a"]
        norm = torch.cat([q.grad.flatten() for q in other.parameters() if q.grad is not None]).norm()
        assert done.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert done.step == step + 1
        twin.step()
    for p, q in zip(bank.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-6)


PLAIN = {name: replace(rule, fused=None) for name, rule in OPTIMIZERS.items()}


@pytest.mark.parametrize("compiled", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("rule", [name for name, rule in OPTIMIZERS.items() if rule.fused])
def test_a_fused_step_is_the_plain_one(
    rule: str, limit: float, ratio: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters and state, over steps with clipping, decay, LoRA+ and a leaf that no row reached."""
    if compiled and library.loaded() is None:
        pytest.skip("no C compiler here, or no OpenMP runtime that torch loads")
    if not compiled:
        monkeypatch.setattr(library, "loaded", lambda: None)
    config = OptimizerConfig(rule=rule, weight_decay=0.1, loraplus_ratio=ratio, max_grad_norm=limit)
    results: list[dict[str, Tensor]] = []
    for table in (OPTIMIZERS, PLAIN):
        monkeypatch.setattr(slots, "OPTIMIZERS", table)
        bank = make_bank()
        optimizer = SlotOptimizer(bank)
        optimizer.add("a", config)
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            for i, p in enumerate(bank.parameters()):
                gradient = torch.randn(p.shape[::-1], generator=generator).t()  # set by hand, in another order of memory
                p.grad = None if i == step == 2 else gradient
            optimizer.step({"a": RATE}, {"a": 3.0})
        results.append({**dict(bank.named_parameters("a")), **optimizer.state("a")[1]})
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-7)


needs_compiler = pytest.mark.skipif(library.loaded() is None, reason="no C compiler here, or no OpenMP runtime that torch loads")


@needs_compiler
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_the_compiled_norm_is_torchs(scale: float) -> None:
    tensors = [torch.randn(n) * scale for n in (1, 15, 16, 4097, 0)]
    assert native_adamw.suits(tensors)
    expected = torch.cat(tensors).double().norm()
    assert native_adamw.norm(tensors) == pytest.approx(float(expected), rel=1e-6)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_compiled_norm_tells_what_isnt_finite(bad: float) -> None:
    tensors = [torch.randn(40), torch.randn(33)]
    tensors[1][32] = bad
    assert not math.isfinite(native_adamw.norm(tensors))


@needs_compiler
def test_other_tensors_take_torchs() -> None:
    x = torch.zeros(4, 4)
    assert native_adamw.suits([x], [x])
    for other in (x.bfloat16(), x[:, ::2], x.to("meta"), torch._neg_view(x)):
        assert not native_adamw.suits([x], [other])


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_pieces_give_the_whole(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a rule works on pieces: how large they are changes at most the last bit, where vector code ends."""
    results: list[Tensor] = []
    for size in (2**18, 13):
        monkeypatch.setattr(slots, "OPTIMIZERS", PLAIN)
        monkeypatch.setattr(plain, "CPU_PIECE", size)
        bank = make_bank()
        optimizer = SlotOptimizer(bank)
        optimizer.add("a", OptimizerConfig(rule=rule))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in bank.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step({"a": RATE}, {"a": 1.0})
        results.append(torch.cat([p.detach().flatten() for p in bank.parameters()]))
    assert torch.allclose(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_the_configurations_names_are_the_tables() -> None:
    assert set(CONFIGURABLE) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_names_its_state(name: str) -> None:
    rule = OPTIMIZERS[name]
    state = [torch.zeros(4) for _ in rule.state_names]
    gradient = torch.tensor([1.0, -2.0, 0.0, 3.0])
    rule.direction(gradient, state, RuleNumbers(beta1=0.9, beta2=0.99, eps=1e-8, step=1))
    assert torch.equal(gradient.sign(), torch.tensor([1.0, -1.0, 0.0, 1.0]))
    assert all(bool(tensor.any()) for tensor in state)
