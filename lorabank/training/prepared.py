"""Starts that a run prepares for its adapters: from its own rows (`init: eva`), from the unquantised model (`init: loftq`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.bank.starts.eva import IGNORED_LABEL, eva
from lorabank.bank.starts.loftq import loftq
from lorabank.config.adapter import AdapterConfig
from lorabank.config.train import TrainConfig
from lorabank.engine.batch import Batch
from lorabank.errors import ConfigError, DataError
from lorabank.models.load import load_base
from lorabank.training.jobs import AdapterJob
from lorabank.training.task import Task

EVA_TOKENS = 4096
"""Trained tokens after which EVA's components are taken to have settled; rows are fewer than that in small data sets."""
Original = Callable[[str], nn.Module]
"""An adapter's name, for messages → the model before quantisation."""


def prepared(bank: AdapterBank, name: str, job: AdapterJob, original: Original, task: Task[Any]) -> AdapterConfig | AdapterStart:
    """What `bank.add` takes for a job's adapter. Equal jobs give equal starts, so a resumed run has the same ranks."""
    wanted = job.run.adapter_config()
    if wanted.init == "eva":
        try:
            return eva(bank, _batches(job, task), wanted)
        except DataError as error:
            raise DataError(f"adapters.{name}.init: {error}") from error
    if wanted.init == "loftq":
        return loftq(bank, original(name), wanted, seed=job.seed)
    return wanted


def original_of(config: TrainConfig, model: Any) -> Original:
    """How a run's model is had before quantisation: once, and only where an adapter asks for it."""

    @cache
    def load() -> nn.Module:
        return load_base(config.model, dtype="bf16", device="cpu", trust_remote_code=config.trust_remote_code).model

    def original(name: str) -> nn.Module:
        if not config.model:
            raise ConfigError(
                f"adapters.{name}.init: 'loftq' needs the model as it was before quantisation, and the run was given an object "
                f"({type(model).__name__}). Give model its folder or hub id."
            )
        return load()

    return original


def _batches(job: AdapterJob, task: Task[Any]) -> Iterator[dict[str, Tensor]]:
    """The first micro-batches of the adapter's training, until they have enough tokens or each row has come once."""
    tokens = 0
    for position in range(job.stream.micro_batches(1.0)):
        chosen = job.stream.batch(position)
        numbers = list(range(len(chosen)))
        batch = task.batch(
            [[job.stream.rows[i]] for i in chosen], [BASE] * len(chosen), examples=numbers, draws=[0] * len(chosen)
        )
        if not isinstance(batch, Batch):
            yield dict(batch.inputs)
            tokens += sum(batch.sizes)
            if tokens >= EVA_TOKENS:
                return
            continue
        labels = batch.input_ids_NL.masked_fill(batch.weights_NL == 0, IGNORED_LABEL)
        yield {"input_ids": batch.input_ids_NL, "attention_mask": batch.attention_mask_NL, "labels": labels}
        tokens += int((batch.weights_NL != 0).sum())
        if tokens >= EVA_TOKENS:
            return
