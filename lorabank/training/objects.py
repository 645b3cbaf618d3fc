"""`lorabank.train` from objects: keywords, adapter values and row objects as a TrainConfig and `RowObjects`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lorabank.bank.configs import as_adapter_config
from lorabank.config.adapter import AdapterConfig
from lorabank.config.parse import config_from_dict, load_config
from lorabank.config.train import AdapterRun, DataConfig, TrainConfig
from lorabank.errors import AdapterNameError, ConfigError, DataError, closest
from lorabank.training.data_sets import DEFAULT_ADAPTER, RowObjects, adapter_runs

VAL_SPLITS = ("validation", "val", "valid", "dev", "eval")


def resolve_config(
    config: TrainConfig | str | Path | None, adapters: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[TrainConfig, list[str]]:
    """One TrainConfig from a value, a file, or keywords; and notes on what was translated."""
    if config is not None and (settings or adapters):
        raise ConfigError(
            "train: give a configuration, or settings as keywords, not both. dataclasses.replace(config, …) changes one."
        )
    if isinstance(config, str | Path):
        return load_config(config)
    if config is not None:
        if not isinstance(config, TrainConfig):
            raise ConfigError(f"train: expected a TrainConfig or the path of a configuration file, got {type(config).__name__}")
        return config, []
    tree: dict[str, Any] = {key: _plain(value) for key, value in settings.items()}
    if adapters is not None:
        if not isinstance(adapters, Mapping) or not adapters:
            raise ConfigError(f"adapters: expected a dict of name to settings, got {adapters!r}")
        tree["adapters"] = {name: adapter_settings(value) for name, value in adapters.items()}
    return config_from_dict(tree)


def adapter_settings(value: Any) -> dict[str, Any]:
    """The settings of an AdapterRun, an AdapterConfig, a `peft.LoraConfig` or a dict.

    Of a value only what differs from its defaults counts, so that the run's own settings fill in the rest.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, AdapterRun):
        value = as_adapter_config(value)
    plain = AdapterRun() if isinstance(value, AdapterRun) else AdapterConfig()
    return {
        item.name: getattr(value, item.name) for item in fields(value) if getattr(value, item.name) != getattr(plain, item.name)
    }


def _plain(value: Any) -> Any:
    """A config value such as `EvalConfig(...)` among the keywords, as the dict that a file would hold."""
    if isinstance(value, AdapterRun | AdapterConfig):
        return adapter_settings(value)
    return asdict(value) if type(value).__module__ == TrainConfig.__module__ else value


def data_section(data: Any, adapters: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """`data` as the section `data` of a configuration (a DataConfig, or a dict of its fields); None where it is rows."""
    if isinstance(data, DataConfig):
        return asdict(data)
    if not isinstance(data, Mapping) or not data or any(name in (adapters or {}) for name in data):
        return None
    return data if all(value is None or isinstance(value, str | int | float) for value in data.values()) else None


def resolve_rows(data: Any, config: TrainConfig) -> tuple[RowObjects, TrainConfig]:
    """Who trains on which rows, and the configuration (which takes a path in).

    `data` is rows (a `datasets.Dataset`, a list of dicts), a path or data set id, a mapping of splits (`train`, `validation`),
    or a mapping of adapter names to rows.
    """
    if data is None:
        return RowObjects(), config
    if isinstance(data, str | Path):
        return RowObjects(), replace(config, data=replace(config.data, train=str(data)))
    if not isinstance(data, Mapping):
        return RowObjects(train=data), config
    names, runs = [str(name) for name in data], adapter_runs(config)
    if "train" in data:
        val = next((data[name] for name in VAL_SPLITS if name in data), None)
        return RowObjects(train=data["train"], val=val), config
    if any(name in runs for name in names):
        unknown = next((name for name in names if name not in runs), None)
        if unknown is not None:
            raise AdapterNameError(f"data: no adapter {unknown!r}{closest(unknown, runs)}. There are: {', '.join(runs)}.")
        return RowObjects(by_adapter=dict(data)), config
    raise DataError(
        f"data: expected rows, splits with 'train' among them, or adapter names ({', '.join(runs)}) to rows; "
        f"got a mapping with the keys {', '.join(names[:5]) or '(none)'}"
    )


def check_complete(config: TrainConfig, rows: RowObjects, *, has_model: bool) -> None:
    """Raise ConfigError where the model or an adapter's rows are missing."""
    if not config.model and not has_model:
        raise ConfigError("model: missing. Give a hub id, a folder, or a model object with its tokenizer.")
    if rows.train is not None or config.data.train is not None:
        return
    for name, run in adapter_runs(config).items():
        if run.data is None and name not in rows.by_adapter:
            whose = "" if name == DEFAULT_ADAPTER else f" adapter {name!r} has none."
            raise ConfigError(f"data: missing.{whose} Give data (rows or a path), or a data file for each adapter.")
