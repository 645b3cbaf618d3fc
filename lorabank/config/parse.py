"""A run's configuration from YAML, a dict or flags to a `TrainConfig`, and back to a file that reloads to an equal value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorabank.config.checks import check_adapter_name
from lorabank.config.coerce import coerce, field_types
from lorabank.config.convert import OptimizerSteps
from lorabank.config.older_runs import brought_up_to_date
from lorabank.config.tasks import TASK_DEFAULTS, TASK_SECTIONS
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, SaveConfig, TrainConfig
from lorabank.config.translate import NESTED, Settings, translate
from lorabank.errors import ConfigError, Setting, closest
from lorabank.wording import counted

FOREIGN_RANKS = {"network_dim": ("kohya", 1), "r": ("PEFT", 8), "lora_r": ("PEFT", 8)}
"""Keys for a rank whose tool has another default for alpha than ours."""


def load_config(path: str | Path) -> tuple[TrainConfig, list[str]]:
    """Read a run's file (YAML, JSON or TOML). Returns the configuration and notes on what was translated.

    Raises ConfigError with the place of what is wrong, such as `adapters.formal.rnak`.
    """
    return config_from_dict(read_tree(path))


def config_from_dict(tree: Mapping[Any, object]) -> tuple[TrainConfig, list[str]]:
    """A configuration from nested mappings of the file's form; see `load_config`."""
    return build(translate(tree))


def read_tree(path: str | Path) -> Mapping[Any, object]:
    """The raw tree of a configuration file; a run folder stands for the `config.yaml` in it."""
    file = Path(path)
    if file.is_dir():
        if not (file / "config.yaml").is_file():
            raise ConfigError(f"{file}: expected a configuration file, got a folder without config.yaml")
        file /= "config.yaml"
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such configuration file{closest(file.name, beside)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read as text ({error})") from None
    tree = _read_toml(text, file) if file.suffix == ".toml" else _read_yaml(text, file)
    if tree is None:
        raise ConfigError(f"{file}: is empty. Expected settings such as `model: Qwen/Qwen3-0.6B`")
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{file}: expected settings (`key: value`), got {type(tree).__name__}")
    return brought_up_to_date(tree) if Path(path).is_dir() else tree


def _read_toml(text: str, file: Path) -> object:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _read_yaml(text: str, file: Path) -> object:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice: YAML keeps the last in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                    raise ConfigError(f"{file}, line {key.start_mark.line + 1}: {key.value!r} is set twice. Keep one of them.")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f", line {mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise ConfigError(f"{file}{where}: not valid YAML: {problem}") from None


def build(settings: Settings) -> tuple[TrainConfig, list[str]]:
    """Typed values from sorted settings. Raises ConfigError at the place of a wrong type or range."""
    notes = list(settings.notes)
    notes += _alpha_notes(settings)
    defaults_raw = _join_betas(settings.values["adapter"])
    usual = TASK_DEFAULTS.get(str(settings.values["run"].get("task")))
    defaults_raw = {**(usual(settings.values) if usual is not None else {}), **defaults_raw}
    stopping = settings.values["eval"].get("early_stopping")
    if stopping is not None:
        defaults_raw.setdefault("early_stopping", stopping)
    defaults = _adapter(defaults_raw, "defaults.")
    adapters = {}
    for name, own in settings.adapters.items():
        check_adapter_name(name)
        adapters[name] = _adapter(defaults_raw | _join_betas(own), f"adapters.{name}.")
    accumulations = {name: run.gradient_accumulation for name, run in (adapters or {"default": defaults}).items()}
    eval_raw = _passes(settings.values["eval"], "eval.", accumulations, notes)
    save_raw = _passes(settings.values["save"], "save.", accumulations, notes)
    run = _typed(TrainConfig, settings.values["run"], "", skip=NESTED)
    config = TrainConfig(
        **run,
        data=DataConfig(**_typed(DataConfig, settings.values["data"], "data.")),
        defaults=defaults,
        adapters=adapters,
        eval=EvalConfig(**_typed(EvalConfig, eval_raw, "eval.")),
        save=SaveConfig(**_typed(SaveConfig, save_raw, "save.")),
        **{name: kind(**_typed(kind, settings.values[name], f"{name}.")) for name, kind in TASK_SECTIONS.items()},
    )
    return config, notes


def _typed(kind: type, raw: Mapping[str, object], place: str, skip: Sequence[str] = ()) -> dict[str, Any]:
    types = field_types(kind)
    return {name: coerce(value, types[name], place + name) for name, value in raw.items() if name not in skip}


def _adapter(raw: Mapping[str, object], place: str) -> AdapterRun:
    typed = _typed(AdapterRun, raw, place)
    try:
        return AdapterRun(**typed)
    except ConfigError as error:  # the dataclass knows its field, not whose it is
        raise error.under(place) from None


def _join_betas(raw: Mapping[str, object]) -> dict[str, object]:
    """transformers gives AdamW's two betas apart."""
    joined = dict(raw)
    if "beta1" in raw or "beta2" in raw:
        if "betas" in raw:
            raise ConfigError("betas and adam_beta1/adam_beta2 both set betas. Keep one of them.")
        joined["betas"] = [joined.pop("beta1", 0.9), joined.pop("beta2", 0.999)]
    return joined


def _passes(raw: Mapping[str, object], place: str, accumulations: Mapping[str, int], notes: list[str]) -> dict[str, object]:
    """Optimizer steps as forward passes: a step takes as many passes as micro-batches are accumulated."""
    every = raw.get("every")
    if not isinstance(every, OptimizerSteps):
        return dict(raw)
    counts = set(accumulations.values())
    if len(counts) > 1:
        raise ConfigError(
            Setting(f"{place}every"),
            f": in optimizer steps, and they differ between adapters: gradient_accumulation {dict(accumulations)}. "
            f"Use `{place}every`, which counts forward passes.",
        )
    passes = every.steps * counts.pop()
    notes.append(
        f"{place}every: {counted(every.steps, 'optimizer step')}, which is {counted(passes, 'forward pass', 'forward passes')}"
    )
    return {**raw, "every": passes}


def _alpha_notes(settings: Settings) -> Iterable[str]:
    """A rank in another tool's words without its alpha: that tool would have used another default."""
    for place, key in settings.foreign_ranks.items():
        own = settings.adapters.get(place.removeprefix("--").removeprefix("adapters.").rstrip("."), {})
        if key in FOREIGN_RANKS and "alpha" not in own and "alpha" not in settings.values["adapter"]:
            tool, alpha = FOREIGN_RANKS[key]
            yield f"{place}{key} without an alpha: {tool} would use {alpha}, lorabank uses 32. Set alpha to choose."


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested data of a configuration: every setting of the run and of `defaults`, and what each adapter has otherwise.

    `config_from_dict(to_dict(config))` is equal to `config`.
    """
    tree: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name == "adapters":
            tree["adapters"] = {name: _difference(run, config.defaults) for name, run in value.items()}
        elif dataclasses.is_dataclass(value):
            tree[item.name] = {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
        else:
            tree[item.name] = _plain(value)
    return tree


def dump_yaml(config: TrainConfig) -> str:
    """The text of a run's `config.yaml`."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def _difference(run: AdapterRun, defaults: AdapterRun) -> dict[str, Any]:
    return {
        item.name: _plain(getattr(run, item.name))
        for item in fields(run)
        if getattr(run, item.name) != getattr(defaults, item.name)
    }


def _plain(value: object) -> Any:
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value]
