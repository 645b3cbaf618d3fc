"""`AdapterJob`: one adapter's training, resolved: rows, order, number of steps, learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorabank.config.train import AdapterRun
from lorabank.errors import ConfigError, DataError
from lorabank.optim.schedules import learning_rate_factor
from lorabank.optim.slot_optimizer import OptimizerConfig
from lorabank.planner.learning_rate import LearningRateAdvice, advise_learning_rate
from lorabank.training.data_sets import TaskRow
from lorabank.training.streams import RowStream


@dataclass(frozen=True, kw_only=True)
class AdapterJob:
    """What the training loop needs to know of one adapter; nothing in it changes while it trains."""

    name: str
    run: AdapterRun
    stream: RowStream
    val: Sequence[TaskRow]
    data: str
    """Name of its training rows, for people."""
    total_steps: int
    warmup_steps: int
    learning_rate: float
    learning_rate_reason: str
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Of A, for optimizer step `step` (0-based)."""
        return self.learning_rate * learning_rate_factor(self.run.lr_scheduler, step, self.total_steps, self.warmup_steps)

    def epoch(self, position: int) -> float:
        """Passes over the rows after `position` micro-batches."""
        return self.stream.passes(position)

    def optimizer_config(self) -> OptimizerConfig:
        """Its part of the optimizer."""
        betas = tuple(self.run.betas)
        return OptimizerConfig(
            rule=self.run.optimizer,
            betas=(betas[0], betas[1]),
            eps=self.run.eps,
            weight_decay=self.run.weight_decay,
            loraplus_ratio=self.run.loraplus_ratio,
            max_grad_norm=self.run.max_grad_norm,
        )


def make_job(
    name: str,
    run: AdapterRun,
    train: Sequence[TaskRow],
    val: Sequence[TaskRow],
    *,
    data: str,
    seed: int,
    model_config: Mapping[str, object],
    advice: LearningRateAdvice | None = None,
    pack_to: int | None = None,
) -> AdapterJob:
    """Resolve one adapter. `model_config` gives `model_type` and `hidden_size` for the automatic learning rate,
    where `advice` isn't given in their stead.

    `pack_to`: tokens of a packed row; None: a row an example.
    """
    if not train:
        raise DataError(f"adapter {name!r}: no training rows left in {data}")
    seed = seed if run.seed is None else run.seed
    stream = RowStream(train, run.batch_size, seed, pack_to=pack_to)
    micro_batches = stream.micro_batches(run.epochs)
    total = run.max_steps or max(1, math.ceil(micro_batches / run.gradient_accumulation))
    if run.learning_rate == "auto" and run.optimizer != "adamw":
        raise ConfigError(
            f"adapters.{name}.learning_rate: 'auto' follows fits made with AdamW, which say nothing of {run.optimizer}. "
            "Give a number, or use the optimizer adamw."
        )
    if run.learning_rate == "auto":
        hidden = model_config.get("hidden_size")
        width = hidden if isinstance(hidden, int) else None
        advice = advice or advise_learning_rate(str(model_config.get("model_type", "")), width, total)
        rate, reason = advice.value, f"auto: {advice.reason}"
    else:
        rate, reason = float(run.learning_rate), "as given"
    warmup = math.ceil(run.warmup_ratio * total) if run.warmup_steps is None else run.warmup_steps
    return AdapterJob(
        name=name,
        run=run,
        stream=stream,
        val=val,
        data=data,
        total_steps=total,
        warmup_steps=min(warmup, total),
        learning_rate=rate,
        learning_rate_reason=reason,
        seed=seed,
    )
