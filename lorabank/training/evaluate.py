"""Scoring adapters and the base on held-out rows, all of them in the same passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lorabank.bank.routing import BASE, RowRoute
from lorabank.config.train import EvalConfig
from lorabank.data.render import TokenRow
from lorabank.engine.batch import make_batch
from lorabank.engine.generate import sample
from lorabank.engine.sampling import SamplingConfig
from lorabank.engine.step import Engine, logprobs
from lorabank.errors import DataError
from lorabank.training.base_rows import is_base
from lorabank.training.scorers import LOSS_METRICS, score, split_metrics

Busy = Callable[[str, int, int], None]
"""(activity, done, total): progress, and the place where an impatient caller may raise."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One held-out prompt with its references and every model's answer."""

    prompt: str
    references: tuple[str, ...]
    answers: dict[str, str] = field(default_factory=dict)
    """Adapter name, or `base`, to its answer."""


def route_of(name: str) -> RowRoute:
    """The route of an adapter's name; `base`, on whosever rows, is BASE."""
    return BASE if is_base(name) else name


def validation_losses(engine: Engine, rows: Mapping[str, Sequence[TokenRow]], *, batch_size: int, busy: Busy) -> dict[str, float]:
    """Mean negative log-likelihood a trained token, nats, of each name (an adapter, or `base`) on its rows."""
    jobs = [(name, row) for name, own in rows.items() for row in own]
    jobs.sort(key=lambda job: len(job[1].input_ids))
    sums = dict.fromkeys(rows, 0.0)
    tokens = dict.fromkeys(rows, 0.0)
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        batch = make_batch([(row.input_ids, row.weights) for _, row in part], [route_of(name) for name, _ in part])
        found = (logprobs(engine, batch).cpu() * batch.weights_NL).sum(1).double().tolist()
        counts = batch.weights_NL.sum(1).tolist()
        for (name, _), value, count in zip(part, found, counts, strict=True):
            sums[name] -= value
            tokens[name] += count
        busy("scoring", min(start + batch_size, len(jobs)), len(jobs))
    return {name: sums[name] / max(tokens[name], 1e-12) for name in rows if rows[name]}


def unique_prompts(rows: Sequence[TokenRow], limit: int | None = None) -> list[tuple[tuple[int, ...], Generated]]:
    """Prompts that can be generated from, each once, with all their references."""
    found: dict[tuple[int, ...], tuple[str, dict[str, None]]] = {}
    for row in rows:
        if row.prompt_ids and row.reference:
            found.setdefault(row.prompt_ids, (row.prompt_text, {}))[1][row.reference] = None
    prompts = [(ids, Generated(prompt=text, references=tuple(references))) for ids, (text, references) in found.items()]
    return list(spread(prompts, limit))


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` items, evenly spaced; the same sequence object when all of them are wanted."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def generate_answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[tuple[int, ...], Generated]],
    names: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    busy: Busy,
) -> None:
    """Fill in every model's greedy answer to every prompt, adapters and base in the same batches."""
    jobs = sorted(((name, ids, into) for ids, into in prompts for name in names), key=lambda job: len(job[1]))
    config = SamplingConfig(max_new_tokens=max_new_tokens)
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        outputs = sample(
            engine.bank,
            [ids for _, ids, _ in part],
            [route_of(name) for name, _, _ in part],
            config=config,
            end_ids=end_tokens(engine, tokenizer),
            pad_id=pad_token(tokenizer),
        )
        for (name, _, into), output in zip(part, outputs, strict=True):
            into.answers[name] = str(tokenizer.decode(list(output.tokens), skip_special_tokens=True)).strip()
        busy("generating answers", min(start + batch_size, len(jobs)), len(jobs))


def end_tokens(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation config."""
    generation = getattr(engine.bank.model, "generation_config", None)
    return sorted({*token_ids(tokenizer.eos_token_id), *token_ids(getattr(generation, "eos_token_id", None))})


def token_ids(value: object) -> list[int]:
    """One id, several, or none, as a list: configurations hold all three."""
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list | tuple) else []


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that padding is filled with; masks come from lengths, so any will do."""
    return next(iter(token_ids(tokenizer.pad_token_id)), 0)


def score_answers(prompts: Sequence[Generated], names: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Every metric of generated text, for every name."""
    _, scorers = split_metrics(metrics)
    if not scorers:
        return {name: {} for name in names}
    references = [list(p.references) for p in prompts]
    return {name: score(scorers, [p.answers[name] for p in prompts], references) for name in names}


def full_scores(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[TokenRow]],
    *,
    config: EvalConfig,
    busy: Busy,
) -> dict[str, dict[str, float]]:
    """Loss, what follows from it, and every generation metric for each name on its own rows."""
    empty = [name for name, own in rows.items() if not own]
    if empty:
        raise DataError(f"evaluation: no held-out rows for {', '.join(empty)}")
    scored = {name: spread(own, config.max_rows) for name, own in rows.items()}
    losses = validation_losses(engine, scored, batch_size=config.batch_size, busy=busy)
    from_loss, scorers = split_metrics(config.metrics)
    result = {name: {"loss": loss, **{m: LOSS_METRICS[m](loss) for m in from_loss}} for name, loss in losses.items()}
    if scorers:
        by_rows: dict[int, list[str]] = {}
        for name, own in rows.items():
            by_rows.setdefault(id(own), []).append(name)
        for names in by_rows.values():
            prompts = unique_prompts(rows[names[0]], config.max_prompts)
            if not prompts:
                raise DataError(
                    "evaluation: no row has a prompt and an answer, so nothing can be generated. Use metrics loss or perplexity."
                )
            generate_answers(
                engine, tokenizer, prompts, names, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, busy=busy
            )
            for name, found in score_answers([g for _, g in prompts], names, config.metrics).items():
                result[name] |= found
    return result
