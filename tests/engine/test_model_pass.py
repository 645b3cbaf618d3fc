"""Batches for a model of any kind: the same gradients as a plain loop, the laws, parts where memory runs out, fp16's loss scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.engine.model_pass import infer, row_losses
from lorabank.engine.step import Engine, forward_backward
from lorabank.errors import ConfigError, DataError, RoutingError, TooLargeError

CLASSES = 5


class Small(nn.Module):
    """A picture's classifier: a convolution, its statistics, dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm(self.conv(pixels)).relu().mean((2, 3))
        return self.out(self.drop(self.hidden(x).relu()))


def cross_entropy(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    return F.cross_entropy(model(inputs["pixels"]).float(), targets["labels"], reduction="none") * targets["weight"]


def make(dropout: float = 0.0, **settings: Any) -> Engine:
    bank = attach(Small().train())
    for name, rank in (("a", 2), ("b", 4)):
        bank.add(name, AdapterConfig(rank=rank, targets=["conv", "hidden"], dropout=dropout), seed=rank)
        for leaf in bank.parameters(name):
            torch.nn.init.normal_(leaf, std=0.3)
    return Engine(bank, **settings)


def batch_of(routes: Sequence[Any], seed: int = 1) -> ModelBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = len(routes)
    return ModelBatch(
        inputs={"pixels": torch.randn(rows, 3, 6, 6, generator=generator)},
        targets={"labels": torch.arange(rows) % CLASSES, "weight": torch.arange(rows) + 1.0},
        loss=cross_entropy,
        routes=tuple(routes),
        weights=tuple(float(i + 1) for i in range(rows)),
        sizes=(1,) * rows,
        examples_E=torch.arange(rows),
    )


def gradients(bank: AdapterBank, name: str) -> list[Tensor]:
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in bank.parameters(name)]


def test_losses_and_gradients_are_those_of_a_plain_loop() -> None:
    engine = make()
    batch = batch_of(["a", BASE, "b", "a"])
    losses = forward_backward(engine, batch)
    joint = {name: gradients(engine.bank, name) for name in ("a", "b")}
    engine.bank.zero_grad() if isinstance(engine.bank, nn.Module) else [
        setattr(p, "grad", None) for p in engine.bank.parameters()
    ]
    engine.bank.model.eval()
    for name, rows in (("a", [0, 3]), ("b", [2])):
        part = batch.select(rows)
        with engine.bank.route(name):
            alone = cross_entropy(engine.bank.model, part.inputs, part.targets)
        alone.sum().backward()
        torch.testing.assert_close(losses[name].loss_sum, alone.sum().item(), rtol=1e-5, atol=1e-6)
        assert losses[name].tokens == sum(rows) + len(rows)
        for mine, other in zip(joint[name], gradients(engine.bank, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert list(losses) == ["a", "b"]


def test_the_model_is_left_in_its_mode_and_its_statistics_alone() -> None:
    engine = make()
    norm = engine.bank.model.get_submodule("norm")
    before = norm.running_mean.clone()
    forward_backward(engine, batch_of(["a", "b"]))
    assert engine.bank.model.training and norm.training
    assert torch.equal(before, norm.running_mean)


def test_dropout_depends_on_the_step_and_the_example_alone() -> None:
    def grads(routes: Sequence[Any], steps: dict[str, int], rows: list[int]) -> list[Tensor]:
        engine = make(dropout=0.5)
        forward_backward(engine, batch_of(["a", "b", "a", BASE]).select(rows), steps=steps)
        return gradients(engine.bank, "a")

    whole = grads(["a", "b", "a", BASE], {"a": 3, "b": 1}, [0, 1, 2, 3])
    alone = grads(["a", "a"], {"a": 3}, [0, 2])
    later = grads(["a", "a"], {"a": 4}, [0, 2])
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(one, other) for one, other in zip(whole, later, strict=True))
    with pytest.raises(ConfigError, match="steps has no entry for adapter 'b'"):
        forward_backward(make(dropout=0.5), batch_of(["a", "b"]), steps={"a": 0})


class Cramped(Small):
    """Has memory for two rows."""

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory: of a test")
        return super().forward(pixels)

    limit = 2


def cramped(limit: int) -> Engine:
    model = Cramped().train()
    model.limit = limit
    bank = attach(model)
    for name, rank in (("a", 2), ("b", 4)):
        bank.add(name, AdapterConfig(rank=rank, targets=["conv", "hidden"]), seed=rank)
    return Engine(bank)


def test_a_batch_that_does_not_fit_goes_through_in_parts() -> None:
    roomy, tight = cramped(100), cramped(2)
    batch = batch_of(["a", "b", "a", BASE, "b"])
    expected, found = forward_backward(roomy, batch), forward_backward(tight, batch)
    assert tight.fits.times > 0
    for name in ("a", "b"):
        torch.testing.assert_close(found[name].loss_sum, expected[name].loss_sum, rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients(roomy.bank, name), gradients(tight.bank, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row_losses(tight, batch), row_losses(roomy, batch))
    times = tight.fits.times
    forward_backward(tight, batch)
    assert tight.fits.times == times, "what was learnt holds for the batches to come"


def test_a_row_that_does_not_fit_alone_is_an_error_and_leaves_gradients() -> None:
    engine = cramped(100)
    forward_backward(engine, batch_of(["a", "b"]))
    before = {name: gradients(engine.bank, name) for name in ("a", "b")}
    engine.bank.model.limit = 0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TooLargeError, match="one row alone doesn't fit"):
        forward_backward(engine, batch_of(["a", "b"]))
    for name, kept in before.items():
        assert all(torch.equal(one, other) for one, other in zip(kept, gradients(engine.bank, name), strict=True))


def test_infer_gives_each_row_its_adapters_output_without_gradients() -> None:
    engine = make()
    batch = batch_of(["a", BASE, "b"])
    logits = infer(engine, batch, lambda model, inputs, targets: model(inputs["pixels"]))
    assert not logits.requires_grad and engine.bank.model.training
    engine.bank.model.eval()
    for row, route in enumerate(batch.routes):
        with torch.no_grad(), engine.bank.route(route):
            torch.testing.assert_close(logits[row], engine.bank.model(batch.inputs["pixels"][row : row + 1])[0])


def test_an_fp16_base_gets_a_loss_scale_that_gradients_do_not_show() -> None:
    torch.manual_seed(0)
    plain, half = make(), make()
    half.bank.model.half()
    batch = batch_of(["a", "b"])
    forward_backward(plain, batch)
    losses = forward_backward(half, replace(batch, inputs={"pixels": batch.inputs["pixels"].half()}))
    assert half.scales_losses and losses["a"].finite
    for name in ("a", "b"):
        for one, other in zip(gradients(plain.bank, name), gradients(half.bank, name), strict=True):
            torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_what_is_wrong_is_named() -> None:
    engine = make()
    batch = batch_of(["a", "b"])
    with pytest.raises(RoutingError, match="mixture"):
        forward_backward(engine, replace(batch, routes=({"a": 0.5, "b": 0.5}, "b")))
    with pytest.raises(DataError, match="'pixels' has shape .*, expected 3 rows"):
        replace(batch, routes=("a", "b", "a"), weights=(1.0,) * 3, sizes=(1,) * 3, examples_E=torch.arange(3))
    with pytest.raises(DataError, match="2 routes but 1 weights"):
        replace(batch, weights=(1.0,))
    with pytest.raises(ConfigError, match="expected one sum a row, a tensor of shape"):
        forward_backward(engine, replace(batch, loss=lambda model, inputs, targets: model(inputs["pixels"]).sum()))
    with pytest.raises(ConfigError, match="reference_logprobs_NL: only batches of tokens"):
        forward_backward(engine, batch, reference_logprobs_NL=torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="activation_offloading: only passes over tokens"):
        forward_backward(make(activation_offloading=True), batch)
    assert all(leaf.grad is None for leaf in engine.bank.parameters())
