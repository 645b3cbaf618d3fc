"""`forward_backward`: law 2, exact accumulation, losses against transformers' own, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.engine.batch import make_batch
from lorabank.engine.rows import dropout_routing
from lorabank.engine.step import Engine, SlotLoss, forward_backward, logprobs
from lorabank.errors import ConfigError, DataError, RoutingError
from tests.engine.tiny import (
    FAMILIES,
    SPLITS,
    VOCABULARY,
    backward,
    batch_of,
    difference,
    gradients,
    make_bank,
    make_model,
    tokens,
)

TOLERANCE = 2e-5
"""fp32: the same sums in another order."""
GRADIENTS = 1e-3
"""The same for `difference`: gradients of q and k cancel, which costs OPT 8e-4 with torch 2.11."""
ROUTES = ["a", BASE, "b", "a", "b"]
LENGTHS = [9, 5, 12, 4, 7]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba"])
def test_law2_a_mixed_batch_equals_the_separate_batches(family: str, checkpointing: bool) -> None:
    bank = make_bank(family)
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    mixed, mixed_gradients = backward(bank, batch_of(LENGTHS, ROUTES), engine)
    for name in ("a", "b"):
        mine = [i for i, route in enumerate(ROUTES) if route == name]
        alone, alone_gradients = backward(bank, batch_of(LENGTHS, ROUTES).select(mine), Engine(bank))
        assert mixed[name].loss_sum == pytest.approx(alone[name].loss_sum, rel=TOLERANCE)
        assert mixed[name].tokens == alone[name].tokens == sum(LENGTHS[i] - 2 for i in mine)
        assert list(mixed[name].row_losses) == mine
        assert list(mixed[name].row_losses.values()) == pytest.approx(list(alone[name].row_losses.values()), rel=TOLERANCE)
        assert difference(mixed_gradients[name], alone_gradients[name]) < GRADIENTS
        assert len(mixed_gradients[name]) == len(bank.parameters(name))
        assert all(bool(g.any()) for g in mixed_gradients[name].values())


def test_law2_where_only_some_layers_are_adapted() -> None:
    bank = make_bank("mamba")
    mixed, mixed_gradients = backward(bank, batch_of(LENGTHS, ROUTES))
    alone, alone_gradients = backward(bank, batch_of(LENGTHS, ROUTES).select([2, 4]))
    assert mixed["b"].loss_sum == pytest.approx(alone["b"].loss_sum, rel=TOLERANCE)
    assert difference(mixed_gradients["b"], alone_gradients["b"]) < GRADIENTS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_logits_and_padding_changes_nothing(family: str) -> None:
    bank = make_bank(family)
    engine = Engine(bank)
    assert (engine.head() is not None) == (family in SPLITS)
    routes = ["a", BASE, "b", "a"]
    rows = tokens([9, 4, 12, 7])
    found = logprobs(engine, make_batch([(ids, [1.0] * len(ids)) for ids in rows], routes, pad_id=2))
    for i, (ids, route) in enumerate(zip(rows, routes, strict=True)):
        text = torch.tensor([ids])
        with torch.no_grad(), bank.route(route):
            out = bank.model(input_ids=text, output_router_logits=False) if family == "mixtral" else bank.model(input_ids=text)
        own = out.logits[0, :-1].float().log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]
        assert torch.allclose(found[i, 1 : len(ids)], own, atol=2e-5)
        assert not found[i, len(ids) :].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_the_mean_loss_is_transformers_own_loss(family: str) -> None:
    bank = make_bank(family)
    (ids,) = tokens([11])
    losses = forward_backward(Engine(bank), make_batch([(ids, [1.0] * 11)], "a"))
    text = torch.tensor([ids])
    with torch.no_grad(), bank.route("a"):
        expected = bank.model(input_ids=text, labels=text.clone(), num_items_in_batch=None).loss
    assert losses["a"].mean == pytest.approx(float(expected), rel=1e-5)


def test_an_auxiliary_loss_of_experts_is_not_trained_on() -> None:
    model = make_model("mixtral")
    bank = make_bank("mixtral", model=model)
    assert model.config.output_router_logits
    (ids,) = tokens([11])
    text = torch.tensor([ids])
    with torch.no_grad(), bank.route("a"):
        out = bank.model(input_ids=text, labels=text.clone())
    found = forward_backward(Engine(bank), make_batch([(ids, [1.0] * 11)], "a"))["a"].mean
    auxiliary = model.config.router_aux_loss_coef * out.aux_loss
    assert float(auxiliary) > 1e-4
    assert found == pytest.approx(float(out.loss - auxiliary), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_parts_of_a_batch_add_up_to_the_whole(family: str) -> None:
    """One pass of 8 rows = 2 of 4 = 8 of 1, with ragged token counts, dropout and two adapters."""
    bank = make_bank(family, dropout=0.2)
    batch = batch_of([9, 3, 12, 4, 7, 5, 3, 8], ["a", "b", "a", "a", "b", "a", "b", "b"])
    steps = {"a": 3, "b": 7}
    whole, expected = backward(bank, batch, steps=steps)
    for parts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[7, 0], [1, 2, 6, 5], [4, 3]]):
        for p in bank.parameters():
            p.grad = None
        losses = [forward_backward(Engine(bank), batch.select(part), steps=steps) for part in parts]
        for name in ("a", "b"):
            assert difference(gradients(bank, name), expected[name]) < GRADIENTS
            assert sum(part[name].loss_sum for part in losses if name in part) == pytest.approx(
                whole[name].loss_sum, rel=TOLERANCE
            )
            assert sum(part[name].tokens for part in losses if name in part) == whole[name].tokens


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropout_is_drawn_from_the_step_and_the_example_alone(family: str) -> None:
    bank = make_bank(family, dropout=0.3)
    engine = Engine(bank)
    batch = batch_of([6, 9], ["a", "b"], examples=[4, 5])
    _, first = backward(bank, batch, engine, steps={"a": 1, "b": 1})
    torch.manual_seed(99)
    _, again = backward(bank, batch, engine, steps={"a": 1, "b": 1})
    assert all(torch.equal(first["a"][key], g) for key, g in again["a"].items())
    # alone, without the padding that the longer row brings, and among other rows
    _, alone = backward(bank, batch_of([6], "a", examples=[4]), engine, steps={"a": 1})
    assert difference(alone["a"], first["a"]) < GRADIENTS
    for changed in ({"steps": {"a": 2, "b": 1}}, {"steps": None}):
        if changed["steps"] is None:
            with pytest.warns(UserWarning, match="dropout"):
                _, other = backward(bank, batch, engine, **changed)
        else:
            _, other = backward(bank, batch, engine, **changed)
        assert difference(other["a"], first["a"]) > 0.05
    _, other = backward(bank, batch_of([6, 9], ["a", "b"], examples=[6, 5]), engine, steps={"a": 1, "b": 1})
    assert difference(other["a"], first["a"]) > 0.05
    assert difference(other["b"], first["b"]) < GRADIENTS


def test_every_token_draws_its_own_dropout_where_a_model_folds_them() -> None:
    bank = make_bank("opt", names=("a",), dropout=0.5)
    assert Engine(bank).folded()
    assert not Engine(make_bank("llama")).folded()
    drawn = [dropout_routing(bank, ["a"] * 3, n, {"a": 0}, torch.tensor([0, 1, 7]), folded=True).dropout for n in (5, 8)]
    short, padded = (d.examples.view(3, -1) for d in drawn if d is not None)
    assert torch.equal(short, padded[:, :5])
    assert len(padded.unique()) == len(torch.unique(padded & 0xFFFFFFFF)) == 24


def test_bf16_base_keeps_fp32_gradients_close() -> None:
    _, expected = backward(make_bank(model=make_model(spread=1.0)), batch_of(LENGTHS, ROUTES))
    bank = make_bank(model=make_model(spread=1.0).bfloat16())
    losses, found = backward(bank, batch_of(LENGTHS, ROUTES))
    assert all(g.dtype == torch.float32 for g in found["a"].values())
    # bf16 keeps 8 bits: activations and their gradients are rounded on the way
    for name in ("a", "b"):
        cosine = [torch.cosine_similarity(found[name][k].flatten(), g.flatten(), 0) for k, g in expected[name].items()]
        assert min(cosine) > 0.95
    alone, alone_gradients = backward(bank, batch_of(LENGTHS, ROUTES).select([0, 3]))
    assert losses["a"].loss_sum == pytest.approx(alone["a"].loss_sum, rel=0.01)
    assert difference(found["a"], alone_gradients["a"]) < 0.05


def test_base_rows_and_rows_without_trained_tokens_give_nothing() -> None:
    bank = make_bank()
    assert forward_backward(Engine(bank), batch_of([5, 6], BASE)) == {}
    assert all(p.grad is None for p in bank.parameters())
    losses = forward_backward(Engine(bank), make_batch([(tokens([5])[0], [0.0] * 5)], "a"))
    assert losses == {"a": SlotLoss(tokens=0.0, row_losses={0: 0.0})}
    assert not any(p.grad is not None and bool(p.grad.any()) for p in bank.parameters())


def test_token_weights_scale_the_loss() -> None:
    bank = make_bank()
    (ids,) = tokens([6])
    first = forward_backward(Engine(bank), make_batch([(ids, [0, 0, 0, 1, 0, 0])], "a"))["a"]
    second = forward_backward(Engine(bank), make_batch([(ids, [0, 0, 0, 0, 0, 1])], "a"))["a"]
    both = forward_backward(Engine(bank), make_batch([(ids, [0, 0, 0, 0.5, 0, 2])], "a"))["a"]
    assert both.loss_sum == pytest.approx(0.5 * first.loss_sum + 2 * second.loss_sum, rel=1e-5)
    assert both.tokens == 2.5


class _Own(nn.Module):
    """A hand-written causal model with a name for nothing but its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(input_ids)).cumsum(1).tanh())


def test_a_module_of_ones_own_takes_the_plain_path() -> None:
    torch.manual_seed(0)
    bank = make_bank(model=_Own(), targets=["mix"])
    engine = Engine(bank)
    assert engine.head() is None
    mixed, found = backward(bank, batch_of(LENGTHS, ROUTES), engine)
    alone, expected = backward(bank, batch_of(LENGTHS, ROUTES).select([2, 4]), engine)
    assert mixed["b"].loss_sum == pytest.approx(alone["b"].loss_sum, rel=TOLERANCE)
    assert difference(found["b"], expected["b"]) < GRADIENTS


def test_an_adapted_head_is_never_bypassed() -> None:
    bank = make_bank()
    engine = Engine(bank)
    assert engine.head() is not None
    bank.add("c", AdapterConfig(rank=2, targets=["lm_head"]))
    assert engine.head() is None
    _, found = backward(bank, batch_of([6, 7], ["c", "a"]), engine)
    assert set(found["c"]) == {"lm_head.A", "lm_head.B"}
    assert bool(found["c"]["lm_head.B"].any())


def test_bad_input_is_refused_before_any_gradient() -> None:
    bank = make_bank(dropout=0.1)
    engine = Engine(bank)
    good = batch_of([5, 6], ["a", "b"])
    with pytest.raises(RoutingError, match="mixture"):
        forward_backward(engine, batch_of([5], [{"a": 0.5, "b": 0.5}]))
    with pytest.raises(ConfigError, match="steps has no entry for adapter 'b'"):
        forward_backward(engine, good, steps={"a": 0})
    with pytest.raises(DataError, match=f"token id {VOCABULARY} is outside the vocabulary"):
        forward_backward(engine, make_batch([([3, VOCABULARY], [0.0, 1.0])], "a"))
    with pytest.raises(DataError, match="reference_logprobs_NL"):
        forward_backward(engine, good, reference_logprobs_NL=torch.zeros(1, 1))
    with pytest.raises(ConfigError, match=r"did you mean 'nll'"):
        Engine(bank, loss="nl")
    assert all(p.grad is None for p in bank.parameters())


def test_an_encoder_decoder_model_is_refused_by_name() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder"):
        forward_backward(Engine(attach(model)), make_batch([([3, 4], [0.0, 1.0])], BASE))


def test_make_batch_refuses_rows_that_are_none() -> None:
    with pytest.raises(DataError, match="no rows"):
        make_batch([])
    with pytest.raises(DataError, match="row 1 has 0 tokens"):
        make_batch([([1], [0.0]), ([], [])])
    with pytest.raises(DataError, match="row 0 has 2 tokens and 1 weights"):
        make_batch([([1, 2], [0.0])])
    with pytest.raises(DataError, match="row 1 has a token weight that is NaN"):
        make_batch([([1, 2], [0.0, 1.0]), ([1, 2], [0.0, math.nan])])
    with pytest.raises(DataError, match="2 rows but 1 routes"):
        make_batch([([1], [0.0])] * 2, ["a"])
    with pytest.raises(DataError, match="no rows"):
        batch_of([3]).select([])


def test_the_first_token_is_never_a_target_and_pads_are_told_by_length() -> None:
    batch = make_batch([([5, 2, 2], [1.0, 1.0, 1.0]), ([5], [1.0])], pad_id=2)
    assert batch.weights_NL.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert batch.attention_mask_NL.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.input_ids_NL.tolist() == [[5, 2, 2], [5, 2, 2]]
