"""Experiment trackers as listeners, through the libraries that they come with. `TRACKERS` is the table."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from lorabank.errors import ConfigError, LorabankError, MissingExtraError, closest
from lorabank.training.events import EvalRecord, Listener, Notice, RunPlan, RunResult, StepRecord
from lorabank.training.metrics_file import MetricsFile, cut_back

__all__ = ["TRACKERS", "MetricsFile", "Tracker", "cut_back", "make_trackers"]

STEP_KEYS = ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second")


class Sink(Protocol):
    """What a library must take: scalars at a forward pass, a text, an end."""

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None: ...
    def text(self, text: str, pass_index: int) -> None: ...
    def end(self, interrupted: bool) -> None: ...


class Tracker:
    """A `Listener` that names scalars `train/loss/ADAPTER` and `eval/bleu/ADAPTER` and hands them to a sink.

    A sink that fails during the run (a server that went away) is warned about once and gets nothing more: training goes on.
    """

    def __init__(self, sink: Sink, name: str = "tracker") -> None:
        self.sink = sink
        self.name = name
        self.failed = False
        self._pass = 0

    def _send(self, call: Callable[..., None], *values: object) -> None:
        if self.failed:
            return
        try:
            call(*values)
        except Exception as error:  # noqa: BLE001  (whatever another library raises must not end the training)
            self.failed = True
            warnings.warn(f"{self.name}: {error!r}. It gets no more of this run; metrics.jsonl has everything.", stacklevel=2)

    def on_start(self, plan: RunPlan) -> None:
        """The configuration was handed over when the sink was made."""

    def on_step(self, record: StepRecord) -> None:
        """The scalars of `STEP_KEYS`."""
        self._pass = record.pass_index
        self._send(
            self.sink.scalars, {f"train/{key}/{record.adapter}": float(getattr(record, key)) for key in STEP_KEYS}, self._pass
        )

    def on_eval(self, record: EvalRecord) -> None:
        """Every metric."""
        self._pass = record.pass_index
        who = re.sub(r" \((.*)'s rows\)$", r" on \1", record.adapter)  # MLflow takes no brackets in a name
        self._send(self.sink.scalars, {f"eval/{key}/{who}": float(value) for key, value in record.metrics.items()}, self._pass)

    def on_notice(self, notice: Notice) -> None:
        """Warnings as text."""
        if notice.level == "warning":
            self._send(self.sink.text, f"{notice.adapter}: {notice.text}" if notice.adapter else notice.text, self._pass)

    def on_busy(self, activity: str, done: int, total: int) -> None:
        """Progress isn't tracked."""

    def on_end(self, result: RunResult) -> None:
        """Close the run at the library."""
        self._send(self.sink.end, result.interrupted)


class TensorBoardSink:
    """Event files in `RUN/tensorboard`, for `tensorboard --logdir RUN`."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        _library("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _flat(config).items()))

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, pass_index)

    def text(self, text: str, pass_index: int) -> None:
        self._writer.add_text("warnings", text, pass_index)

    def end(self, interrupted: bool) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases, named like the run folder."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        wandb = _library("wandb", "wandb")
        run_folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(run_folder), name=run_folder.name, config=dict(config))

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None:
        # several adapters log at one pass, so the pass is an axis of its own instead of the library's step
        self._run.log({**values, "pass": pass_index})

    def text(self, text: str, pass_index: int) -> None:
        self._run.alert(title="lorabank", text=text)

    def end(self, interrupted: bool) -> None:
        self._run.finish(exit_code=1 if interrupted else 0)


class TrackioSink:
    """A run in the trackio project `lorabank`, named like the run folder."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        trackio = _library("trackio", "trackio")
        self._run = trackio.init(project="lorabank", name=run_folder.name, config=dict(config))
        self._trackio = trackio

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None:
        self._trackio.log({**values, "pass": pass_index})

    def text(self, text: str, pass_index: int) -> None:
        self._trackio.log({"warning": text, "pass": pass_index})

    def end(self, interrupted: bool) -> None:
        self._trackio.finish()


class MlflowSink:
    """A run of MLflow at its configured tracking address."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = _library("mlflow", "mlflow")
        self._mlflow.start_run(run_name=run_folder.name)
        # MLflow takes parameters of at most 6,000 characters
        self._mlflow.log_params({key: str(value)[:6000] for key, value in _flat(config).items()})

    def scalars(self, values: Mapping[str, float], pass_index: int) -> None:
        self._mlflow.log_metrics(dict(values), step=pass_index)

    def text(self, text: str, pass_index: int) -> None:
        self._mlflow.set_tag(f"warning.{pass_index}", text)

    def end(self, interrupted: bool) -> None:
        self._mlflow.end_run("KILLED" if interrupted else "FINISHED")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
    "mlflow": MlflowSink,
}
"""Name to a sink's constructor: run folder, and the configuration as plain data."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown name, MissingExtraError with the pip line for a library that isn't there."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"report_to: expected one of {', '.join(TRACKERS)}, got {name!r}{closest(name, TRACKERS)}")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"report_to: {name} is not installed. Install it with: pip install {name}")


def make_trackers(names: Sequence[str], run_folder: str | Path, config: Mapping[str, Any]) -> list[Listener]:
    """A listener for each name. Raises ConfigError for an unknown name, MissingExtraError with the pip line."""
    listeners: list[Listener] = []
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"report_to: expected one of {', '.join(TRACKERS)}, got {name!r}{closest(name, TRACKERS)}")
        try:
            listeners.append(Tracker(TRACKERS[name](Path(run_folder), config), name))
        except LorabankError:
            raise
        except Exception as error:  # each library has its own errors for a missing login or server
            raise ConfigError(
                f"report_to: {name} couldn't be started ({type(error).__name__}: {error}). Leave it out, or set it up."
            ) from error
    return listeners


def _library(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"report_to: {name} is not installed ({error}). Install it with: pip install {package}"
        ) from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"train": x}}` as `{"data.train": x}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
