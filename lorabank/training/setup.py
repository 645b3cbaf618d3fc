"""From a TrainConfig and a loaded base to a Trainer: data, bank, jobs, optimizer. What can fail fails here, before any step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.config.parse import to_dict
from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.data.prepare import PreparedData, Progress, prepare
from lorabank.data.read import Source
from lorabank.data.render import TokenRow
from lorabank.engine.step import Engine
from lorabank.formats.adapter import Adapter
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.training.events import AdapterPlan, Listener, RunPlan
from lorabank.training.jobs import AdapterJob, make_job
from lorabank.training.run_folder import RunFolder
from lorabank.training.scorers import split_metrics
from lorabank.training.trainer import Trainer, fresh_progress

DEFAULT_ADAPTER = "default"
SHARED_DATA = "data"


@dataclass(frozen=True)
class DataSets:
    """The rows of every adapter; adapters that share their data share the lists."""

    by_adapter: Mapping[str, PreparedData]
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


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, rows: Source | None = None, progress: Progress | None = None
) -> DataSets:
    """Read and tokenise every data set of the run once. `rows`: an object in place of `config.data.train`."""
    prepared: dict[tuple[object, object], PreparedData] = {}
    by_adapter: dict[str, PreparedData] = {}
    names: dict[str, str] = {}
    reports: dict[str, Mapping[str, Any]] = {}
    for name, run in adapter_runs(config).items():
        key = (run.data, run.val_data)
        if key not in prepared:
            own = config.data if run.data is None else replace(config.data, val=run.val_data)
            prepared[key] = prepare(
                own,
                tokenizer,
                seed=config.seed,
                train=rows if run.data is None else run.data,
                val=run.val_data,
                progress=progress,
            )
        by_adapter[name] = prepared[key]
        names[name] = run.data or config.data.train or SHARED_DATA
        reports[names[name]] = prepared[key].report.to_dict()
    return DataSets(by_adapter, reports, names)


def build_trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSets,
    *,
    folder: RunFolder | None,
    listeners: Sequence[Listener],
) -> Trainer:
    """Attach a bank, add every adapter, resolve every job."""
    split_metrics(config.eval.metrics)  # a misspelt metric must not cost a finished training
    runs = adapter_runs(config)
    model_config = getattr(model, "config", None)
    known = {key: getattr(model_config, key, None) for key in ("model_type", "hidden_size")}
    jobs = {
        name: make_job(
            name,
            run,
            data.by_adapter[name].train,
            data.by_adapter[name].val,
            data=data.names[name],
            seed=config.seed,
            model_config=known,
        )
        for name, run in runs.items()
    }
    bank = attach(model)
    optimizer = SlotOptimizer(bank)
    for name, job in jobs.items():
        add_adapter(bank, name, job)
        optimizer.add(name, job.optimizer_config())
    return Trainer(
        engine=Engine(bank, gradient_checkpointing=config.gradient_checkpointing),
        tokenizer=tokenizer,
        jobs=jobs,
        config=config,
        folder=folder,
        listeners=listeners,
        progress=fresh_progress(jobs),
        optimizer=optimizer,
        best={},
        identity=run_identity(config, jobs),
    )


def add_adapter(bank: AdapterBank, name: str, job: AdapterJob) -> None:
    """A new adapter, or one that starts from another's weights (`init_from`)."""
    if job.run.init_from is None:
        bank.add(name, job.run.adapter_config(), seed=job.seed)
        return
    start = Adapter.load(job.run.init_from)
    bank.load(name, replace(start, config=replace(start.config, dropout=job.run.dropout)), seed=job.seed)


def run_identity(config: TrainConfig, jobs: Mapping[str, AdapterJob]) -> dict[str, object]:
    """What a resumed run must have in common with its checkpoint: the settings that change results, and the rows."""
    settings = to_dict(config)
    free = ("output", "eval", "save", "report_to", "device", "threads")
    found: dict[str, object] = {key: repr(value) for key, value in settings.items() if key not in free}
    found |= {f"rows of {name}": _checksum(job.stream.rows) for name, job in jobs.items()}
    return found


def _checksum(rows: Sequence[TokenRow]) -> int:
    total = 0
    for row in rows:
        total = zlib.crc32(repr((row.input_ids, row.weights)).encode(), total)
    return total


def run_plan(trainer: Trainer, *, model_name: str, resumed_from: str | None) -> RunPlan:
    """The run in numbers, for whoever listens."""
    summary = trainer.bank.summary()
    return RunPlan(
        model=model_name,
        output=str(trainer.folder.path) if trainer.folder else "",
        device=str(trainer.bank.device),
        base_dtype=_dtype_name(trainer.bank),
        base_parameters=summary.base_parameters,
        adapters=[
            AdapterPlan(
                name=name,
                rank=summary.adapters[name].rank,
                parameters=summary.adapters[name].parameters,
                layers=summary.adapters[name].layers,
                total_steps=job.total_steps,
                learning_rate=job.learning_rate,
                learning_rate_reason=job.learning_rate_reason,
                train_rows=len(job.stream.rows),
                val_rows=len(job.val),
            )
            for name, job in trainer.jobs.items()
        ],
        resumed_from=resumed_from,
    )


def _dtype_name(bank: AdapterBank) -> str:
    dtype = next((p.dtype for p in bank.model.parameters()), torch.float32)
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
