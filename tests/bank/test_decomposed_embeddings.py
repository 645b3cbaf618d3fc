"""DoRA on embeddings: held to PEFT's layer, outputs and every gradient, and merged."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach, combine, merge
from lorabank.errors import MergeError, TargetError
from tests.bank.tiny import add, fill, gradients, ids, llama, outputs


class Table(nn.Module):
    """A table whose row 2 isn't trained, and something behind it that isn't linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(9, 5, padding_idx=2)
        nn.init.normal_(self.embed.weight)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


X = torch.tensor([[1, 2, 3, 1], [4, 2, 8, 0]])


def test_outputs_and_gradients_are_pefts() -> None:
    """Where a row isn't trained, too, and of an id that comes twice."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed"], use_dora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(Table(), config)  # pyright: ignore[reportArgumentType]
    bank = attach(Table())
    bank.add("a", AdapterConfig(rank=3, alpha=6, targets=["embed"], use_dora=True))
    layer: Any = theirs.get_submodule("base_model.model.embed")
    pairs = {
        "A": layer.lora_embedding_A["default"],
        "B": layer.lora_embedding_B["default"],
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }
    leaves = {key.rpartition(".")[2]: p for key, p in bank.named_parameters("a")}
    assert leaves.keys() == pairs.keys()
    assert leaves["magnitude"].shape == (5,)
    with torch.no_grad():
        pairs["magnitude"].mul_(1 + 0.3 * torch.randn(5))
        for role, p in pairs.items():
            leaves[role].copy_(p.t() if role == "B" else p)
    results = []
    for model in (theirs, bank.model):
        y = model(X)
        y.square().sum().backward()
        results.append(y.detach())
    torch.testing.assert_close(results[1], results[0])
    for role, p in pairs.items():
        found, wanted = leaves[role].grad, p.grad
        assert found is not None and wanted is not None
        torch.testing.assert_close(found.t() if role == "B" else found, wanted, msg=lambda said, role=role: f"{role}: {said}")
    assert leaves["A"].grad is not None and not leaves["A"].grad[:, 2].any()


def test_a_fresh_one_changes_nothing_and_a_trained_one_the_looked_up_rows_of_its_own_units() -> None:
    bank, plain = attach(Table()), Table()
    bank.add("a", AdapterConfig(rank=2, targets=["embed"], use_dora=True))
    with bank.route("a"):
        assert torch.equal(bank.model(X), plain(X))
    fill(bank, "a")
    with bank.route(["a", BASE]):
        y = bank.model(X)
    assert torch.equal(y[1], plain(X)[1])
    assert not torch.isclose(y[0], plain(X)[0]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_answers_as_unmerged_and_comes_off_to_the_bit(dtype: torch.dtype) -> None:
    bank = attach(Table())
    add(bank, "a", targets=["embed"], use_dora=True)
    adapter = bank.adapter("a")
    base = Table().to(dtype)
    before = base.embed.weight.detach().clone()
    beside = attach(base)
    beside.load("a", adapter, force=True)
    expected = beside.model(X).detach()
    beside.detach()
    handle = merge(base, adapter, say=None, force=True, inputs=X)
    assert handle.logits is not None and handle.logits.difference < (1e-6 if dtype == torch.float32 else 0.05)
    torch.testing.assert_close(base(X).detach(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)
    handle.unmerge()
    assert torch.equal(base.embed.weight, before)
    with pytest.raises(MergeError, match="is decomposed"):
        combine([(adapter, 0.5), (adapter, 0.5)], method="exact")


def test_a_tied_head_keeps_the_bases_weight_and_tying_both_is_refused() -> None:
    """Of a feature of the table PEFT's norm is over all ids; the head's outputs are those ids."""
    bank = attach(llama(tie_word_embeddings=True).eval())
    with pytest.raises(TargetError, match=r"use_dora: 'lm_head' would read the numbers of 'model.embed_tokens'"):
        bank.add("a", AdapterConfig(targets=["embed_tokens"], use_dora=True, ensure_weight_tying=True))
    assert bank.names == ()
    with pytest.warns(UserWarning, match="have one weight, and the adapter changes the first alone"):
        bank.add("a", AdapterConfig(rank=2, targets=["embed_tokens"], use_dora=True))
    fill(bank, "a")
    adapter = bank.adapter("a")
    with pytest.raises(MergeError, match="tied"):
        merge(llama(tie_word_embeddings=True), adapter, force=True, say=None)
    with bank.route(["a", BASE]):
        outputs(bank.model, ids(2)).square().sum().backward()
    assert all(bool(g.any()) for g in gradients(bank).values())


def test_beside_plain_adapters_and_mixed_with_them() -> None:
    bank = attach(Table().eval())
    add(bank, "dora", targets=["embed"], use_dora=True)
    add(bank, "lora", targets=["embed"])
    with bank.route(["dora", "lora"]):
        mixed = bank.model.get_submodule("embed")(X)
    table = Table().embed.weight.detach()
    changed = {}
    for name in bank.names:
        layer = bank.adapter(name).layers["embed"]
        changed[name] = table + layer.delta().t()
        if layer.magnitude is not None:
            changed[name] = changed[name] * (layer.magnitude / changed[name].norm(dim=0))
    torch.testing.assert_close(mixed, torch.stack([changed["dora"][X[0]], changed["lora"][X[1]]]))
    with bank.route({"dora": 0.7, "lora": -0.4}):
        both = bank.model.get_submodule("embed")(X)
    wanted = table + 0.7 * (changed["dora"] - table) - 0.4 * (changed["lora"] - table)
    torch.testing.assert_close(both, wanted[X])
