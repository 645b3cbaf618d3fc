"""`Validation`: when held-out rows are scored during training, and what follows: the best step, early stopping, a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorabank.config.train import EvalConfig
from lorabank.engine.step import Engine
from lorabank.training.base_rows import base_rows, is_base
from lorabank.training.data_sets import TaskRow
from lorabank.training.evaluate import spread
from lorabank.training.events import EvalRecord, Notice
from lorabank.training.jobs import AdapterJob
from lorabank.training.progress import FINISHED, RUNNING, STOPPED_EARLY, AdapterProgress, RunProgress
from lorabank.training.tables import lower_is_better
from lorabank.training.task import Busy, Task

TURN_SHARE = 1.05
"""Validation loss this far above its best is called turning."""


@dataclass(kw_only=True)
class Validation:
    """The held-out rows of a run, and each adapter's best values on them."""

    engine: Engine
    task: Task[Any]
    jobs: Mapping[str, AdapterJob]
    config: EvalConfig
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Adapter to its leaves' values at its best step, by `config.best`."""

    def due(self, progress: RunProgress) -> list[str]:
        """Who is scored now: the base before the first pass, adapters every so many passes and once they have ended.

        An adapter that ends has no say in when the others are scored: that would make them depend on each other.
        """
        now, every = progress.pass_index, self.config.every
        if now == 0:
            starts = [name for name, job in self.jobs.items() if job.run.init_from is not None and job.val]
            scored = progress.base_metrics or any("step" in p.last_metrics for p in progress.adapters.values())
            return [] if scored else [*self.base_rows(), *starts]
        wanted = (RUNNING, FINISHED) if every and now % every == 0 else (FINISHED,)
        adapters = progress.adapters.items()
        return [
            name for name, p in adapters if p.status in wanted and self.jobs[name].val and p.last_metrics.get("step") != p.step
        ]

    def run(self, progress: RunProgress, busy: Busy) -> list[EvalRecord | Notice]:
        """Score whoever is due and note it in `progress`, all or, when `busy` raises, none. Returns what to tell."""
        names = self.due(progress)
        if not names:
            return []
        base = self.base_rows()
        rows = {name: base[name] if is_base(name) else self.val_rows(name) for name in names}
        found = self.task.validate(self.engine, rows, config=self.config, busy=busy)
        told: list[EvalRecord | Notice] = []
        for name, metrics in found.items():
            if is_base(name):
                progress.base_metrics[name] = dict(metrics)
                told.append(EvalRecord(adapter=name, step=0, pass_index=progress.pass_index, metrics=metrics, best=False))
            else:
                told += self._scored(name, progress.adapters[name], metrics, progress.pass_index)
        return told

    def val_rows(self, name: str) -> Sequence[TaskRow]:
        """The rows that this adapter is scored on while it trains."""
        return spread(self.jobs[name].val, self.config.max_rows)

    def base_rows(self) -> dict[str, Sequence[TaskRow]]:
        """What the base is scored on while the adapters train: each distinct set of held-out rows, under its own name."""
        if not self.task.scores_base:
            return {}
        sets = base_rows({name: job.val for name, job in self.jobs.items()})
        return {label: spread(rows, self.config.max_rows) for label, rows in sets.items()}

    def use_best(self, name: str) -> None:
        """Put the adapter's best values into the bank; without any the present ones stay."""
        with torch.no_grad():
            for key, leaf in self.engine.bank.named_parameters(name) if name in self.best else ():
                leaf.copy_(self.best[name][key])

    def _scored(self, name: str, p: AdapterProgress, metrics: Mapping[str, float], now: int) -> list[EvalRecord | Notice]:
        loss, value = metrics["loss"], metrics[self.config.best]
        best = math.isfinite(value) and (p.best_loss is None or self._better(value, p.best_loss))
        known = p.best_metrics.get("loss")
        turned = known is not None and not loss <= TURN_SHARE * known
        p.last_metrics = {**metrics, "step": p.step}
        if best:
            p.best_loss, p.best_step, p.best_metrics, p.without_gain, p.turned = value, p.step, dict(metrics), 0, False
            self.best[name] = {key: leaf.detach().clone() for key, leaf in self.engine.bank.named_parameters(name)}
        else:
            p.without_gain += 1
        record = EvalRecord(adapter=name, step=p.step, pass_index=now, metrics=metrics, best=best, turned=turned)
        notice = self._stopped(name, p) or (None if best else self._turned(p, loss, turned))  # the best by another score
        return [record] if notice is None else [record, Notice(text=notice[0], adapter=name, level=notice[1], pass_index=now)]

    def _better(self, value: float, than: float) -> bool:
        return value < than if lower_is_better(self.config.best) else value > than

    def _stopped(self, name: str, p: AdapterProgress) -> tuple[str, str] | None:
        patience = self.jobs[name].run.early_stopping
        if patience is None or p.without_gain < patience or p.status != RUNNING:
            return None
        p.status = STOPPED_EARLY
        best = "no evaluation gave a number" if p.best_loss is None else f"best {p.best_loss:.4f} at step {p.best_step}"
        what = f"validation {self.config.best.replace('_', ' ')}"
        return f"stopped at step {p.step}: {patience} evaluations without a better {what} ({best})", "info"

    def _turned(self, p: AdapterProgress, loss: float, turned: bool) -> tuple[str, str] | None:
        if not turned or p.turned:
            return None
        p.turned = True
        best = f"after {p.best_metrics['loss']:.4f} at step {p.best_step}"
        return f"validation loss has turned ({loss:.4f} {best}); it may be overfitting. The best step is kept.", "warning"
