"""From a TrainConfig and a loaded base to a Trainer: data, bank, jobs, optimizer. What can fail fails here, before any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.storages.quantized import storage_of
from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.data.prepare import PreparedData, Progress, prepare
from lorabank.data.read import Source, check_source
from lorabank.engine.step import Engine
from lorabank.errors import ConfigError, DataError
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.training.evaluate import unique_prompts
from lorabank.training.events import AdapterPlan, Listener, Notice, RunPlan
from lorabank.training.identity import run_identity
from lorabank.training.jobs import AdapterJob, make_job
from lorabank.training.prepared import original_of
from lorabank.training.run_folder import RunFolder, check_folder_name
from lorabank.training.scorers import split_metrics
from lorabank.training.start import add_adapter
from lorabank.training.trainer import Trainer, fresh_progress
from lorabank.training.validation import Validation

DEFAULT_ADAPTER = "default"
SHARED_DATA = "data"


@dataclass(frozen=True, kw_only=True)
class RowObjects:
    """Rows given as objects: for all adapters, or by adapter."""

    train: Source | None = None
    val: Source | None = None
    by_adapter: Mapping[str, Source] = field(default_factory=dict)


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
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, rows: RowObjects | None = None, progress: Progress | None = None
) -> DataSets:
    """Read and tokenise every data set of the run once. `rows`: objects in place of `config.data`'s files."""
    rows = rows or RowObjects()
    prepared: dict[tuple[object, object], PreparedData] = {}
    by_adapter: dict[str, PreparedData] = {}
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
            prepared[key] = prepare(config.data, tokenizer, seed=config.seed, train=train, val=val, progress=progress)
        by_adapter[name] = prepared[key]
        names[name] = name if own else run.data or config.data.train or SHARED_DATA
        if any(names[other] == names[name] and by_adapter[other] is not prepared[key] for other in by_adapter):
            names[name] += f" (validated on {Path(run.val_data or 'others').name})"  # the same rows, held against others
    reports = {names[name]: part.report.to_dict() for name, part in by_adapter.items()}
    return DataSets(by_adapter, reports, names)


def build_trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSets,
    *,
    listeners: Sequence[Listener],
    folder: RunFolder | None = None,
) -> tuple[Trainer, list[Notice]]:
    """Attach a bank, add every adapter, resolve every job; on an error the model is as it was.

    Returns the trainer and what the user should know of choices made. Raises ConfigError, DataError and what `bank.add` raises.
    """
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
            pack_to=config.data.max_length if config.data.packing else None,
        )
        for name, run in runs.items()
    }
    for name, job in jobs.items():
        check_job(name, job, config)
    notices = _unvalidated(jobs)
    bank = attach(model)
    try:
        optimizer = SlotOptimizer(bank)
        original = original_of(config, model)
        for name, job in jobs.items():
            notices += add_adapter(bank, name, job, original)
            optimizer.add(name, job.optimizer_config())
        engine = Engine(
            bank, gradient_checkpointing=config.gradient_checkpointing, activation_offloading=config.activation_offloading
        )
        trainer = Trainer(
            engine=engine,
            tokenizer=tokenizer,
            jobs=jobs,
            config=config,
            folder=folder,
            listeners=listeners,
            progress=fresh_progress(jobs),
            optimizer=optimizer,
            validation=Validation(engine=engine, jobs=jobs, config=config.eval),
            identity=run_identity(config, jobs, bank),
        )
    except BaseException:
        bank.detach()
        raise
    return trainer, notices


def check_job(name: str, job: AdapterJob, config: TrainConfig) -> None:
    """Raise for what could only fail after the training, or in silence: settings that need rows which aren't there."""
    check_folder_name(name)
    stops = job.run.early_stopping is not None
    if stops and not job.val:
        raise ConfigError(
            f"adapters.{name}.early_stopping: needs validation rows, and {job.data} has none held out. "
            "Set data.val or data.val_split, or leave early_stopping out."
        )
    if stops and not config.eval.every:
        raise ConfigError(f"adapters.{name}.early_stopping: needs evaluations during training. Set eval.every above 0.")
    _, scorers = split_metrics(config.eval.metrics)
    if scorers and job.val and not unique_prompts(job.val):
        raise DataError(
            f"eval.metrics: {', '.join(scorers)} compare generated answers, and no validation row of {job.data} has a prompt and "
            "an answer. Use the metrics loss and perplexity."
        )


def _unvalidated(jobs: Mapping[str, AdapterJob]) -> list[Notice]:
    text = "no validation rows: the last step is kept, since the best can't be known. data.val_split holds rows out."
    return [Notice(text=text, adapter=name, level="warning") for name, job in jobs.items() if not job.val]


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
                packed_rows=None if job.stream.pack_to is None else job.stream.packed_rows(),
            )
            for name, job in trainer.jobs.items()
        ],
        resumed_from=resumed_from,
    )


def _dtype_name(bank: AdapterBank) -> str:
    quantized = storage_of(bank.model)
    if quantized is not None:
        return quantized
    dtype = next((p.dtype for p in bank.model.parameters()), torch.float32)
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
