"""Pictures of several sizes in one batch: passes of their own, whose gradients are those of each row alone."""

from __future__ import annotations

import torch

import lorabank as lb
from lorabank.engine.engine import Engine
from lorabank.engine.model_pass import row_losses
from lorabank.engine.step import forward_backward
from lorabank.tasks.diffusion.batch import picture_batch
from lorabank.tasks.diffusion.draws import draw
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import objective_of, row_tensors
from tests.tasks.diffusion.tiny import model_of, pipeline

SIZES = [(8, 8), (8, 12), (8, 8), (12, 8), (8, 12)]
ROUTES = ["a", "b", "b", "a", "a"]


def engine() -> Engine:
    model = model_of(pipeline("sd"), "sd")
    bank = lb.attach(model)
    for seed, name in enumerate("ab"):
        bank.add(name, lb.AdapterConfig(rank=2, targets=["to_q", "to_v"]), seed=seed)
        with torch.no_grad():
            for leaf in bank.parameters(name):
                leaf.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    return Engine(bank)


def rows(model: ImageModel) -> list[dict[str, torch.Tensor]]:
    objective, made = objective_of(model.scheduler), []
    with torch.no_grad():
        text = model.encode(model.tokenize(["a cat"]))["text"][0]
    for i, size in enumerate(SIZES):
        each = draw((4, *size), i)
        numbers = {name: value[0] for name, value in row_tensors([objective.numbers(each)]).items()}
        made.append({"clean": draw((4, *size), 50 + i).noise, "noise": each.noise, "condition.text": text, **numbers})
    return made


def test_rows_of_several_sizes_give_the_gradients_of_each_alone() -> None:
    mixed, apart = engine(), engine()
    each = rows(mixed.bank.model)  # pyright: ignore[reportArgumentType]
    batch = picture_batch(each, ROUTES, sizes=[64] * 5, examples=range(5))
    assert batch.groups == [[0, 2], [1, 4], [3]]
    found = forward_backward(mixed, batch)
    sums = {"a": 0.0, "b": 0.0}
    for row, route in zip(each, ROUTES, strict=True):
        alone = forward_backward(apart, picture_batch([row], [route], sizes=[64], examples=[0]))
        sums[route] += alone[route].loss_sum
    for name, expected in sums.items():
        assert abs(found[name].loss_sum - expected) < 1e-4
        assert len(found[name].row_losses) == ROUTES.count(name)
        for one, other in zip(mixed.bank.parameters(name), apart.bank.parameters(name), strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    losses = row_losses(mixed, batch)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses[3:4], row_losses(apart, picture_batch(each[3:4], ["a"], sizes=[64], examples=[0])))


def test_a_mixed_batch_in_parts_where_memory_runs_out() -> None:
    """A limit that was learnt holds for each size's rows."""
    whole, limited = engine(), engine()
    each = rows(whole.bank.model)  # pyright: ignore[reportArgumentType]
    batch = picture_batch(each, ROUTES, sizes=[64] * 5, examples=range(5))
    limited.fits.tokens = 64  # one row a pass
    torch.testing.assert_close(row_losses(limited, batch), row_losses(whole, batch), rtol=1e-4, atol=1e-5)
