"""Norms beside a model's blocks, compiled for passes with gradients: the same numbers, and who is meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorabank.engine.compiling import repeated_blocks, uncompile_blocks
from lorabank.engine.fused_norm import FusedNorm, norms_beside
from tests.engine import zoo
from tests.engine.tiny import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
EXPECTED = {"llama": ["norm"], "gpt2": [], "bert": [], "opt": []}


@pytest.mark.parametrize("family", EXPECTED)
def test_which_are_meant(family: str) -> None:
    model = FAMILIES[family]()
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(m)].rpartition(".")[2] for m in norms_beside(model, repeated_blocks(model))] == EXPECTED[family]


@pytest.mark.parametrize("family", zoo.ZOO)
def test_none_is_a_part_of_a_block(family: str) -> None:
    model = zoo.ZOO[family].make(32)
    blocks = repeated_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    found = norms_beside(model, blocks)
    assert inside.isdisjoint(found)
    assert all(p.ndim == 1 for norm in found for p in norm.parameters())


def passed(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a gradient of the embedding."""
    out = model(ids).logits
    return out.detach(), torch.autograd.grad(out.square().sum(), model.get_parameter("model.embed_tokens.weight"))[0]


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_the_same_numbers_at_every_length(backend: str) -> None:
    model = FAMILIES["llama"]()
    norms = norms_beside(model, repeated_blocks(model))
    for length in (5, 9, 12):
        ids = torch.arange(2 * length).view(2, length) % 30
        wanted = passed(model, ids)
        for norm in norms:
            norm._compiled_call_impl = norm._compiled_call_impl or FusedNorm(norm, backend=backend)
        for mine, other in zip(passed(model, ids), wanted, strict=True):
            torch.testing.assert_close(mine, other)
    uncompile_blocks(norms)
    assert all(norm._compiled_call_impl is None for norm in norms)


def test_few_tokens_without_gradients_are_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    (norm,) = norms_beside(model, repeated_blocks(model))
    fused = FusedNorm(norm, backend="aot_eager")
    monkeypatch.setattr(fused, "_compiled", lambda *_: pytest.fail("compiled"))
    norm._compiled_call_impl = fused
    with torch.no_grad():
        model(torch.arange(4)[None])


class Odd(nn.Module):
    """A norm that can't be compiled in one piece, since torch finds no way to trace what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_one_that_cannot_be_compiled_runs_as_it_is() -> None:
    def broken(*_: object) -> object:
        raise ValueError("no kernel for that")

    norm = Odd()
    norm._compiled_call_impl = FusedNorm(norm, backend=broken)  # pyright: ignore[reportArgumentType]
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="torch can't compile Odd, so it runs uncompiled"):
        torch.testing.assert_close(norm(x), x)
    torch.testing.assert_close(norm(x), x)
