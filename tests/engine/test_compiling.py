"""Compiled blocks compute what eager ones do."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from lorabank import BASE
from lorabank.engine.compiling import compile_blocks, repeated_blocks, uncompile_blocks
from lorabank.errors import ConfigError
from tests.engine.tiny import FAMILIES, add, gradients, make_bank


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_the_repeated_blocks_are_the_layers(family: str) -> None:
    model = FAMILIES[family]()
    blocks = repeated_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    assert len({type(block) for block in blocks}) == 1


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no repeated blocks"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_blocks_that_are_named_are_compiled() -> None:
    model = FAMILIES["llama"]()
    first, second = repeated_blocks(model)
    assert compile_blocks(model, blocks=[second]) == [second]
    assert first._compiled_call_impl is None
    assert compile_blocks(model, blocks=[second]) == []
    with pytest.raises(ConfigError, match="no repeated blocks"):
        compile_blocks(model, blocks=[])


def test_recomputation_needs_a_gpu() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        compile_blocks(model, recompute=True)
    assert all(block._compiled_call_impl is None for block in repeated_blocks(model))


def test_what_was_compiled_is_undone_and_nothing_else() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    model = FAMILIES["llama"]()
    first, second = repeated_blocks(model)
    first.compile()  # the user's own
    before = first._compiled_call_impl
    compiled = compile_blocks(model)
    assert compiled == [second]
    assert second._compiled_call_impl is not None
    uncompile_blocks(compiled)
    assert second._compiled_call_impl is None
    assert first._compiled_call_impl is before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_give_the_same_gradients() -> None:
    from lorabank import AdapterConfig, attach
    from lorabank.engine.batch import make_batch
    from lorabank.engine.step import Engine, forward_backward

    def gradients(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = FAMILIES["llama"]()
        if compiled:
            assert len(compile_blocks(model)) == 2
        bank = attach(model)
        for name in ("a", "b"):
            bank.add(name, AdapterConfig(rank=4))
        for i, p in enumerate(bank.parameters()):
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        for length in (5, 9):  # a second length must not change the result either
            rows = [(list(range(1, length + 1)), [0.0] + [1.0] * (length - 1))] * 2
            forward_backward(Engine(bank), make_batch(rows, ["a", "b"]))
        return [p.grad for p in bank.parameters() if p.grad is not None]

    eager, fused = gradients(False), gradients(True)
    assert len(eager) == len(fused) > 0
    for mine, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
@pytest.mark.filterwarnings("ignore:compile. layers 'query_key_value' are left out of their compiled blocks")
def test_slices_of_a_layer_are_left_to_it_in_compiled_blocks() -> None:
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    x = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        bank = make_bank("neox", ("a",), targets=["q", "v", "mlp"])
        add(bank, "b", targets="all-linear")
        if compiled:
            compile_blocks(bank.model)
        for _ in range(2):  # the first call of a block finds which layers it reaches
            for p in bank.parameters():
                p.grad = None
            with bank.route(["a", "b", BASE, "a"]):
                y = bank.model(input_ids=x).logits
            y.square().mean().backward()
        found.append((y.detach(), {**gradients(bank, "a"), **{f"b:{key}": g for key, g in gradients(bank, "b").items()}}))
    (plain, expected), (fast, gradients_found) = found
    assert torch.allclose(fast, plain, atol=1e-5)
    for key, g in expected.items():
        assert g.any(), key
        assert torch.allclose(gradients_found[key], g, atol=1e-6), key
