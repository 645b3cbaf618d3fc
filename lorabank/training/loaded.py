"""`load_run`: a base model, by its name or as an object, with trained adapters, from a folder or as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.config.tasks import SECTION_OF, TASK_SECTIONS, merged_task
from lorabank.config.train import AdapterRun, DataConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.read import Source
from lorabank.data.sources import ToScore
from lorabank.errors import ConfigError, DataError, MissingExtraError, Setting, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter
from lorabank.models.load import QUANTIZED
from lorabank.training.base_rows import BASE_NAME, base_rows
from lorabank.training.data_sets import RowObjects, TaskRow, adapter_runs
from lorabank.training.given import given_base
from lorabank.training.processors import MADE_WITH
from lorabank.training.source import Trained, TrainedSource, read_source
from lorabank.training.task import BaseRequest, Task, TaskBase, TaskKind

HELD_OUT = ("test", "validation", "val", "valid", "dev", "eval")
"""Names of splits that are scored, the first that is there."""


@dataclass(frozen=True)
class LoadedRun:
    """A base model with trained adapters in a bank, ready to be talked to."""

    bank: AdapterBank
    task: Task[Any]
    names: list[str]
    """Adapters in the bank."""
    config: TrainConfig | None
    """Of the run that they came from, when there is one."""
    notes: tuple[str, ...] = ()
    """Sentences about the base, for people."""

    @property
    def model(self) -> Any:
        """The base."""
        return self.bank.model

    @property
    def tokenizer(self) -> Any:
        """What prepares inputs: a tokenizer, or the task's own processor."""
        return self.task.processor


def load_run(
    source: Trained | None,
    adapters: Sequence[str] | None = None,
    *,
    kinds: Callable[[str], TaskKind],
    model: Any = None,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    check: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    early: Callable[[TaskKind], None] = lambda kind: None,
) -> LoadedRun:
    """Load what `source` is. `adapters`: which of a run's; `base` needs no loading.

    `kinds`: a task's name → how it is loaded. `model`: the base, as an object or a name; None: the one that the adapters name.
    `tokenizer`: what prepares the inputs of a model object; None: what lies beside the adapters. `task`: its name; None: the
    run's, else what the adapters say. `check`: metrics that the task has to know, before its model is loaded. `settings`: of the
    task's own section, for a base by itself. `early`: called with the task's kind before the model is loaded.
    `dtype`: as `load_base` has it; with `auto` a base that was in fp8 or 4 bits in training is so again.

    Inputs are prepared by what was saved beside the adapters, chat template included; else by the base's own. Raises
    AdapterNameError for a name that the run doesn't have, CheckpointError for a run that hasn't ended, ModelError for its base,
    FingerprintError for a model that the adapters weren't trained on. A model object is as it was after any of them.
    """
    found = read_source(source, adapters)
    own_task = found.task(task)
    kind = kinds(own_task)
    if settings and (found.config is not None or found.loaded):
        raise ConfigError(
            Setting(f"{SECTION_OF.get(own_task, own_task)}.{next(iter(settings))}"),
            f": is for a base model by itself, and {found.name} was trained with settings of its own. Leave it out.",
        )
    _check_settings(own_task, settings or {})
    try:
        kind.check_metrics(check)
    except ConfigError as error:
        raise error if error.settings else ConfigError(Setting("eval.metrics"), ": ", *error.parts) from error
    early(kind)
    base = _base_of(kind, found, model, tokenizer, task=own_task, dtype=dtype, device=device)
    config = found.config or _config_alone(own_task, base.folder, found.loaded, settings or {})
    opened = kind.open(config, base.model, base.processor, found.loaded)
    bank = attach(base.model, head=opened.head)
    try:
        for name, adapter in found.loaded.items():
            bank.load(name, adapter)
    except BaseException:
        bank.detach()
        raise
    return LoadedRun(bank, opened, list(found.loaded), found.config, tuple(base.notes))


def _base_of(kind: TaskKind, found: TrainedSource, model: Any, tokenizer: Any, *, task: str, dtype: str, device: str) -> TaskBase:
    """The base with what prepares its inputs, from objects or by name."""
    folders = [found.folders[name] for name in found.loaded if name in found.folders]
    if model is None or isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError(
                "tokenizer: given without a model as an object. Give both, or neither: a model that has a name brings its own."
            )
        base = _named_base(kind, str(model or found.base_name()), found, dtype=dtype, device=device)
        return replace(base, processor=kind.processor.saved(folders) or base.processor)
    if found.path is not None and found.config is None and not found.folders:
        raise ConfigError(f"{found.name}: no run and no adapter there, and the base is the model given. Name one, or give None.")
    processor = kind.processor.saved(folders) if tokenizer is None else tokenizer
    made_with = {a.metadata[MADE_WITH] for a in found.loaded.values() if MADE_WITH in a.metadata}
    if processor is None and made_with:
        raise ConfigError(
            f"tokenizer: missing. {found.name}: trained on what a {' or '.join(sorted(made_with))} prepared, and none lies "
            "beside. Give it as tokenizer=…"
        )
    return given_base(kind, model, processor, task=task, dtype=dtype, device=device)


def _check_settings(task: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that the task doesn't have."""
    section = SECTION_OF.get(task)
    known = [] if section is None else [item.name for item in fields(TASK_SECTIONS[section])]
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(f"{unknown[0]}: {task} has no such setting{closest(unknown[0], known)}. Leave it out.")


def _config_alone(task: str, folder: Path | None, loaded: Mapping[str, Adapter], settings: Mapping[str, Any]) -> TrainConfig:
    """What a base without a run is used with: what was asked for, then what a merged model says. Adapters say it themselves."""
    section = SECTION_OF.get(task)
    if section is None:
        return TrainConfig()
    merged_for, said = merged_task(folder) if folder is not None and not loaded else (None, {})
    own = {**(said if merged_for == task else {}), **settings}
    made: Any = {section: TASK_SECTIONS[section](**own)}
    return TrainConfig(task=task, **made)


def _named_base(kind: TaskKind, name: str, found: TrainedSource, *, dtype: str, device: str) -> TaskBase:
    loaded, config = found.loaded, found.config
    storages = {adapter.metadata.get(BASE_STORAGE) for adapter in loaded.values()}
    if not loaded and config is not None:
        storages = {config.base_dtype}
    (storage,) = storages if len(storages) == 1 else (None,)
    request = BaseRequest(model=name, dtype=dtype, device=device)
    if dtype != "auto" or storage not in QUANTIZED:
        return kind.load(request, _silent)
    try:
        base = kind.load(replace(request, dtype=storage), _silent)
    except MissingExtraError as error:
        base = kind.load(request, _silent)
        return replace(base, notes=(f"the base was in {storage} in training, and can't be here: {error}", *base.notes))
    note = f"the base is in {storage}, as it was in training (dtype, or --dtype, takes another)"
    return replace(base, notes=(note, *base.notes))


def _silent(line: str) -> None:
    """For progress lines that nobody asked for."""


def held_out_rows(
    run: LoadedRun,
    names: Sequence[str],
    data: DataConfig | Source,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Sequence[TaskRow]]:
    """The rows that each name is scored on: those of `data`, or `data.test` if there is one, else the run's own held-out rows.

    `data`: rows (a `datasets.Dataset`, a list of dicts), or settings that say where they are.

    `base` becomes one name for each distinct set of rows of the adapters among `names` (of all, if none is).
    `say` gets the lines of the report over `data.test`; the run's own rows were reported when it was trained. `progress`: rows
    read, and rows in all.
    """
    if not isinstance(data, DataConfig):
        return dict.fromkeys(names, _given_rows(run, data, say, progress))
    own = run.config is not None and run.config.data == data and data.test is None
    if own and run.config is not None:
        if data.train is None and not all(r.data for r in adapter_runs(run.config).values()):
            raise DataError(
                "evaluation: the run was trained on rows given as objects, which it can't read again. Give data.test (--data)."
            )
        sets = run.task.read(run.config, None, progress).by_adapter
        held = {name: sets[name].test or sets[name].val for name in sets}
        sets_of_rows = list(base_rows(held).values())
        every = sets_of_rows[0] if len(sets_of_rows) == 1 else [row for rows in sets_of_rows for row in rows]
        scored = {name: held.get(name, every) for name in names if name != BASE_NAME}
        base = base_rows(scored or held) or {BASE_NAME: every}
        return {**scored, **(base if BASE_NAME in names else {})}
    source = data.test or data.val or data.train
    if source is None:
        raise DataError("evaluation: no rows. Give data.test (--data).")
    alone = replace(data, train=None, val=None, test=source, val_split=0, test_split=0)
    settings = replace(run.config or run.task.config, data=alone, adapters={}, defaults=AdapterRun())
    (sets,) = run.task.read(settings, None, progress).by_adapter.values()
    for line in sets.report.lines():
        say(line)
    return dict.fromkeys(names, sets.test)


def _given_rows(run: LoadedRun, rows: Source, say: Callable[[str], None], progress: Progress | None) -> Sequence[TaskRow]:
    """Rows that were given as objects; of several splits the test split."""
    if isinstance(rows, Mapping):
        rows = _held_out_split(rows)
    config = run.config or run.task.config
    more: Any = dict.fromkeys(("train", "val", "test", "limit", "group_by"))
    alone = replace(config.data, **more, val_split=0, test_split=0)
    settings = replace(config, data=alone, adapters={}, defaults=AdapterRun())
    (sets,) = run.task.read(settings, RowObjects(train=ToScore(rows)), progress).by_adapter.values()
    for line in sets.report.lines():
        say(line)
    return sets.test


def _held_out_split(splits: Mapping[str, Source]) -> Source:
    """Of a `DatasetDict`, or a dict of splits. Raises DataError where none is for scoring."""
    known = [name for name in HELD_OUT if name in splits] or (list(splits) if len(splits) == 1 else [])
    if not known:
        raise DataError(
            f"evaluation: expected rows, or splits with one of {', '.join(HELD_OUT)} among them, got a "
            f"{type(splits).__name__} of {', '.join(map(str, splits)) or 'nothing'}. Give one: data=splits['…']."
        )
    return splits[known[0]]
