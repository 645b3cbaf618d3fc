"""`predict` of language models: an answer to each row, one column an adapter, in JSON lines."""

from __future__ import annotations

import json
from typing import Any

from lorabank.config.train import TrainConfig
from lorabank.data.answers import refuse_taken
from lorabank.data.formats import template_columns
from lorabank.data.prompt import chat_prompt_ids
from lorabank.engine.engine import Engine
from lorabank.engine.generate import sample
from lorabank.engine.sampling import SamplingConfig
from lorabank.errors import ConfigError, closest
from lorabank.formats.files import write_files
from lorabank.tasks.asked import check_json_lines, rows_asked
from lorabank.tasks.asked_prompts import prompts_of
from lorabank.training.evaluate import end_tokens, pad_token, route_of
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

OPTIONS = ("prompt", "system", "max_new_tokens", "temperature", "top_p", "seed")
LONGEST, SEED = 256, 42
"""Tokens of an answer and seed of its draws, unless said otherwise."""


def answer_rows(engine: Engine, tokenizer: Any, config: TrainConfig, wanted: Prediction, busy: Busy) -> str:
    """Write every row with a column for each name; returns what was done.

    Options: those of `lorabank predict`; a row's draws depend on `seed` and its place. Raises DataError for a row without
    a prompt.
    """
    options = dict(wanted.options)
    if unknown := [name for name in options if name not in OPTIONS]:
        raise ConfigError(f"predict: text-generation knows no option {unknown[0]!r}{closest(unknown[0], OPTIONS)}")
    check_json_lines(wanted.output)
    if (template := options.get("prompt")) is not None:
        template_columns(template, place="prompt")
    rows = rows_asked(wanted.data, wanted.max_rows, column="prompt")
    refuse_taken(rows, wanted.names)
    examples = prompts_of(rows, config, template=template, system=options.get("system"))
    prompts = [chat_prompt_ids(tokenizer, example, chat=config.data.chat) for example in examples]
    sampling = SamplingConfig(
        max_new_tokens=options.get("max_new_tokens", LONGEST),
        temperature=options.get("temperature", 0.0),
        top_p=options.get("top_p", 1.0),
    )
    answers: list[dict[str, str]] = [{} for _ in rows]
    jobs = [(i, name) for i in range(len(rows)) for name in wanted.names]
    jobs.sort(key=lambda job: len(prompts[job[0]]))
    for start in range(0, len(jobs), wanted.batch_size):
        part = jobs[start : start + wanted.batch_size]
        found = sample(
            engine.bank,
            [prompts[i] for i, _ in part],
            [route_of(name) for _, name in part],
            config=sampling,
            end_ids=end_tokens(engine, tokenizer),
            pad_id=pad_token(tokenizer),
            seeds=[options.get("seed", SEED) + i for i, _ in part],
        )
        for (i, name), each in zip(part, found, strict=True):
            answers[i][name] = str(tokenizer.decode(list(each.tokens), skip_special_tokens=True))
        busy("answering", min(start + wanted.batch_size, len(jobs)), len(jobs))
    lines = []
    for row, own in zip(rows, answers, strict=True):
        ordered = {name: own[name] for name in wanted.names}
        lines.append(json.dumps({**row.values, **ordered}, ensure_ascii=False, default=str) + "\n")
    write_files(wanted.output.parent, {wanted.output.name: "".join(lines)})
    return f"{counted(len(rows), 'row')} answered by {', '.join(wanted.names)}: {wanted.output}"
