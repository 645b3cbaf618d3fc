"""What follows training: a run or an adapter is loaded, scored on rows, and answers others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.config.paths import expanded
from lorabank.config.train import DataConfig, EvalConfig
from lorabank.errors import ConfigError, DataError, OutputError
from lorabank.training.base_rows import BASE_NAME

if TYPE_CHECKING:
    from lorabank.data.formats import Example
    from lorabank.training.loaded import LoadedRun
    from lorabank.training.source import Trained
    from lorabank.training.task import TaskKind


def load_run(
    source: Trained | None,
    adapters: Sequence[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    check: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """Load a run folder, an adapter folder or a plain base model. `adapters`: which of a run's; `base` needs no loading.

    `source`, `model`, `tokenizer`: as `evaluate` has them; a model object is attached to until `bank.detach()`. `task`: of a
    plain base model, `text-generation` if it isn't given. `check`: metrics that the task has to know, before its model is
    loaded. `settings`: of the task's own section (`{"language": "german"}`), for a base by itself: a run has its own.
    """
    from lorabank.tasks import task_kind
    from lorabank.training.loaded import load_run as load

    how: Any = {"device": device, "dtype": dtype, "task": task, "check": check, "settings": settings}
    return load(source, adapters, kinds=task_kind, model=model, tokenizer=tokenizer, **how)


def evaluate(
    source: Trained | None,
    data: Any = None,
    adapters: Sequence[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    metrics: Sequence[str] | None = None,
    max_rows: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, float]]:
    """Scores of adapters and of the base on the same held-out rows: name to metric to number.

    `source`: a run's folder, an adapter's folder, an `Adapter`, names to adapters (`result.trained`) or to their folders, a
    base model's name, or None for the `model` by itself. `adapters`: names among them, and `base`; None: all, and the base
    where its own head says something. `data`: a path, a data set's id, rows (a `datasets.Dataset`, a list of dicts), or a
    `DataConfig`; None: the rows that the run held out.

    `model`: the base as an object (an `nn.Module`; for text-to-image a pipeline of diffusers), or a name in place of the one
    that the adapters say; None: that one. An object is afterwards as it was before, to the bit, after an error too.
    `tokenizer`: what prepares the inputs of a model object (a tokenizer, an image processor, …); None: what lies beside the
    adapters in their folders, where it was saved.

    `metrics`: None: those of the run's `eval.metrics`, else `loss`. `max_rows`: spread evenly over the rows. `max_new_tokens`:
    of an answer; None: the run's, else 128. `task`: of a base by itself (`image-classification`, …), text-generation if it
    isn't given. `settings`: of its section, such as `{"language": "german"}`: adapters have their own. `say` gets sentences: on
    the base, and on rows that aren't the run's own (how many were read, kept, dropped and why, or cut).

    Raises LorabankError: AdapterNameError, ConfigError for metrics, settings or objects that don't fit, DataError for rows that
    can't be used, ModelError and FingerprintError for the base.
    """
    from lorabank.data.read import check_source
    from lorabank.data.sources import told_of_splits
    from lorabank.training.busy import BusyBar
    from lorabank.training.loaded import held_out_rows
    from lorabank.training.source import run_config_of

    if isinstance(metrics, str):
        raise ConfigError(f"metrics: expected a list of names, got the text {metrics!r}. Write [{metrics!r}].")
    config = run_config_of(source)
    known = list(metrics) if metrics is not None else list(config.eval.metrics) if config is not None else ["loss"]
    longest = max_new_tokens or (config.eval.max_new_tokens if config is not None else EvalConfig.max_new_tokens)
    folder = data
    if data is None:
        data = config.data if config is not None else DataConfig()
    elif isinstance(data, str | Path):
        check_source(str(data), place="data")
        own = config.data if config is not None else DataConfig()
        data = replace(own, train=None, val=None, test=str(data), val_split=0, test_split=0, limit=None)
    how: Any = {"device": device, "dtype": dtype, "task": task, "settings": settings, "check": known}
    with _loaded(source, adapters, model, tokenizer, **how) as run:
        for note in run.notes:
            say(f"note: {note}")
        names = _named(run, source, adapters)
        report: list[str] = []
        with BusyBar() as busy:
            try:
                rows = held_out_rows(run, names, data, report.append, lambda done, total: busy("reading rows", done, total))
            except DataError as error:
                raise told_of_splits(error, folder) from error
        for line in report:
            say(line)
        if not any(rows.values()):
            raise DataError(f"{_shown(source)}: the run held no rows out that could be scored. Give some: --data (data.test).")
        scored = EvalConfig(
            metrics=tuple(known), max_rows=max_rows, max_prompts=max_rows, max_new_tokens=longest, batch_size=batch_size
        )
        with BusyBar() as busy:
            return run.task.scores(run.task.engine(run.bank), rows, config=scored, busy=busy)


def predict(
    source: Trained | None,
    data: Any,
    output: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    max_rows: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write predictions of adapters, and of `base` where it has any, for rows without answers; returns a sentence on them.

    `data`: a path, or rows (a `datasets.Dataset`, a list of dicts), as the task's page says; None where `options` say what is
    asked (text-to-image: `{"prompt": "a cat"}`). `output`: a path where nothing is yet: a file of JSON lines with a column an
    adapter, or the folder or file that the task writes (detection, speech and pictures: see their pages).

    `options`: what `lorabank predict` has flags for, by their names (`{"threshold": 0.5}`, `{"beams": 4}`,
    `{"bad_rows": "stop"}`). `source`, `adapters`, `model`, `tokenizer`, `task`, `settings`, `say`: as `evaluate` has them; a
    model object is afterwards as it was before, to the bit.

    Raises LorabankError: OutputError for an output that is there already or can't be written, else as `evaluate`.
    """
    from lorabank.data.read import check_source
    from lorabank.training.busy import BusyBar
    from lorabank.training.task import Prediction

    where = expanded(str(output), place="output")
    if where.exists():
        raise OutputError(f"{where}: exists already. Choose another output.")
    options = options or {}
    none = data is None or (isinstance(data, str) and not data)
    if none and not options.get("prompt"):
        raise DataError("data: missing. Expected a path, or rows (a datasets.Dataset, a list of dicts).")
    if isinstance(data, str | Path) and not none:
        check_source(str(data), place="data")  # before the model is loaded
    mixed = [part.rpartition(":")[0].strip() for mix in options.get("mix") or () for part in str(mix).split(",")]
    needed = None if adapters is None else list(dict.fromkeys([*adapters, *filter(None, mixed)]))

    def early(kind: TaskKind) -> None:
        kind.check_output(where)

    how: Any = {"device": device, "dtype": dtype, "task": task, "settings": settings, "early": early}
    with _loaded(source, needed, model, tokenizer, **how) as run:
        for note in run.notes:
            say(f"note: {note}")
        wanted = Prediction(
            data="" if data is None else str(data) if isinstance(data, Path) else data,
            output=where,
            names=_named(run, source, adapters),
            max_rows=max_rows,
            batch_size=batch_size,
            options=options,
        )
        with BusyBar() as busy:
            return run.task.predict(run.task.engine(run.bank), wanted, busy=busy)


@contextmanager
def _loaded(
    source: Trained | None, adapters: Sequence[str] | None, model: Any, tokenizer: Any, **how: Any
) -> Iterator[LoadedRun]:
    """A run for a while. A model that was given as an object is put back: its layers, what it trains, and its mode."""
    from lorabank.engine.modes import evaluation_mode
    from lorabank.tasks import task_kind
    from lorabank.training.loaded import load_run as load

    run = load(source, adapters, kinds=task_kind, model=model, tokenizer=tokenizer, **how)
    try:
        with evaluation_mode(run.task.modules()):
            yield run
    finally:
        run.bank.detach()


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


def _named(run: LoadedRun, source: Trained | None, adapters: Sequence[str] | None) -> list[str]:
    """Adapters that were asked for, else all, and the base where it has something to say. Raises ConfigError for none."""
    names = list(dict.fromkeys(adapters)) if adapters else [*run.names, *([BASE_NAME] if run.task.scores_base else [])]
    if not names:
        raise ConfigError(
            f"{_shown(source)}: a base model without adapters, whose head has no names of labels, or may have others than the "
            f"rows of {run.task.name}. Name a run, an adapter's folder, or this head with adapters=[{BASE_NAME!r}] (--adapters "
            f"{BASE_NAME}) if its labels fit."
        )
    return names


def _shown(source: Trained | None) -> str:
    """What messages call it."""
    return str(source) if isinstance(source, str | Path) else "the model given" if source is None else "the adapters given"
