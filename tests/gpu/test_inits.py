"""Adapters that are a difference from where they started, on a GPU: made on the CPU and moved, or made there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lorabank as lb
from lorabank.bank.bank import AdapterBank
from tests.bank.tiny import clear, gradients, ids, make, outputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

CUDA = torch.device("cuda")
PLACES = [
    ("llama", "all-linear"),
    ("gpt2", ["q", "v", "mlp"]),
    ("sliced neox", ["q", "k", "v"]),
    ("torch encoder", ["in_proj.q", "in_proj.v", "out_proj"]),
]


def made(model: str, targets: str | list[str], init: str, device: torch.device) -> AdapterBank:
    bank = lb.attach(make(model).to(device))
    bank.add("a", lb.AdapterConfig(rank=4, alpha=6, init=init, targets=targets))
    bank.add("plain", lb.AdapterConfig(rank=2, alpha=4, targets=targets))
    return bank


def filled(bank: AdapterBank) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients, on the CPU, of the adapters with some of each weight changed."""
    device = bank.device
    with torch.no_grad():
        for key, p in bank.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))).to(device))
    clear(bank)
    with bank.route(["a", lb.BASE, "plain", "a"]):
        y = outputs(bank.model, ids(4).to(device))
    y.square().mean().backward()
    return y.detach().cpu(), {key: g.cpu() for key, g in gradients(bank).items()}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("model", "targets"), PLACES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_moves_to_the_gpu_with_what_it_started_from(init: str, model: str, targets: str | list[str]) -> None:
    expected = filled(made(model, targets, init, torch.device("cpu")))
    bank = made(model, targets, init, torch.device("cpu"))
    bank.model.to(CUDA)
    assert all(tensor.device.type == "cuda" for _, tensor in bank.frozen_tensors("a"))
    found = filled(bank)
    assert distance(found[0], expected[0]) < 1e-4
    for key, g in expected[1].items():
        assert distance(found[1][key], g) < 1e-3, key


@pytest.mark.parametrize(("model", "targets"), PLACES)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_made_there_it_starts_as_on_the_cpu(init: str, model: str, targets: str | list[str]) -> None:
    """Signs of singular vectors are free, so changes are compared: of B A, and of where it started."""
    here, there = (made(model, targets, init, device) for device in (CUDA, torch.device("cpu")))
    assert dict(here.frozen_tensors("a")).keys() == dict(there.frozen_tensors("a")).keys()
    mine, theirs = here.adapter("a").layers, there.adapter("a").layers
    assert mine.keys() == theirs.keys()
    for path, layer in mine.items():
        r = layer.rank - layer.frozen_rank
        first, other = (each.B[:, :r] @ each.A[:r] for each in (layer, theirs[path]))
        torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-5)
    x = ids(3)
    with here.route("a"), torch.no_grad():
        started = outputs(here.model, x.to(CUDA)).cpu()
    torch.testing.assert_close(started, outputs(make(model), x), rtol=1e-3, atol=1e-4)
