"""What follows training: a run or an adapter is loaded, scored on rows, and answers others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.config.paths import expanded
from lorabank.config.train import DataConfig, EvalConfig
from lorabank.errors import ConfigError, DataError, OutputError
from lorabank.training.base_rows import BASE_NAME

if TYPE_CHECKING:
    from lorabank.data.formats import Example
    from lorabank.training.loaded import LoadedRun


def load_run(
    source: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    check: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """Load a run folder, an adapter folder or a plain base model. `adapters`: which of a run's; `base` needs no loading.

    `task`: of a plain base model, `text-generation` if it isn't given. `check`: metrics that the task has to know, before its
    model is loaded. `settings`: of the task's own section (`{"language": "german"}`), for a base by itself: a run has its own.
    """
    from lorabank.tasks import task_kind
    from lorabank.training.loaded import load_run as load

    return load(source, adapters, kinds=task_kind, device=device, dtype=dtype, task=task, check=check, settings=settings)


def evaluate(
    source: str | Path,
    adapters: Sequence[str] | None,
    data: DataConfig,
    *,
    metrics: Sequence[str] = ("loss",),
    max_rows: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, float]]:
    """Score adapters and `base` on held-out rows: `data.test` if given, else the run's test or validation rows.

    `settings`: see `load_run`.

    `say` gets notes about the base, and the lines of the report over rows that aren't the run's own: how many were read, kept,
    dropped and why, or cut.
    """
    from lorabank.training.busy import BusyBar
    from lorabank.training.loaded import held_out_rows

    run = load_run(source, adapters, device=device, dtype=dtype, task=task, check=metrics, settings=settings)
    for note in run.notes:
        say(f"note: {note}")
    names = _named(run, source, adapters)
    report: list[str] = []
    with BusyBar() as busy:
        rows = held_out_rows(run, names, data, report.append, lambda done, total: busy("reading rows", done, total))
    for line in report:
        say(line)
    if not any(rows.values()):
        raise DataError(f"{source}: the run held no rows out that could be scored. Give some: --data (data.test).")
    config = EvalConfig(
        metrics=tuple(metrics), max_rows=max_rows, max_prompts=max_rows, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    with BusyBar() as busy:
        return run.task.scores(run.task.engine(run.bank), rows, config=config, busy=busy)


def predict(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    max_rows: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Predictions of adapters (and of `base`, where it has any) for rows without answers, written to `output`, which isn't there.

    For every task but text generation, whose answers are drawn by `generate_stream`. `options`: what the task knows beside.
    `settings`: see `load_run`.
    Returns a sentence on what was written.
    """
    from lorabank.training.busy import BusyBar
    from lorabank.training.task import Prediction

    where = expanded(str(output), place="output")
    if where.exists():
        raise OutputError(f"{where}: exists already. Choose another output.")
    options = options or {}
    mixed = [part.rpartition(":")[0].strip() for mix in options.get("mix") or () for part in str(mix).split(",")]
    needed = None if adapters is None else list(dict.fromkeys([*adapters, *filter(None, mixed)]))
    run = load_run(source, needed, device=device, dtype=dtype, task=task, settings=settings)
    for note in run.notes:
        say(f"note: {note}")
    names = _named(run, source, adapters)
    wanted = Prediction(data=str(data), output=where, names=names, max_rows=max_rows, batch_size=batch_size, options=options)
    with BusyBar() as busy:
        return run.task.predict(run.task.engine(run.bank), wanted, busy=busy)


def generate_stream(
    run: LoadedRun,
    rows: Sequence[tuple[str, Example | Sequence[Mapping[str, Any]]]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[str | None]]:
    """Answers to (adapter or `base`, prompt) rows, all in one batch, as lists of new text; None once a row has ended.

    A prompt is messages, or a row of data in its normal form, whose answer may be missing. It is rendered as in training, by the
    run's `data.chat`. Messages are taken as they are: put the run's `data.system` before them where it has one.
    """
    from lorabank.data.prompt import chat_prompt_ids
    from lorabank.engine.generate import stream
    from lorabank.engine.sampling import SamplingConfig
    from lorabank.engine.step import Engine
    from lorabank.training.evaluate import end_tokens, pad_token, route_of
    from lorabank.training.streaming import TextStream

    chat = run.config.data.chat if run.config is not None else None
    prompts = [chat_prompt_ids(run.tokenizer, prompt, chat=chat) for _, prompt in rows]
    texts = [TextStream(run.tokenizer) for _ in rows]
    ended = [False] * len(rows)
    deltas: list[str | None] = [""] * len(rows)
    seen: set[int] = set()
    for new in stream(
        run.bank,
        prompts,
        [route_of(name) for name, _ in rows],
        config=SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p),
        end_ids=end_tokens(Engine(run.bank), run.tokenizer),
        pad_id=pad_token(run.tokenizer),
        seeds=[seed] * len(rows),
    ):
        if new.row in seen:
            yield deltas
            deltas, seen = [None if done else "" for done in ended], set()
        seen.add(new.row)
        text = "" if new.is_end else texts[new.row].add(new.token)
        if new.last:
            text += texts[new.row].end()
            ended[new.row] = True
        deltas[new.row] = text
    yield deltas


def _named(run: LoadedRun, source: str | Path, adapters: Sequence[str] | None) -> list[str]:
    """Adapters that were asked for, else all, and the base where it has something to say. Raises ConfigError for none."""
    names = list(dict.fromkeys(adapters)) if adapters else [*run.names, *([BASE_NAME] if run.task.scores_base else [])]
    if not names:
        raise ConfigError(
            f"{source}: a base model without adapters, whose head has no names of labels, or may have others than the rows of "
            f"{run.task.name}. Name a run, an adapter's folder, or this head with --adapters {BASE_NAME} if its labels fit."
        )
    return names
