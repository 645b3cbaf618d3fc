"""An adapter on an embedding that is the output head too: both ends change, or one, and it is said which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.batch import make_batch
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.errors import TargetError
from lorabank.optim.slot_optimizer import SlotOptimizer
from tests.bank.tiny import add, fill, gradients, ids, llama, state_bytes

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def _tied(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return llama(tie_word_embeddings=True).eval()


def _both(model: nn.Module, **config: Any) -> AdapterBank:
    bank = lb.attach(model)
    add(bank, "a", targets=["embed_tokens", "q"], ensure_weight_tying=True, **config)
    return bank


def _by_hand(x: Tensor, bank: AdapterBank) -> Tensor:
    """The model with the change in its one weight."""
    layers = bank.adapter("a").layers
    changed = _tied()
    with torch.no_grad():
        changed.lm_head.weight.add_(layers[EMBEDDING].delta().t())
        for path, layer in layers.items():
            if "q_proj" in path:
                changed.get_parameter(f"{path}.weight").add_(layer.delta())
    return changed(x).logits.detach()


def test_both_ends_see_the_change() -> None:
    model, x = _tied(), ids(3)
    base = model(x).logits.detach()
    bank = _both(model)
    with bank.route(["a", BASE, "a"]):
        found = model(x).logits.detach()
    torch.testing.assert_close(found[[0, 2]], _by_hand(x, bank)[[0, 2]], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], base[1])
    assert [key for key, _ in bank.named_parameters("a") if HEAD in key] == []
    layers = bank.adapter("a").layers
    assert torch.equal(layers[HEAD].A, layers[EMBEDDING].B.t())
    assert torch.equal(layers[HEAD].B, layers[EMBEDDING].A.t())


def test_gradients_come_from_both_ends() -> None:
    model, x = _tied(), ids(2)
    bank = _both(model)
    A, B = (dict(bank.named_parameters("a"))[f"{EMBEDDING}.{role}"] for role in "AB")
    model(x).logits.square().mean().backward()
    found = gradients(bank)
    plain = _tied().requires_grad_(False)
    mine = [p.detach().clone().requires_grad_() for p in (A, B)]
    weight = plain.lm_head.weight + 2.0 * (mine[0].t() @ mine[1])
    changes = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    for path, layer in bank.adapter("a").layers.items():
        if "q_proj" in path:
            changes[f"{path}.weight"] = plain.get_parameter(f"{path}.weight") + layer.delta()
    torch.func.functional_call(plain, changes, (x,), tie_weights=False).logits.square().mean().backward()
    for role, leaf in zip("AB", mine, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(found[f"a:{EMBEDDING}.{role}"], leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("target", "changed", "other"), [("embed_tokens", EMBEDDING, HEAD), ("lm_head", HEAD, EMBEDDING)])
def test_one_end_alone_is_said(target: str, changed: str, other: str) -> None:
    bank = lb.attach(_tied())
    with pytest.warns(UserWarning, match=rf"'{changed}' and '{other}' have one weight.*ensure_weight_tying=True changes both"):
        bank.add("a", lb.AdapterConfig(rank=2, targets=[target]))
    assert list(bank.adapter("a").layers) == [changed]


def test_the_head_alone_named_brings_the_embedding_along() -> None:
    bank = lb.attach(_tied())
    bank.add("a", lb.AdapterConfig(rank=2, targets=["lm_head"], ensure_weight_tying=True))
    assert set(bank.adapter("a").layers) == {EMBEDDING, HEAD}


def test_where_nothing_is_tied_it_is_an_error() -> None:
    bank = lb.attach(llama(tie_word_embeddings=False))
    with pytest.raises(TargetError, match="ensure_weight_tying: none of the targeted layers"):
        bank.add("a", lb.AdapterConfig(rank=2, targets=["embed_tokens"], ensure_weight_tying=True))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_pefts_file_both_ways(tmp_path: Path) -> None:
    model, x = _tied(), ids(2)
    bank = _both(model)
    expected = model(x).logits.detach()
    bank.adapter("a").save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(_tied(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        other = _tied()
        loaded = lb.attach(other)
        loaded.load("b", lb.Adapter.load(tmp_path / folder))
        torch.testing.assert_close(other(x).logits.detach(), expected, rtol=1e-5, atol=1e-6)
        assert [key for key, _ in loaded.named_parameters("b") if HEAD in key] == []  # it stays tied
    lb.Adapter.load(tmp_path / "ours").save(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors", "lorabank.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_merged_is_unmerged_and_taken_back_bit_for_bit() -> None:
    model, x = _tied(), ids(2)
    before = state_bytes(model)
    bank = _both(model)
    expected = model(x).logits.detach()
    adapter = bank.adapter("a")
    bank.detach()
    handle = lb.merge(model, adapter, inputs=x, say=None)
    torch.testing.assert_close(model(x).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert state_bytes(model) == before


def test_a_slot_that_is_taken_out_leaves_others_as_they_were() -> None:
    model, x = _tied(), ids(2)
    bank = _both(model)
    with pytest.warns(UserWarning, match="have one weight"):
        bank.add("b", lb.AdapterConfig(rank=5, targets=["lm_head"]))
    fill(bank, "b")
    with bank.route("b"):
        expected = model(x).logits.detach()
    bank.remove("a")
    with bank.route("b"):
        assert torch.equal(model(x).logits, expected)
    assert bank.detach() is model


def test_training_keeps_the_ends_together() -> None:
    bank = _both(_tied())
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    optimizer.add("a")
    before = bank.adapter("a").layers[EMBEDDING]
    batch = make_batch([(row.tolist(), [1.0] * 6) for row in ids(2)], ["a", BASE])
    losses = []
    for _ in range(4):
        losses.append(forward_backward(engine, batch)["a"].mean)
        optim_step(optimizer, {"a": 0.05}, {"a": 10.0})
    layers = bank.adapter("a").layers
    assert losses[-1] < losses[0]
    assert not torch.equal(layers[EMBEDDING].A, before.A)
    assert torch.equal(layers[HEAD].A, layers[EMBEDDING].B.t())
    assert torch.equal(layers[HEAD].B, layers[EMBEDDING].A.t())


@pytest.mark.parametrize(
    "config", [{"targets": ["encoder.embed_tokens"]}, {"trainable_token_indices": {"encoder.embed_tokens": [5]}}]
)
def test_the_other_tables_of_one_weight_are_told(config: dict[str, Any]) -> None:
    """T5's encoder and decoder have a table each, of the weight that its head has too."""
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    bank = lb.attach(T5ForConditionalGeneration(T5Config(**sizes)))
    apart = "'encoder.embed_tokens' and 'shared', 'decoder.embed_tokens', 'lm_head' have one weight"
    with pytest.warns(UserWarning, match=apart):
        bank.add("a", lb.AdapterConfig(rank=2, **config))
