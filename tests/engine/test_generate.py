"""`sample`: each row as transformers' own `generate` gives it under its adapter, alone and in a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorabank import BASE, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.batch import make_batch
from lorabank.engine.generate import sample, stream
from lorabank.engine.sampling import SamplingConfig
from lorabank.engine.step import Engine, logprobs
from lorabank.errors import AdapterNameError, ConfigError, DataError
from tests.engine.tiny import END_IDS, FAMILIES, VOCABULARY, make_bank, make_model, tokens

ROUTES = ["a", "b", BASE, "a", "b"]
PROMPTS = tokens([9, 4, 12, 7, 1])
NEW = 12
DRAWN = SamplingConfig(max_new_tokens=NEW, temperature=0.8, top_p=0.9, top_k=20)


def _generate(bank: AdapterBank, prompt: list[int], route: Any) -> list[int]:
    """transformers' greedy continuation, end token included."""
    model = bank.model
    assert isinstance(model, PreTrainedModel)
    text = torch.tensor([prompt])
    if "output_router_logits" in vars(model.config):
        model.config.output_router_logits = False  # transformers 5.10 can't reckon its loss behind a cache
    with bank.route(route):
        out: Any = model.generate(  # type: ignore[operator]
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=list(END_IDS),
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_under_each_adapter(family: str) -> None:
    bank = make_bank(family)
    found = sample(bank, PROMPTS, ROUTES, config=SamplingConfig(max_new_tokens=NEW), end_ids=END_IDS)
    for prompt, route, row in zip(PROMPTS, ROUTES, found, strict=True):
        expected = _generate(bank, prompt, route)
        ended = expected[-1] in END_IDS
        assert row.tokens == tuple(expected[:-1] if ended else expected)
        assert (row.ended, row.route, len(row.logprobs)) == (ended, route, len(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [SamplingConfig(max_new_tokens=NEW), DRAWN])
def test_logprobs_are_those_of_a_teacher_forced_pass(family: str, config: SamplingConfig) -> None:
    bank = make_bank(family)
    found = sample(bank, PROMPTS, ROUTES, config=config, end_ids=END_IDS, seeds=[5, 6, 7, 8, 9])
    for prompt, row in zip(PROMPTS, found, strict=True):
        if not row.tokens:
            continue
        text = [*prompt, *row.tokens]
        batch = make_batch([(text, [0.0] * len(prompt) + [1.0] * len(row.tokens))], [row.route])
        forced = logprobs(Engine(bank), batch)[0, len(prompt) :]
        # fp32 in another order, which BART's spread weights enlarge; a token at a wrong position is off by 0.1 and more
        assert row.logprobs[: len(row.tokens)] == pytest.approx(forced.tolist(), abs=5e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt", "mamba"])
@pytest.mark.parametrize("config", [SamplingConfig(max_new_tokens=NEW), DRAWN])
def test_a_row_alone_draws_what_it_draws_in_a_batch(family: str, config: SamplingConfig) -> None:
    bank = make_bank(family)
    seeds = [11, 3, 11, 0, 2]
    together = sample(bank, PROMPTS, ROUTES, config=config, end_ids=END_IDS, seeds=seeds)
    for i, row in enumerate(together):
        (alone,) = sample(bank, [PROMPTS[i]], [ROUTES[i]], config=config, end_ids=END_IDS, seeds=[seeds[i]])
        assert alone.tokens == row.tokens
        assert alone.ended == row.ended
        assert alone.logprobs == pytest.approx(row.logprobs, abs=1e-4)


def test_seeds_and_adapters_make_the_difference() -> None:
    bank = make_bank(model=make_model(spread=1.0))
    config = SamplingConfig(max_new_tokens=NEW, temperature=1.0)
    prompt = PROMPTS[0]
    rows = sample(bank, [prompt] * 4, ["a", "a", "a", "b"], config=config, seeds=[1, 1, 2, 1])
    assert rows[0].tokens == rows[1].tokens
    assert rows[0].tokens != rows[2].tokens
    assert rows[0].tokens != rows[3].tokens
    assert all(row.structure == bank.structure for row in rows)


def test_mixtures_are_for_sampling() -> None:
    bank = make_bank()
    mixed = {"a": 0.7, "b": 0.3}
    (found,) = sample(bank, [PROMPTS[0]], [mixed], config=SamplingConfig(max_new_tokens=NEW), end_ids=END_IDS)
    expected = _generate(bank, PROMPTS[0], mixed)
    assert found.tokens == tuple(t for t in expected if t not in END_IDS)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_streaming_gives_rows_in_order_within_a_step_and_says_when_each_is_done(family: str) -> None:
    bank = make_bank(family)
    config = SamplingConfig(max_new_tokens=NEW)
    whole = sample(bank, PROMPTS, ROUTES, config=config, end_ids=END_IDS)
    texts: list[list[int]] = [[] for _ in PROMPTS]
    done: set[int] = set()
    previous = -1
    for new in stream(bank, PROMPTS, ROUTES, config=config, end_ids=END_IDS):
        assert new.row not in done
        if new.row <= previous:
            assert all(row in done or len(texts[row]) == max(len(t) for t in texts) for row in range(len(texts)))
        previous = new.row
        assert not new.is_end or new.last
        if not new.is_end:
            texts[new.row].append(new.token)
        if new.last:
            done.add(new.row)
    assert [tuple(text) for text in texts] == [row.tokens for row in whole]
    assert done == set(range(len(PROMPTS)))


def test_rows_that_have_ended_leave_the_batch() -> None:
    bank = make_bank()
    seen: list[int] = []
    handle = bank.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["input_ids"].shape[0]), with_kwargs=True)
    found = sample(bank, PROMPTS, ROUTES, config=SamplingConfig(max_new_tokens=NEW), end_ids=END_IDS)
    handle.remove()
    lengths = [len(row.logprobs) for row in found]
    assert seen == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert seen[-1] < seen[0]


def test_a_broken_adapter_does_not_stop_the_rows_beside_it() -> None:
    bank = make_bank()
    healthy = sample(bank, PROMPTS[:2], ["a", BASE], config=DRAWN, end_ids=END_IDS, seeds=[1, 2])
    with torch.no_grad():
        bank.parameters("b")[1].fill_(math.nan)
    found = sample(bank, [*PROMPTS[:2], PROMPTS[3]], ["a", BASE, "b"], config=DRAWN, end_ids=END_IDS, seeds=[1, 2, 3])
    assert [row.tokens for row in found[:2]] == [row.tokens for row in healthy]
    assert all(math.isnan(lp) for lp in found[2].logprobs)


def test_what_cannot_be_sampled_is_refused_at_once() -> None:
    bank = make_bank()
    with pytest.raises(DataError, match="at least one token"):
        stream(bank, [[]], ["a"])
    with pytest.raises(DataError, match="2 prompts need a route each"):
        stream(bank, [[20], [21]], ["a"])
    with pytest.raises(DataError, match="route each"):
        stream(bank, [[20]], "a")
    with pytest.raises(DataError, match="outside the vocabulary"):
        stream(bank, [[VOCABULARY]], ["a"])
    with pytest.raises(AdapterNameError, match="no adapter 'c'"):
        stream(bank, [[20]], ["c"])
    with pytest.raises(ConfigError, match="Linear is no transformers model"):
        stream(attach(torch.nn.Sequential(torch.nn.Linear(2, 2))[0]), [[1]], [BASE])


def test_a_model_without_a_causal_head_is_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ConfigError, match="BertForMaskedLM can't generate"):
        stream(attach(model), [[1]], [BASE])
