"""`SlotOptimizer` on AdamW's kernels against itself on the plain path, and the laws on it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorabank import AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.kernels.gpu import adamw, runtime
from lorabank.optim import gpu, plain
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer, SlotStep
from tests.bank.tiny import make
from tests.optim.test_rules import make_bank

RATE = 1e-2
CONFIGS = {
    "a": OptimizerConfig(weight_decay=0.1, max_grad_norm=0.5),
    "b": OptimizerConfig(betas=(0.8, 0.95), loraplus_ratio=16.0, max_grad_norm=0.0),
}
Switch = Callable[[bool], None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of several blocks without large tensors."""
    monkeypatch.setattr(adamw, "BLOCK", 16)
    monkeypatch.setattr(adamw, "SUM_BLOCK", 4)


def _bank(device: torch.device) -> tuple[AdapterBank, SlotOptimizer]:
    bank = make_bank(("a", "b"))
    bank.model.to(device)
    optimizer = SlotOptimizer(bank)
    for name, config in CONFIGS.items():
        optimizer.add(name, config)
    return bank, optimizer


@pytest.fixture
def switch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Says whether optimizers take the kernels from here on; they do at first."""

    def use(kernels: bool) -> None:
        monkeypatch.setattr(gpu, "on_kernels", lambda where: kernels and where.type == device.type)

    use(True)
    return use


def _give(bank: AdapterBank, name: str, seed: int) -> None:
    for i, p in enumerate(bank.parameters(name)):
        gradient = torch.randn(p.shape[::-1], generator=torch.Generator().manual_seed(100 * seed + i)).to(p.device).t()
        p.grad = gradient if i % 2 else gradient.contiguous()


def _grow(bank: AdapterBank) -> None:
    """2 + 3 + 15 ranks don't fit into the first buffer of 16: all leaves move."""
    for name in ("c", "d", "e"):
        bank.add(name, AdapterConfig(rank=5, targets="*"))


def _train(bank: AdapterBank, optimizer: SlotOptimizer) -> list[dict[str, SlotStep]]:
    """Steps of one and of both, with a leaf that no row reached and adapters that come and go."""
    done = []
    for step, names in enumerate([("a", "b"), ("b",), ("a", "b"), ("b", "a"), ("a", "b")]):
        if step == 2:
            _grow(bank)
        if step == 3:
            bank.remove("c")
        for name in names:
            _give(bank, name, step)
        if step == 1:
            bank.parameters("b")[2].grad = None
        done.append(optimizer.step(dict.fromkeys(names, RATE), dict.fromkeys(names, 3.0)))
        assert all(p.grad is None for p in bank.parameters())
    return done


def _values(bank: AdapterBank, optimizer: SlotOptimizer, name: str) -> dict[str, Tensor]:
    return {**{key: p.detach() for key, p in bank.named_parameters(name)}, **optimizer.state(name)[1]}


def test_the_optimizer_is_the_plain_one(device: torch.device, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    switch(False)
    expected_bank, expected = _bank(device)
    steps = _train(expected_bank, expected)
    switch(True)
    monkeypatch.setattr(plain, "step", None)  # nothing falls back
    bank, optimizer = _bank(device)
    for done, twins in zip(_train(bank, optimizer), steps, strict=True):  # read when all are done
        assert list(done) == list(twins)
        for name, twin in twins.items():
            assert (done[name].finite, done[name].step) == (True, twin.step)
            assert done[name].grad_norm == pytest.approx(twin.grad_norm, rel=1e-6)
    for name in CONFIGS:
        assert optimizer.steps(name) == expected.steps(name)
        values = _values(expected_bank, expected, name)
        for key, value in _values(bank, optimizer, name).items():
            torch.testing.assert_close(value, values[key], rtol=2e-6, atol=2e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_biases_and_rows_step_as_on_the_plain_path(device: torch.device, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of tensors of their own, beside A and B; LoRA+ leaves their rate alone."""
    found: list[dict[str, Tensor]] = []
    for kernels in (False, True):
        switch(kernels)
        if kernels:
            monkeypatch.setattr(plain, "step", None)
        bank = attach(make("handwritten"))
        bank.add("a", AdapterConfig(rank=2, bias="all", lora_bias=True))
        bank.add("rows", AdapterConfig(rank=2, targets="head", trainable_token_indices=[5, 9]))
        bank.model.to(device)
        optimizer = SlotOptimizer(bank)
        configs = {"a": CONFIGS["b"], "rows": CONFIGS["a"]}
        for name, config in configs.items():
            optimizer.add(name, config)
        for step in range(2):
            for name in configs:
                _give(bank, name, step)
            optimizer.step(dict.fromkeys(configs, RATE), dict.fromkeys(configs, 3.0))
        found.append({f"{name}:{key}": value for name in configs for key, value in _values(bank, optimizer, name).items()})
    assert {key.rpartition(".")[2] for key in found[0]} >= {"bias", "lora_bias", "rows"}
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=2e-6, atol=2e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_a_saved_state_goes_on_to_the_same_bytes(device: torch.device, switch: Switch) -> None:
    (bank, optimizer), (other, twin) = _bank(device), _bank(device)
    _train(bank, optimizer)
    _train(other, twin)
    step, tensors = optimizer.state("a")
    assert step == 4
    optimizer.load_state("a", step, {key: t.cpu() for key, t in tensors.items()})
    _give(bank, "a", 9)
    _give(other, "a", 9)
    assert optimizer.step({"a": RATE}, {"a": 1.0}) == twin.step({"a": RATE}, {"a": 1.0})
    for name in CONFIGS:
        values = _values(other, twin, name)
        assert all(torch.equal(value, values[key]) for key, value in _values(bank, optimizer, name).items())
    optimizer.load_state("a", 0, {})
    assert optimizer.state("a") == (0, {})
    _give(bank, "a", 9)
    assert optimizer.step({"a": RATE}, {"a": 1.0})["a"].step == 1


def test_law4_through_the_optimizer(device: torch.device, switch: Switch) -> None:
    (bank, optimizer), (other, alone) = _bank(device), _bank(device)
    for name in CONFIGS:
        _give(bank, name, 1)
    _give(other, "a", 1)
    gradient = bank.parameters("b")[-1].grad
    assert gradient is not None
    gradient[0, 0] = math.nan
    before = [p.detach().clone() for p in bank.parameters("b")]
    done = optimizer.step(dict.fromkeys(CONFIGS, RATE), dict.fromkeys(CONFIGS, 2.0))
    assert done["a"] == alone.step({"a": RATE}, {"a": 2.0})["a"]
    assert (done["b"].finite, done["b"].step, math.isnan(done["b"].grad_norm)) == (False, 0, True)
    assert optimizer.state("b") == (0, {})
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters("b"), before, strict=True))
    values = _values(other, alone, "a")
    assert all(torch.equal(value, values[key]) for key, value in _values(bank, optimizer, "a").items())
    _give(bank, "b", 2)
    assert optimizer.step({"b": RATE}, {"b": 2.0})["b"].step == 1


def test_paths_may_change_under_way(device: torch.device, switch: Switch) -> None:
    """As they do when a model moves between a GPU and the CPU: step counts go along."""
    bank, optimizer = _bank(device)
    for kernels, step in ((True, 1), (False, 2), (True, 3), (True, 4), (False, 5)):
        switch(kernels)
        _give(bank, "a", step)
        assert optimizer.step({"a": RATE}, {"a": 1.0})["a"].step == step
    assert optimizer.steps("a") == 5


def test_tables_are_kept_until_something_moves(device: torch.device, switch: Switch) -> None:
    bank, optimizer = _bank(device)
    made = []
    for step in range(4):
        if step == 2:
            _grow(bank)
        _give(bank, "a", step)
        optimizer.step({"a": RATE}, {"a": 1.0})
        made.append(next(reversed(optimizer._gpu._tables.values())))
    assert made[0] is made[1]
    assert made[2] is made[3] is not made[0]


def test_other_rules_and_dtypes_take_the_plain_path(device: torch.device, switch: Switch) -> None:
    bank, optimizer = _bank(device)
    optimizer.add("b", OptimizerConfig(rule="sgd"))
    for p in bank.parameters("a"):
        p.data = p.data.double()
    for name in CONFIGS:
        for p in bank.parameters(name):
            p.grad = torch.ones_like(p)
    assert all(done.finite for done in optimizer.step(dict.fromkeys(CONFIGS, RATE), dict.fromkeys(CONFIGS, 1.0)).values())
    assert not optimizer._gpu._tables


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch says with it that it may miss some
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_step_does_not_wait_for_the_gpu(device: torch.device) -> None:
    bank, optimizer = _bank(device)
    rates, tokens = dict.fromkeys(CONFIGS, RATE), dict.fromkeys(CONFIGS, 1.0)
    assert runtime.available(next(iter(bank.parameters("a"))).device)  # a process tries the smallest kernel once, and waits
    for step in range(2):
        for name in CONFIGS:
            _give(bank, name, step)
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            done = optimizer.step(rates, tokens)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    assert [done[name].step for name in CONFIGS] == [2, 2]
