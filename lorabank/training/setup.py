"""From a TrainConfig and a loaded base to a Trainer: data, bank, jobs, optimizer. What can fail fails here, before any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorabank.bank.attach import attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.storages.quantized import storage_of
from lorabank.config.train import TrainConfig
from lorabank.errors import ConfigError, closest
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.training.data_sets import DataSets, adapter_runs
from lorabank.training.events import AdapterPlan, Listener, Notice, RunPlan
from lorabank.training.held_out import held_out_notice
from lorabank.training.identity import run_identity
from lorabank.training.jobs import AdapterJob, make_job
from lorabank.training.prepared import original_of
from lorabank.training.run_folder import RunFolder, check_folder_name
from lorabank.training.start import add_adapter, warnings_as
from lorabank.training.task import Task
from lorabank.training.trainer import Trainer, fresh_progress
from lorabank.training.validation import Validation


def build_trainer(
    config: TrainConfig,
    model: Any,
    task: Task[Any],
    data: DataSets[Any],
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
            advice=task.learning_rate,
            pack_to=config.data.max_length if config.data.packing else None,
        )
        for name, run in runs.items()
    }
    for name, job in jobs.items():
        check_job(name, job, config)
    held = [held_out_notice(name, job, task.missing_labels(name, job.val)) for name, job in jobs.items()]
    notices = [notice for notice in held if notice is not None]
    for name, job in jobs.items():
        with warnings_as(notices, adapter=name):
            task.check(name, job)
    check_best(task, config)
    bank = attach(model, head=task.head)
    try:
        optimizer = SlotOptimizer(bank)
        original = original_of(config, model)
        for name, job in jobs.items():
            notices += add_adapter(bank, name, job, original, task)
            optimizer.add(name, job.optimizer_config())
        engine = task.engine(bank)
        trainer = Trainer(
            engine=engine,
            task=task,
            jobs=jobs,
            config=config,
            folder=folder,
            listeners=listeners,
            progress=fresh_progress(jobs),
            optimizer=optimizer,
            validation=Validation(engine=engine, task=task, jobs=jobs, config=config.eval),
            identity=run_identity(config, jobs, bank, section=task.section),
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


def check_best(task: Task[Any], config: TrainConfig) -> None:
    """Raise ConfigError where the metric that decides which step is the best isn't one of validation's."""
    known = ["loss", *task.metric_names(config.eval)]
    if config.eval.best not in known:
        raise ConfigError(
            f"eval.best: validation of {task.name} has no metric {config.eval.best!r}{closest(config.eval.best, known)}. "
            f"It has, with eval.metrics {','.join(config.eval.metrics)}: {', '.join(dict.fromkeys(known))}."
        )


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
        task=trainer.task.name,
        unit=trainer.task.unit,
    )


def _dtype_name(bank: AdapterBank) -> str:
    quantized = storage_of(bank.model)
    if quantized is not None:
        return quantized
    dtype = next((p.dtype for p in bank.model.parameters()), torch.float32)
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
