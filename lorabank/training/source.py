"""`TrainedSource`: adapters that are to be used, and what is known of the run that they come from. No model is loaded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorabank.config.checks import check_adapter_name
from lorabank.config.parse import load_config
from lorabank.config.paths import expanded
from lorabank.config.tasks import DEFAULT_TASK, task_of_model
from lorabank.config.train import TrainConfig
from lorabank.errors import AdapterNameError, CheckpointError, ConfigError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.choice import DEFAULT, adapters_in, chosen
from lorabank.formats.peft import load_peft
from lorabank.models.names import alias
from lorabank.training.base_rows import BASE_NAME
from lorabank.training.data_sets import DEFAULT_ADAPTER, adapter_runs
from lorabank.training.run_folder import resume_line
from lorabank.training.task import TASK_KEY

UNNAMED = "adapter"
"""What an adapter is called whose folder's name can't be one."""
Trained = str | Path | Adapter | Mapping[str, Adapter | str | Path]
"""A run's folder, an adapter's, a base model's name; an adapter, or names to adapters or their folders."""


@dataclass(frozen=True, kw_only=True)
class TrainedSource:
    """Adapters by name, and where they are from."""

    name: str
    """For messages."""
    path: Path | None = None
    """As it was asked for; None where there is none."""
    config: TrainConfig | None = None
    """Of the run, when there is one."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Of every adapter that lies in a folder, also of those that aren't used."""
    loaded: Mapping[str, Adapter] = field(default_factory=dict)
    """Those that are to be used."""
    example: Adapter | None = None
    """One of those that aren't, where none is used: it says what the base is for."""

    def task(self, asked: str | None) -> str:
        """The task that was asked for, else what is known of it. Raises ConfigError where that is another."""
        if asked is None:
            bare = self.path is not None and not self.loaded and self.config is None
            said = task_of_model(self.path) if bare and self.path is not None else None
            return said or self._task()
        told = {a.metadata[TASK_KEY] for a in self.loaded.values() if TASK_KEY in a.metadata}  # other tools say nothing
        known = {self.config.task} if self.config is not None else told
        if known - {asked}:
            raise ConfigError(  # a head would be random
                f"{self.name}: was trained for {', '.join(sorted(known))}, so it can't be loaded for {asked}. Leave the task "
                "out, which is for plain base models."
            )
        return asked

    def _task(self) -> str:
        """The run's task, or that of its adapters. Raises ConfigError where they are of several."""
        if self.config is not None:
            return self.config.task
        known = self.loaded or ({} if self.example is None else {"": self.example})
        said = {name: adapter.metadata.get(TASK_KEY, DEFAULT_TASK) for name, adapter in known.items()}
        if len(set(said.values())) > 1:
            raise ConfigError(f"adapters of several tasks can't be loaded together: {said}. Name those of one of them.")
        return next(iter(said.values()), DEFAULT_TASK)

    def base_name(self) -> str:
        """The base that the adapters name, or the run: whichever is on this machine, since both may be paths."""
        if self.path is not None and not self.folders and self.config is None:
            return str(self.path)
        loaded = self.loaded or {name: load_peft(folder) for name, folder in list(self.folders.items())[:1]}
        names = [self.config.model] if self.config is not None else []
        names = [name for name in (*names, *(adapter.base_model for adapter in loaded.values())) if name]
        if not names:
            raise ConfigError(
                f"{self.name}: neither the run nor its adapters say which base model they belong to. Where that is a model that "
                "you made yourself, give it in Python: lorabank.predict(…, model=model), lorabank.evaluate(…, model=model)."
            )
        return next((name for name in names if alias(name) or expanded(name, place="model").exists()), names[0])


def read_source(source: Trained | None, adapters: Sequence[str] | None) -> TrainedSource:
    """Read the adapters of `source`: those among `adapters`, or all. `base` needs no reading; of None there are none.

    Raises AdapterNameError for a name that isn't there, CheckpointError for a run that hasn't ended, AdapterFileError.
    """
    if source is None:
        return _named(TrainedSource(name="the model given"), {}, adapters)
    if isinstance(source, Adapter):
        return _named(TrainedSource(name="the adapter given"), {DEFAULT_ADAPTER: source}, adapters)
    if isinstance(source, Mapping):
        if not source:
            raise ConfigError("expected adapters, got an empty dict. Give some (result.trained), or None for the model alone.")
        for name in source:
            check_adapter_name(name)
        folders = {name: chosen(Path(each)) for name, each in source.items() if not isinstance(each, Adapter)}
        return _named(TrainedSource(name="the adapters given", folders=folders), source, adapters)
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"expected a run's or an adapter's folder, an Adapter, or a dict of names to adapters (result.trained), got "
            f"{type(source).__name__}"
        )
    path = chosen(Path(source))
    config = _config_of(path)
    folders = adapter_folders(path, config)
    found = TrainedSource(name=str(source), path=path, config=config, folders=folders)
    made = _named(found, folders, adapters)
    if config is not None and not folders and adapters is None:
        raise CheckpointError(f"{source}: the run has no adapter yet, since it didn't end. To go on with it: {resume_line(path)}")
    return made


def _named(found: TrainedSource, there: Mapping[str, Adapter | str | Path], adapters: Sequence[str] | None) -> TrainedSource:
    """With the adapters that were asked for."""
    if isinstance(adapters, str):
        raise ConfigError(f"adapters: expected a list of names, got the text {adapters!r}. Write [{adapters!r}].")
    wanted = list(dict.fromkeys(name for name in (there if adapters is None else adapters) if name != BASE_NAME))
    for name in wanted:
        if name not in there:
            raise AdapterNameError(
                f"{found.name}: no adapter {name!r}{closest(name, there)}. It has: {', '.join(there) or 'none'}."
            )
    loaded = {name: _read(there[name]) for name in wanted}
    example = _read(next(iter(there.values()))) if there and not loaded and found.config is None else None
    return replace(found, loaded=loaded, example=example)


def _read(adapter: Adapter | str | Path) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else load_peft(chosen(Path(adapter)))


def run_config_of(source: Trained | None) -> TrainConfig | None:
    """The configuration of the run whose folder `source` is, or that its adapter's folder lies in; None: there is none."""
    return _config_of(chosen(Path(source))) if isinstance(source, str | Path) else None


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
