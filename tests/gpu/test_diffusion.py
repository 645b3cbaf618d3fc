"""Captured passes of image models on a GPU, compiled blocks in channels-last order included, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorabank as lb
from lorabank import BASE
from lorabank.engine.own_pass import TrainingPass
from lorabank.tasks.diffusion.draws import draw
from lorabank.tasks.diffusion.load import place
from lorabank.tasks.diffusion.objective import objective_of, row_losses, row_tensors
from lorabank.tasks.diffusion.speed import compile_image_model
from tests.tasks.diffusion.tiny import model_of, pipeline

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
TOLERANCE = 2e-3


def banked(name: str) -> tuple[Any, lb.AdapterBank]:
    model = model_of(pipeline(name), name)
    place(model, torch.device("cuda"), torch.float32)
    bank = lb.attach(model)
    for seed, adapter in enumerate("ab"):
        bank.add(adapter, lb.AdapterConfig(rank=4, targets=["to_q", "to_k", "to_v", "to_out.0"]), seed=seed)
        with torch.no_grad():
            for leaf in bank.parameters(adapter):
                # with five times as much a millionth of the tiny SDXL's weights is 8 % of a gradient
                leaf.add_(0.02 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)).to(leaf))
    return model, bank


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd2"])
def test_captured_passes_are_a_plain_loops(name: str) -> None:
    torch._dynamo.reset()
    (mine, bank), (other, plain) = banked(name), banked(name)
    assert compile_image_model(mine)
    objective = objective_of(mine.scheduler)
    with torch.no_grad():
        condition = {
            key: value.expand(4, *value.shape[1:]).clone() for key, value in mine.encode(mine.tokenize(["a cat"])).items()
        }
    if mine.family.sized:
        condition["sizes"] = mine.sizes((16, 16), (0, 0), (16, 16)).expand(4, -1).clone()
    train = TrainingPass(bank, lambda batch: row_losses(batch, mine(batch)), masks=False)
    loop = TrainingPass(plain, lambda batch: row_losses(batch, other(batch)), cuda_graphs=False)
    for seed in range(6):
        for each in (bank, plain):
            for leaf in each.parameters():
                leaf.grad = None
        draws = [draw((4, 16, 16), 10 * seed + i) for i in range(4)]
        batch = {
            "clean": torch.stack([draw((4, 16, 16), 90 + i).noise for i in range(4)]),
            "noise": torch.stack([each.noise for each in draws]),
            **{f"condition.{key}": value for key, value in condition.items()},
            **row_tensors([objective.numbers(each) for each in draws]),
        }
        route = [["a", "b", BASE, "a"], ["b", "b", "a", BASE]][seed % 2]
        torch.testing.assert_close(train(batch, route), loop(batch, route), rtol=TOLERANCE, atol=TOLERANCE)
        for adapter in "ab":
            for one, wanted in zip(bank.parameters(adapter), plain.parameters(adapter), strict=True):
                assert one.grad is not None and wanted.grad is not None
                assert (one.grad - wanted.grad).norm() <= 1e-2 * wanted.grad.norm() + 1e-5
    assert train.graphs.refused is None
    assert len(train.graphs._captured) == 1
