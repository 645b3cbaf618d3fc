"""Captured passes of picture models on a GPU: convolutions, and windows that rows are split into, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lorabank as lb
from lorabank.engine.compiling import compile_blocks
from tests.engine.pictures import MADE
from tests.engine.tiny import clear, difference, gradients
from tests.engine.zoo import LIKE, weighed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
TOLERANCE = 1e-3
PASSES = 6


@pytest.mark.parametrize("model", MADE)
def test_passes_are_a_plain_loops(model: str) -> None:
    torch._dynamo.reset()
    made, size = MADE[model]
    mine, other = made(), made()
    for bank in (mine, other):
        bank.model.cuda()
    assert compile_blocks(mine.model)

    def loss(bank: lb.AdapterBank) -> Callable[..., Tensor]:
        return lambda batch: weighed(bank.model(pixel_values=batch["pixels"])[0])

    train, plain = lb.TrainingPass(mine, loss(mine), masks=False), lb.TrainingPass(other, loss(other), cuda_graphs=False)
    for seed in range(PASSES):
        for bank in (mine, other):
            clear(bank)
        batch = {"pixels": torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))}
        route = LIKE[seed % len(LIKE)]
        torch.testing.assert_close(train(batch, route), plain(batch, route), rtol=TOLERANCE, atol=TOLERANCE)
        for name in "ab":
            assert difference(gradients(mine, name), gradients(other, name)) < TOLERANCE, name
    assert (train.graphs.refused, len(train.graphs._captured)) == (None, 1)
