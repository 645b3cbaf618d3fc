"""What a configuration reads from this machine, by absolute paths: a run folder is used from other working folders too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lorabank.config.train import AdapterRun, TrainConfig


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same configuration with every data file, model and adapter folder that exists here named by its absolute path.

    Hub ids and names of what isn't here stay as they are, `output` too.
    """
    data = config.data
    return replace(
        config,
        model=_absolute(config.model) or "",
        data=replace(data, train=_absolute(data.train), val=_absolute(data.val), test=_absolute(data.test)),
        defaults=_adapter(config.defaults),
        adapters={name: _adapter(run) for name, run in config.adapters.items()},
    )


def _adapter(run: AdapterRun) -> AdapterRun:
    return replace(run, data=_absolute(run.data), val_data=_absolute(run.val_data), init_from=_absolute(run.init_from))


def _absolute(name: str | None) -> str | None:
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return name
    return os.path.abspath(path)  # noqa: PTH100  (a link stays a link: what it points to may lack the suffix)
