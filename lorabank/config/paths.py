"""What a configuration reads from this machine, by absolute paths: a run folder is used from other working folders too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.errors import ConfigError, LorabankError, Setting


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same configuration with every data file, model and adapter folder that exists here named by its absolute path.

    Hub ids and names of what isn't here stay as they are; of `output` only `~` is replaced. Raises ConfigError for a name that
    no file can have.
    """
    data = config.data
    return replace(
        config,
        model=_absolute(config.model, "model") or "",
        data=replace(
            data,
            train=_absolute(data.train, "data.train"),
            val=_absolute(data.val, "data.val"),
            test=_absolute(data.test, "data.test"),
        ),
        synthesis=replace(config.synthesis, vocoder=_absolute(config.synthesis.vocoder, "synthesis.vocoder")),
        detection=replace(config.detection, images=_absolute(config.detection.images, "detection.images")),
        defaults=_adapter(config.defaults, "defaults"),
        adapters={name: _adapter(run, f"adapters.{name}") for name, run in config.adapters.items()},
        output=_from_home(config.output),
    )


def expanded(name: str | Path, *, place: str, kind: type[LorabankError] = ConfigError) -> Path:
    """The path with `~` replaced by the home folder. Raises `kind`, in the name of `place`, for a name that no file can have."""
    try:
        path = Path(name).expanduser()
        path.exists()  # raises where the name is too long, or a folder on the way may not be entered
    except (RuntimeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = str(name) if len(str(name)) <= _SHOWN else f"{str(name)[:_SHOWN]}…"
        raise kind(Setting(place), f": {shown!r} can't be a path here ({reason}). Check the name.") from error
    return path


_SHOWN = 60
"""Characters of a name that a message repeats."""


def _from_home(output: str) -> str:
    path = expanded(output, place="output")
    return str(path) if output.startswith("~") else output


def _adapter(run: AdapterRun, place: str) -> AdapterRun:
    return replace(
        run,
        data=_absolute(run.data, f"{place}.data"),
        val_data=_absolute(run.val_data, f"{place}.val_data"),
        init_from=_absolute(run.init_from, f"{place}.init_from"),
    )


def _absolute(name: str | None, place: str) -> str | None:
    path = expanded(name, place=place) if name else None
    if path is None or not path.exists():
        return name
    return os.path.abspath(path)  # noqa: PTH100  (a link stays a link: what it points to may lack the suffix)
