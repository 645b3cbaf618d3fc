"""`load_run`: a base model with trained adapters, from a run folder, an adapter's folder or a model's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.config.checks import check_adapter_name
from lorabank.config.parse import load_config
from lorabank.config.paths import expanded
from lorabank.config.tasks import DEFAULT_TASK, SECTION_OF, TASK_SECTIONS, merged_task, task_of_model
from lorabank.config.train import AdapterRun, DataConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    ModelError,
    Setting,
    closest,
)
from lorabank.formats.adapter import BASE_STORAGE, Adapter
from lorabank.formats.choice import DEFAULT, adapters_in, chosen
from lorabank.formats.peft import load_peft
from lorabank.models.load import QUANTIZED
from lorabank.models.names import alias
from lorabank.models.quiet import quiet_transformers
from lorabank.training.base_rows import BASE_NAME, base_rows
from lorabank.training.data_sets import TaskRow, adapter_runs
from lorabank.training.run_folder import resume_line
from lorabank.training.task import TASK_KEY, BaseRequest, Task, TaskBase, TaskKind

UNNAMED = "adapter"
"""What an adapter is called whose folder's name can't be one."""


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
    source: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    kinds: Callable[[str], TaskKind],
    device: str = "auto",
    dtype: str = "auto",
    task: str | None = None,
    check: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """Load a run folder, an adapter folder or a plain base model. `adapters`: which of a run's; `base` needs no loading.

    `kinds`: a task's name → how it is loaded. `task`: its name; None: the run's, else what the adapters say. `check`: metrics
    that the task has to know, before its model is loaded. `settings`: of the task's own section, for a base by itself.
    `dtype`: as `load_base` has it; with `auto` a base that was in fp8 or 4 bits in training is so again.
    The tokenizer is the one that was saved beside the adapters, chat template included; else the base's. Raises
    AdapterNameError for a name that the run doesn't have, CheckpointError for a run that hasn't ended, ModelError for its base.
    """
    path = chosen(Path(source))
    config = _config_of(path)
    folders = adapter_folders(path, config)
    wanted = list(dict.fromkeys(name for name in (folders if adapters is None else adapters) if name != BASE_NAME))
    for name in wanted:
        if name not in folders:
            raise AdapterNameError(
                f"{source}: no adapter {name!r}{closest(name, folders)}. It has: {', '.join(folders) or 'none'}."
            )
    if config is not None and not folders and adapters is None:
        raise CheckpointError(f"{source}: the run has no adapter yet, since it didn't end. To go on with it: {resume_line(path)}")
    loaded = {name: load_peft(folders[name]) for name in wanted}
    own_task = _chosen_task(task, source, config, loaded)
    kind = kinds(own_task)
    if settings and (config is not None or loaded):
        raise ConfigError(
            Setting(f"{SECTION_OF.get(own_task, own_task)}.{next(iter(settings))}"),
            f": is for a base model by itself, and {source} was trained with settings of its own. Leave it out.",
        )
    try:
        kind.check_metrics(check)
    except ConfigError as error:
        raise error if error.settings else ConfigError(Setting("eval.metrics"), ": ", *error.parts) from error
    base = _base(kind, _base_name(path, config, folders, loaded), config, loaded, dtype=dtype, device=device)
    processor = base.processor
    if isinstance(processor, PreTrainedTokenizerBase):
        processor = _saved_tokenizer([folders[name] for name in wanted]) or processor
    opened = kind.open(config or _config_alone(own_task, base.folder, loaded, settings or {}), base.model, processor, loaded)
    bank = attach(base.model, head=opened.head)
    for name, adapter in loaded.items():
        bank.load(name, adapter)
    return LoadedRun(bank, opened, list(loaded), config, tuple(base.notes))


def _config_alone(task: str, folder: Path | None, loaded: Mapping[str, Adapter], settings: Mapping[str, Any]) -> TrainConfig:
    """What a base without a run is used with: what was asked for, then what a merged model says. Adapters say it themselves.

    Raises ConfigError for settings that the task doesn't have.
    """
    section = SECTION_OF.get(task)
    if section is None:
        if settings:
            raise ConfigError(f"{next(iter(settings))}: {task} has no such setting. Leave it out.")
        return TrainConfig()
    merged_for, said = merged_task(folder) if folder is not None and not loaded else (None, {})
    own = {**(said if merged_for == task else {}), **settings}
    kind = TASK_SECTIONS[section]
    known = [item.name for item in fields(kind)]
    if unknown := [name for name in own if name not in known]:
        raise ConfigError(f"{unknown[0]}: {task} has no such setting{closest(unknown[0], known)}. Leave it out.")
    made: Any = {section: kind(**own)}
    return TrainConfig(task=task, **made)


def _chosen_task(asked: str | None, source: str | Path, config: TrainConfig | None, loaded: Mapping[str, Adapter]) -> str:
    """The task that was asked for, else what is known of it. Raises ConfigError where that is another: a head would be random."""
    if asked is None:
        said = task_of_model(chosen(Path(source))) if not loaded and config is None else None
        return said or _task_of(config, loaded)
    told = {adapter.metadata[TASK_KEY] for adapter in loaded.values() if TASK_KEY in adapter.metadata}  # other tools say nothing
    known = {config.task} if config is not None else told
    if known - {asked}:
        raise ConfigError(
            f"{source}: was trained for {', '.join(sorted(known))}, so it can't be loaded for {asked}. Leave the task out, which "
            "is for plain base models."
        )
    return asked


def _task_of(config: TrainConfig | None, loaded: Mapping[str, Adapter]) -> str:
    """The run's task, or that of its adapters. Raises ConfigError where they are of several."""
    if config is not None:
        return config.task
    said = {name: adapter.metadata.get(TASK_KEY, DEFAULT_TASK) for name, adapter in loaded.items()}
    if len(set(said.values())) > 1:
        raise ConfigError(f"adapters of several tasks can't be loaded together: {said}. Name those of one of them.")
    return next(iter(said.values()), DEFAULT_TASK)


def adapter_folders(path: Path, config: TrainConfig | None = None) -> dict[str, Path]:
    """Adapter name to folder, of a run folder (in the run's order) or a single adapter's."""
    if (path / "adapter_config.json").is_file():
        others = {name: folder for name, folder in adapters_in(path).items() if folder != path}
        return {_name_of(path.resolve()): path} if not others else {DEFAULT: path, **others}
    if not path.is_dir():
        return {}
    found = {p.name: p for p in sorted(path.iterdir()) if (p / "adapter_config.json").is_file()}
    order = list(adapter_runs(config)) if config is not None else []
    return {name: found[name] for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order))}


def _name_of(folder: Path) -> str:
    """A name for an adapter by its folder; `formal/last` is formal's."""
    name = folder.parent.name if folder.name == "last" else folder.name
    try:
        check_adapter_name(name)
    except AdapterNameError:
        return UNNAMED
    return name


def _config_of(path: Path) -> TrainConfig | None:
    """Of the run whose folder this is, or that this adapter's folder lies in."""
    inside = (path / "adapter_config.json").is_file()
    for folder in (path, *path.resolve().parents[:2]) if inside else (path,):
        if (folder / "config.yaml").is_file():
            return load_config(folder)[0]
    return None


def _base_name(path: Path, config: TrainConfig | None, folders: Mapping[str, Path], loaded: Mapping[str, Adapter]) -> str:
    """The base that the adapters name, or the run: whichever is on this machine, since both may be paths."""
    if not folders and config is None:
        return str(path)
    if not loaded:
        loaded = {name: load_peft(folder) for name, folder in list(folders.items())[:1]}
    names = [config.model] if config is not None else []
    names = [name for name in (*names, *(adapter.base_model for adapter in loaded.values())) if name]
    if not names:
        raise ConfigError(
            f"{path}: neither the run nor its adapters say which base model they belong to. Load the model yourself and use "
            "lorabank.attach(model) and bank.load(name, lorabank.Adapter.load(folder))."
        )
    return next((name for name in names if alias(name) or expanded(name, place="model").exists()), names[0])


def _base(
    kind: TaskKind, name: str, config: TrainConfig | None, loaded: Mapping[str, Adapter], *, dtype: str, device: str
) -> TaskBase:
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


def _saved_tokenizer(folders: Sequence[Path]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the adapters, which has the chat template that they were trained with; None without one."""
    folder = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    if folder is None:
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged or exotic tokenizer surfaces as almost any class
        raise ModelError(
            f"{folder}: the tokenizer beside the adapter can't be read ({error}). Delete it to use the base's."
        ) from error


def held_out_rows(
    run: LoadedRun,
    names: Sequence[str],
    data: DataConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Sequence[TaskRow]]:
    """The rows that each name is scored on: `data.test` if there is one, else the run's own held-out rows.

    `base` becomes one name for each distinct set of rows of the adapters among `names` (of all, if none is).
    `say` gets the lines of the report over `data.test`; the run's own rows were reported when it was trained. `progress`: rows
    read, and rows in all.
    """
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
