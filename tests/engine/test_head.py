"""Where the output head begins, and what a model does to its logits: the loss in chunks equals the one over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from lorabank import attach
from lorabank.engine.engine import Engine
from lorabank.engine.head import split_head
from lorabank.engine.step import logprobs
from lorabank.kernels.logit_shape import LogitShape
from lorabank.notices import warn_once
from tests.engine.tiny import BASE, backward, batch_of, difference, make_bank

FOUND = {
    "llama": None,
    "gemma2": LogitShape(cap=2.0),
    "cohere": LogitShape(factor=0.25),
    "granite": LogitShape(divisor=3.0),
}
LENGTHS, ROUTES = (5, 9, 7, 12), ("a", "b", BASE, "a")
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FOUND)
def test_logits_in_chunks_are_the_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(family)
    engine, plain = Engine(bank), Engine(bank)
    split = engine.head()
    assert split is not None
    assert split.shape == FOUND[family]
    batch = batch_of(LENGTHS, ROUTES)
    losses, found = backward(bank, batch, engine)
    scores = logprobs(engine, batch)
    monkeypatch.setattr(plain, "head", lambda: None)
    expected_losses, expected = backward(bank, batch, plain)
    for name, loss in expected_losses.items():
        assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=1e-5)
        assert difference(found[name], expected[name]) < 1e-4
    torch.testing.assert_close(scores, logprobs(plain, batch), rtol=1e-5, atol=1e-5)


def gemma(vocabulary: int = 61) -> Any:
    torch.manual_seed(0)
    config = hf.Gemma2Config(**{**SIZES, "vocab_size": vocabulary}, final_logit_softcapping=32.0)
    return hf.Gemma2ForCausalLM(config).eval()


def test_a_cap_that_the_probe_can_not_show_is_not_guessed() -> None:
    """In bf16 small logits are the same with a cap and without; in training they grow."""
    assert getattr(split_head(attach(gemma())), "shape", None) == LogitShape(cap=32.0)
    small = gemma()
    with torch.no_grad():
        small.get_input_embeddings().weight.mul_(1e-3)  # the head's, too
    assert split_head(attach(small.to(torch.bfloat16))) is None


def test_logits_that_are_all_held_are_told_about_once() -> None:
    warn_once.cache_clear()
    bank = make_bank(model=gemma(20_000), targets=["lm_head"])
    with pytest.warns(
        UserWarning, match="Gemma2ForCausalLM: .* 20,000 logits of every token .* its output head is adapted"
    ) as said:
        for _ in range(2):
            assert Engine(bank).head() is None
    assert len(said) == 1
    warn_once.cache_clear()


def test_a_number_that_means_nothing_here_is_not_used() -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES)
    config.logit_scale = 0.5  # of another family's vocabulary
    split = split_head(attach(hf.LlamaForCausalLM(config).eval()))
    assert split is not None
    assert split.shape is None
