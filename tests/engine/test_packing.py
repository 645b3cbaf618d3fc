"""Packed rows: every example of a row gives what it gives in a row of its own, outputs, losses and every gradient (laws 2, 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine.batch import Batch, make_batch, pack_batch, with_base_references
from lorabank.engine.packing import WAYS, Packing, _difference, packed_tensors, windows
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.errors import ConfigError, DataError
from tests.engine.test_loss_scale import bank_in, distance
from tests.engine.test_parts import memory_for
from tests.engine.tiny import FAMILIES, VOCABULARY, backward, difference, gradients, make_bank, make_model, tokens

TOLERANCE = 2e-5
"""fp32: the same sums in another order."""
GRADIENTS = 1e-3
"""The same for `difference`, as in test_step.py."""
REFUSED = {"bloom": "BloomForCausalLM", "mamba": "MambaForCausalLM", "bart": "BartForCausalLM"}
"""Families that have no position ids, or read a row from its start: they must say so."""
PACKABLE = [family for family in FAMILIES if family not in REFUSED]
LENGTHS: Sequence[Sequence[int]] = [[9, 1, 5], [12], [2, 7, 3, 1], [4, 8], [1]]
"""Odd lengths, a row of one example, rows of unlike length, an example of one token; mistral's and gemma2's window is 5."""
ROUTES: Sequence[RowRoute] = ["a", "b", BASE, "b", "a"]


def examples_of(lengths: Sequence[Sequence[int]] = LENGTHS) -> list[list[tuple[list[int], list[float]]]]:
    """Rows of random examples, all of whose tokens are trained but the first."""
    texts = iter(tokens([n for own in lengths for n in own]))
    return [[(next(texts), [1.0 + i % 3 for i in range(n)]) for n in own] for own in lengths]


def pair(
    lengths: Sequence[Sequence[int]] = LENGTHS, routes: Sequence[RowRoute] = ROUTES, *, numbers: Sequence[int] | None = None
) -> tuple[Batch, Batch]:
    """The same examples packed, and in rows of their own."""
    rows = examples_of(lengths)
    flat = [example for row in rows for example in row]
    each = [route for row, route in zip(rows, routes, strict=True) for _ in row]
    return pack_batch(rows, routes, examples=numbers), make_batch(flat, each, examples=numbers)


def assert_same_pass(bank: AdapterBank, packed: Batch, plain: Batch, engine: Engine | None = None, **kwargs: object) -> None:
    """Losses of every example and gradients of every leaf."""
    losses, found = backward(bank, packed, engine or Engine(bank), **kwargs)
    expected_losses, expected = backward(bank, plain, Engine(bank), **kwargs)
    assert losses.keys() == expected_losses.keys()
    for name, loss in expected_losses.items():
        assert losses[name].tokens == loss.tokens
        assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=TOLERANCE, abs=1e-6)
        assert difference(found[name], expected[name]) < GRADIENTS
        assert all(bool(g.any()) for g in found[name].values())


def test_law2_packed_rows_with_embeddings() -> None:
    for family in ("llama", "gpt2"):
        bank = make_bank(family, targets=["all-embedding", "mlp"])
        packed, plain = pair()
        assert_same_pass(bank, packed, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", PACKABLE)
def test_law2_packed_rows_equal_rows_of_their_own(family: str, checkpointing: bool) -> None:
    bank = make_bank(family)
    packed, plain = pair()
    assert packed.packed
    assert not plain.packed
    assert_same_pass(bank, packed, plain, Engine(bank, gradient_checkpointing=checkpointing))


@pytest.mark.parametrize("family", PACKABLE)
def test_law2_outputs_of_every_token(family: str) -> None:
    bank = make_bank(family)
    packed, plain = pair()
    found, expected = logprobs(Engine(bank), packed), logprobs(Engine(bank), plain)
    for (row, start, stop), (own, _, end) in zip(packed.spans, plain.spans, strict=True):
        assert found[row, start] == 0
        torch.testing.assert_close(found[row, start:stop], expected[own, :end], rtol=TOLERANCE, atol=TOLERANCE)
    assert bool((expected != 0).any())


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_packing_is_impossible_for_says_so(family: str) -> None:
    bank = make_bank(family)
    packed, plain = pair()
    with pytest.raises(ConfigError, match=rf"data\.packing: {REFUSED[family]} can't take packed rows.*Set data\.packing: false"):
        forward_backward(Engine(bank), packed)
    assert all(p.grad is None for p in bank.parameters())
    assert forward_backward(Engine(bank), plain).keys() == {"a", "b"}


class _Own(nn.Module):
    """A hand-written model that knows nothing of boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mix(self.embed(input_ids).cumsum(1))


def test_a_module_of_ones_own_is_refused_too() -> None:
    torch.manual_seed(0)
    bank = make_bank(model=_Own(), targets=["mix"])
    with pytest.raises(ConfigError, match=r"_Own can't take packed rows.*not a model of transformers"):
        forward_backward(Engine(bank), pair()[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt", "bert"])
def test_the_ways_give_the_same(family: str, way: str) -> None:
    """The fast way and its plain twins, masks made of the same boundaries, on outputs and gradients."""
    bank = make_bank(family)
    engine = Engine(bank)
    packed, plain = pair()
    length = packed.input_ids_NL.shape[1]
    assert engine.packing(length).way == "attention"
    engine._packing[windows(bank.model, length)] = Packing(bank.model, way)
    assert_same_pass(bank, packed, plain, engine)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "opt"])
def test_an_eager_model_takes_a_mask(family: str) -> None:
    model = make_model(family)
    model.set_attn_implementation("eager")
    bank = make_bank(family, model=model)
    engine = Engine(bank)
    packed, plain = pair()
    assert engine.packing(packed.input_ids_NL.shape[1]).way == "bias"
    assert_same_pass(bank, packed, plain, engine)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_trap5_a_packed_example_draws_the_dropout_it_draws_alone(family: str, checkpointing: bool) -> None:
    bank = make_bank(family, dropout=0.3)
    packed, plain = pair(numbers=[4, 0, 17, 3, 1, 2, 5, 6, 30, 9, 8])
    steps = {"a": 3, "b": 7}
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    assert_same_pass(bank, packed, plain, engine, steps=steps)
    _, found = backward(bank, packed, engine, steps=steps)
    for other in (replace(packed, examples_E=packed.examples_E + 1), packed):
        changed = steps if other is not packed else {"a": 4, "b": 7}
        _, drawn = backward(bank, other, engine, steps=changed)
        assert difference(drawn["a"], found["a"]) > 0.05


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
def test_parts_of_a_packed_batch_add_up_to_the_whole(family: str) -> None:
    bank = make_bank(family, dropout=0.2)
    packed, _ = pair(numbers=[*range(3, 14)])
    steps = {"a": 3, "b": 7}
    whole, expected = backward(bank, packed, steps=steps)
    for parts in ([[0, 1], [2, 3, 4]], [[4, 0, 3], [1, 2]], [[i] for i in range(5)]):
        for p in bank.parameters():
            p.grad = None
        losses: dict[int, float] = {}
        for part in parts:
            found = forward_backward(Engine(bank), packed.select(part), steps=steps)
            numbers = packed.examples_of(part)
            losses |= {numbers[place]: value for loss in found.values() for place, value in loss.row_losses.items()}
        assert losses == pytest.approx({**whole["a"].row_losses, **whole["b"].row_losses}, rel=TOLERANCE, abs=1e-6)
        for name in ("a", "b"):
            assert (
                difference({k: p.grad for k, p in bank.named_parameters(name) if p.grad is not None}, expected[name]) < GRADIENTS
            )


@pytest.mark.parametrize("in_backward", [False, True])
def test_packed_rows_that_do_not_fit_go_through_in_parts(in_backward: bool) -> None:
    bank = make_bank(dropout=0.3)
    packed, _ = pair(numbers=[*range(3, 14)])
    steps = {"a": 3, "b": 5}
    whole, expected = backward(bank, packed, steps=steps)
    tokens = logprobs(Engine(bank), packed)
    engine = Engine(bank)
    engine.packing(packed.input_ids_NL.shape[1])  # whose probe isn't counted
    with memory_for(engine, 30, in_backward=in_backward) as tried:
        losses, found = backward(bank, packed, engine, steps=steps)
        torch.testing.assert_close(logprobs(engine, packed), tokens, rtol=TOLERANCE, atol=TOLERANCE)
    assert tried[0] == (5, 15)
    assert engine.fits.times >= 1
    for name, loss in whole.items():
        assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=TOLERANCE, abs=1e-6)
        assert difference(found[name], expected[name]) < GRADIENTS


@pytest.mark.parametrize("family", ["llama", "cohere"])  # cohere's logits are scaled: the plain loss
def test_losses_of_a_base_in_fp16_are_scaled_an_example(family: str) -> None:
    packed, plain = pair()
    found = []
    for batch in (packed, plain):
        engine = Engine(bank_in(torch.float16, family))
        engine.loss_scales["b"].value = 2.0**4
        losses = forward_backward(engine, batch)
        found.append((losses, {name: gradients(engine.bank, name) for name in "ab"}))
    for name in "ab":
        assert found[0][0][name].row_losses == pytest.approx(found[1][0][name].row_losses, rel=2e-3)
        assert distance(found[0][1][name], found[1][1][name]) < 0.03


def test_references_on_base_rows_and_losses_an_example() -> None:
    bank = make_bank()
    packed, plain = pair(routes=["a", "b", "a", "b", "a"])
    engine = Engine(bank, loss="reverse_kl")
    found, mine = backward(bank, with_base_references(packed), engine)
    expected, alone = backward(bank, with_base_references(plain), Engine(bank, loss="reverse_kl"))
    for name in ("a", "b"):
        assert found[name].row_losses == pytest.approx(expected[name].row_losses, rel=TOLERANCE, abs=1e-6)
        assert difference(mine[name], alone[name]) < GRADIENTS


def test_law4_a_slot_that_is_not_finite_stays_in_its_rows() -> None:
    for family in ("llama", "gemma2"):
        bank, healthy = make_bank(family), make_bank(family)
        with torch.no_grad():
            bank.parameters("b")[5].fill_(math.nan)  # of v: where q is NaN, torch's attention on a CPU gives 0
        packed, _ = pair()
        losses, found = backward(bank, packed)
        expected_losses, expected = backward(healthy, packed)
        assert losses["a"] == expected_losses["a"]
        assert not losses["b"].finite
        assert all(torch.equal(g, found["a"][key]) for key, g in expected["a"].items())
        assert bool(logprobs(Engine(bank), packed)[[0, 2, 4]].isfinite().all())


def test_one_packed_row_has_no_say_over_another() -> None:
    """What `a` gets from a joint packed batch is what it gets alone."""
    bank = make_bank()
    packed, _ = pair()
    losses, found = backward(bank, packed)
    alone_losses, alone = backward(bank, packed.select([0, 4]))
    assert list(losses["a"].row_losses.values()) == pytest.approx(list(alone_losses["a"].row_losses.values()), rel=TOLERANCE)
    assert difference(found["a"], alone["a"]) < GRADIENTS


def test_a_window_is_probed_where_rows_reach_beyond_it() -> None:
    bank = make_bank("mistral")
    assert windows(bank.model, 5) == ()
    assert windows(bank.model, 6) == (5,)
    assert windows(make_model("llama"), 1000) == ()


def leaking(part: float) -> tuple[AdapterBank, Engine]:
    """A model one of whose layers hands `part` of each token on to the next, whatever the boundaries."""
    model = make_model()

    def leak(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + part * output.roll(1, 1) * (torch.arange(output.shape[1]) > 0)[:, None]

    model.model.layers[0].mlp.register_forward_hook(leak)
    bank = make_bank(model=model)
    return bank, Engine(bank)


@pytest.mark.parametrize("part", [0.5, 1e-6])
def test_the_slightest_leak_is_seen(part: float) -> None:
    """The smaller one is far below what the numbers of a model in bf16 would show."""
    assert leaking(0.0)[1].packing(8).way == "attention"
    with pytest.raises(ConfigError, match="an example sees another" if part < 0.1 else "outputs differ"):
        leaking(part)[1].packing(8)


def test_a_probe_that_gives_no_number_is_no_proof() -> None:
    good, bad = torch.ones(4, 3), torch.full((4, 3), math.nan)
    spans = [(0, 0, 4), (0, 4, 8)]
    assert _difference([good, good], [good, good], spans) == 0
    for found in ([good, bad], [bad, good]):
        assert not _difference(found, [good, good], spans) <= 1e-3
        assert not _difference([good, good], found, spans) <= 1e-3


def test_boundaries_and_positions() -> None:
    packed, _ = pair([[3, 1], [2], [2, 2, 1]], ["a", "a", "b"])
    made = packed_tensors(packed, torch.device("cpu"))
    assert made.cu_S.tolist() == [0, 3, 4, 5, 7, 10, 12, 14, 15]
    assert made.cu_S.dtype == torch.int32
    assert made.positions_NL.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0]]
    assert packed.example_numbers_NL().tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2], [3, 3, 4, 4, 5]]
    assert packed.weights_NL.tolist() == [[0, 2, 3, 0, 0], [0, 2, 0, 0, 0], [0, 2, 0, 2, 0]]
    assert packed.example_weights() == [5, 0, 2, 2, 2, 0]
    assert packed.spans == [(0, 0, 3), (0, 3, 4), (1, 0, 2), (2, 0, 2), (2, 2, 4), (2, 4, 5)]
    assert packed.example_routes == ("a", "a", "a", "b", "b", "b")
    chosen = packed.select([2, 0])
    assert chosen.segments == ((2, 2, 1), (3, 1))
    assert chosen.examples_E.tolist() == packed.examples_of([2, 0]) == [3, 4, 5, 0, 1]


def test_rows_of_one_example_each_are_a_plain_batch() -> None:
    packed, plain = pair([[3], [5]], ["a", "b"], numbers=[4, 2])
    assert packed.segments is None
    assert torch.equal(packed.input_ids_NL, plain.input_ids_NL)
    assert packed.examples_E.tolist() == [4, 2]


def test_pack_batch_refuses_rows_that_are_none() -> None:
    with pytest.raises(DataError, match="row 1 has no examples"):
        pack_batch([[([1], [0.0])], []])
    with pytest.raises(DataError, match="example 1 of row 0 has 0 tokens"):
        pack_batch([[([1], [0.0]), ([], [])]])
    with pytest.raises(DataError, match="example 0 of row 0 has 2 tokens and 1 weights"):
        pack_batch([[([1, 2], [0.0]), ([1], [0.0])]])
    with pytest.raises(DataError, match="2 examples but 1 example numbers"):
        pack_batch([[([1], [0.0]), ([1], [0.0])]], examples=[1])
    with pytest.raises(DataError, match="NaN"):
        pack_batch([[([1, 2], [0.0, math.nan]), ([1], [0.0])]])
