"""Every kind of layer on a GPU: outputs and gradients as on the CPU, and the bank's laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabank import BASE
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import Engine, forward_backward
from tests.bank.tiny import MIXTURES, MODELS, clear, gradients, ids, make, outputs, two
from tests.engine.tiny import batch_of, make_bank, make_model
from tests.engine.tiny import gradients as tiny_gradients

KINDS = [kind for kind in MODELS if kind not in ("llama", "gpt2", "bert", "t5", "bart", "handwritten")]
"""The plain ones have tests/gpu/test_laws.py."""
ROUTES = ["a", BASE, "b", {"a": 0.7, "b": -0.4}, BASE, "a"]
CUDA = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def _pass(
    kind: str, device: torch.device, rows: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    model, bank = two(kind, dtype=dtype)
    model.to(device)
    weights = torch.randn(6, generator=torch.Generator().manual_seed(3)).to(device)
    clear(bank)
    with bank.route([ROUTES[i] for i in rows]):
        y = outputs(model, ids(6)[rows].to(device)).float()
    (y.flatten(1).square().mean(1) * weights[rows]).sum().backward()
    return y.detach().cpu(), {key: g.cpu() for key, g in gradients(bank).items()}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_cpu(kind: str) -> None:
    found, expected = (_pass(kind, device, list(range(6))) for device in (CUDA, torch.device("cpu")))
    assert _distance(found[0], expected[0]) < 1e-4
    for key, g in expected[1].items():
        assert _distance(found[1][key], g) < 1e-3, key


@pytest.mark.parametrize("kind", KINDS)
def test_law2_a_mixed_batch_equals_the_separate_batches(kind: str) -> None:
    mixed_y, mixed = _pass(kind, CUDA, list(range(6)))
    rows = [0, 5]
    alone_y, alone = _pass(kind, CUDA, rows)
    assert _distance(mixed_y[rows], alone_y) < 1e-4
    others = [_pass(kind, CUDA, [i])[1] for i in (2, 3)]
    for key, g in mixed.items():
        assert _distance(alone[key] + sum(other[key] for other in others), g) < 1e-3, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_law1_a_base_row_is_the_base(kind: str, dtype: torch.dtype) -> None:
    model, bank = two(kind, dtype=dtype)
    model.to(CUDA)
    x = ids(6).to(CUDA)
    with torch.no_grad():
        expected = outputs(make(kind).to(CUDA, dtype), x)
        with bank.route(ROUTES):
            found = outputs(model, x)
        with bank.route(BASE):
            assert torch.equal(outputs(model, x), expected)
    if kind in MIXTURES:
        assert torch.allclose(found[[1, 4]], expected[[1, 4]], atol=8 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(found[[1, 4]], expected[[1, 4]])
    assert not torch.allclose(found[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_is_what_rounding_leaves_of_it(kind: str) -> None:
    y, found = _pass(kind, CUDA, list(range(6)), torch.bfloat16)
    exact_y, exact = _pass(kind, CUDA, list(range(6)))
    assert _distance(y, exact_y) < 0.2  # the worst number; A and B are rounded too, and PiSSA's hold most of the weight
    assert all(bool(g.isfinite().all()) for g in found.values())
    flat, wanted = (torch.cat([g[key].flatten() for key in exact]) for g in (found, exact))
    assert float((flat - wanted).norm() / wanted.norm()) < 0.25


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_passes_of_a_mixture_are_captured_and_replayed_for_other_batches(dropout: float) -> None:
    torch._dynamo.reset()
    engines = []
    for graphs in (False, True):
        bank = make_bank("mixtral", model=make_model("mixtral").to(CUDA, torch.bfloat16), dropout=dropout)
        compile_blocks(bank.model)
        engines.append(Engine(bank, cuda_graphs=graphs))
    routes = [["a", BASE, "b", "a"], ["b", "b", "a", BASE]]
    for step in range(8):
        batch = batch_of([64] * 4, routes[step % 2], seed=step)
        found = []
        for engine in engines:
            losses = forward_backward(engine, batch, steps={"a": step, "b": step})
            found.append((losses["a"].loss_sum, {n: tiny_gradients(engine.bank, n) for n in ("a", "b")}))
            for leaf in engine.bank.parameters():
                leaf.grad = None
        (plain, wanted), (mine, gradients_) = found
        assert mine == pytest.approx(plain, rel=1e-4)
        for name, leaves in wanted.items():
            for key, g in leaves.items():
                assert _distance(gradients_[name][key].cpu(), g.cpu()) < 2e-3, (step, key)
    assert engines[1].graphs._captured
