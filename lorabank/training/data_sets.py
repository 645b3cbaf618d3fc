"""`DataSets`: the rows of every adapter of a run, read once each; `RowObjects`: rows that were given as objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.data.read import Source, check_source

DEFAULT_ADAPTER = "default"
SHARED_DATA = "data"


class TaskRow(Protocol):
    """One example of an adapter, as a task made it. Equal to another of the same content."""

    @property
    def origin(self) -> str:
        """`file:line`, a picture's path, or `row N of …`."""
        ...

    @property
    def size(self) -> int:
        """Its share of the work in the task's unit: tokens, pictures, seconds; at least 1. Batches gather rows of like size."""
        ...

    @property
    def prompt_text(self) -> str:
        """What the model is given, for people."""
        ...

    @property
    def reference(self) -> str:
        """What it should give, for people."""
        ...

    @property
    def content(self) -> object:
        """What training depends on, as a value whose `repr` says all of it: resuming compares it."""
        ...


Row_co = TypeVar("Row_co", bound=TaskRow, covariant=True)


class Report(Protocol):
    """What became of the rows of a data set."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ...

    def lines(self) -> list[str]:
        """A few short sentences, the most important first."""
        ...


class RowSets(Protocol[Row_co]):
    """One data set in splits."""

    @property
    def train(self) -> Sequence[Row_co]: ...
    @property
    def val(self) -> Sequence[Row_co]: ...
    @property
    def test(self) -> Sequence[Row_co]: ...
    @property
    def report(self) -> Report: ...


Row = TypeVar("Row", bound=TaskRow)


@dataclass(frozen=True, kw_only=True)
class RowObjects:
    """Rows given as objects: for all adapters, or by adapter."""

    train: Source | None = None
    val: Source | None = None
    by_adapter: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSets(Generic[Row]):
    """The rows of every adapter; adapters that share their data share the lists."""

    by_adapter: Mapping[str, RowSets[Row]]
    reports: Mapping[str, Mapping[str, Any]]
    """Data set's name to its report."""
    names: Mapping[str, str]
    """Adapter to its data set's name."""


def adapter_runs(config: TrainConfig) -> dict[str, AdapterRun]:
    """The run's adapters; one called `default` when none is named."""
    runs = dict(config.adapters) or {DEFAULT_ADAPTER: config.defaults}
    return {
        name: run if run.early_stopping is not None else replace(run, early_stopping=config.eval.early_stopping)
        for name, run in runs.items()
    }


def read_sets(
    config: TrainConfig, rows: RowObjects | None, prepare: Callable[[str, Source | None, Source | None], RowSets[Row]]
) -> DataSets[Row]:
    """Every data set of the run, read once each by `prepare` (the first adapter's name, training rows, validation rows).

    A source is None where `config.data` says what it is. `rows`: objects in place of `config.data`'s files.
    """
    rows = rows or RowObjects()
    prepared: dict[tuple[object, object], RowSets[Row]] = {}
    by_adapter: dict[str, RowSets[Row]] = {}
    names: dict[str, str] = {}
    for name, run in adapter_runs(config).items():
        own = name in rows.by_adapter
        key = (name, run.val_data) if own else (run.data, run.val_data)
        if key not in prepared:
            for setting, source in (("data", None if own else run.data), ("val_data", run.val_data)):
                if source is not None:
                    check_source(source, place=f"adapters.{name}.{setting}")
            train = rows.by_adapter[name] if own else rows.train if run.data is None else run.data
            val = run.val_data if run.val_data is not None else rows.val
            prepared[key] = prepare(name, train, val)
        by_adapter[name] = prepared[key]
        names[name] = name if own else run.data or config.data.train or SHARED_DATA
        if any(names[other] == names[name] and by_adapter[other] is not prepared[key] for other in by_adapter):
            names[name] += f" (validated on {Path(run.val_data or 'others').name})"  # the same rows, held against others
    reports = {names[name]: part.report.to_dict() for name, part in by_adapter.items()}
    return DataSets(by_adapter, reports, names)
