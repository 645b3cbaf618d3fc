"""`Trainer`: the joint training loop over the engine's verbs. One forward and backward a pass, for all that still run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorabank.bank.bank import AdapterBank
from lorabank.config.train import TrainConfig
from lorabank.data.render import TokenRow
from lorabank.engine.batch import make_batch
from lorabank.engine.state import EngineState, load_state, save_state
from lorabank.engine.step import Engine, SlotLoss, forward_backward, optim_step
from lorabank.errors import CheckpointError, OutputError
from lorabank.optim.slot_optimizer import SlotOptimizer, SlotStep
from lorabank.training.checkpoint import Checkpoint, write_checkpoint
from lorabank.training.evaluate import BASE_NAME, full_scores, spread, validation_losses
from lorabank.training.events import EvalRecord, Listener, Notice, StepRecord
from lorabank.training.interrupt import InterruptFlag, StopRequested, interruptible
from lorabank.training.jobs import AdapterJob
from lorabank.training.progress import FINISHED, NOT_FINITE, RUNNING, STOPPED_EARLY, AdapterProgress, RunProgress
from lorabank.training.run_folder import RunFolder

TURN_SHARE = 1.05
"""Validation loss this far above its best is called turning."""


@dataclass(kw_only=True)
class Trainer:
    """One run: its fixed parts, and its progress."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    jobs: Mapping[str, AdapterJob]
    config: TrainConfig
    folder: RunFolder | None
    """None: nothing is written."""
    listeners: Sequence[Listener]
    progress: RunProgress
    optimizer: SlotOptimizer
    best: dict[str, dict[str, Tensor]]
    """Adapter to its leaves' values at the best validation loss."""
    identity: Mapping[str, object]
    """What a checkpoint must agree with: configuration and data."""

    @property
    def bank(self) -> AdapterBank:
        """The adapters."""
        return self.engine.bank

    def run(self) -> bool:
        """Train until every adapter is done. False when interrupted: a checkpoint is written then."""
        with interruptible() as flag:
            self._started = time.monotonic() - self.progress.seconds
            while True:
                try:
                    if self._evaluation_due():
                        self._evaluate(flag)
                except StopRequested:
                    pass
                if self._save_due() or flag.set:
                    self.save_checkpoint()
                if flag.set:
                    return False
                running = [name for name, p in self.progress.adapters.items() if p.status == RUNNING]
                if not running:
                    return True
                self._pass(running)

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def _pass(self, running: Sequence[str]) -> None:
        began = time.monotonic()
        rows: list[TokenRow] = []
        routes: list[str] = []
        examples: list[int] = []
        taken: dict[str, list[int]] = {}
        for name in running:
            job, p = self.jobs[name], self.progress.adapters[name]
            taken[name] = job.stream.batch(p.position)
            rows += [job.stream.rows[i] for i in taken[name]]
            routes += [name] * len(taken[name])
            examples += [p.pending * job.stream.batch_size + i for i in range(len(taken[name]))]
        batch = make_batch([(row.input_ids, row.weights) for row in rows], routes, examples=examples)
        steps = {name: self.progress.adapters[name].step for name in running}
        losses = forward_backward(self.engine, batch, steps=steps)
        self.progress.pass_index += 1
        for name in running:
            self._account(name, losses[name], taken[name], batch.weights_NL.sum(1).tolist())
        due = [name for name in running if self.progress.adapters[name].pending == self.jobs[name].run.gradient_accumulation]
        due = [name for name in due if self.progress.adapters[name].status == RUNNING]
        rates = {name: self.jobs[name].learning_rate_at(self.progress.adapters[name].step) for name in due}
        done = (
            optim_step(self.optimizer, rates, {name: self.progress.adapters[name].pending_tokens for name in due}) if due else {}
        )
        seconds = max(time.monotonic() - began, 1e-9)
        for name in due:
            tokens = sum(len(self.jobs[name].stream.rows[i].input_ids) for i in taken[name])
            self._finish_step(name, done[name], rates[name], tokens / seconds)
        self.progress.seconds = time.monotonic() - self._started

    def _account(self, name: str, loss: SlotLoss, taken: Sequence[int], weights: Sequence[float]) -> None:
        p = self.progress.adapters[name]
        p.position += 1
        if not loss.finite:
            self._stop_not_finite(name, "its loss is NaN or infinite")
            return
        p.pending += 1
        p.pending_loss += loss.loss_sum
        p.pending_tokens += loss.tokens
        for row, (place, value) in zip(taken, loss.row_losses.items(), strict=True):
            p.row_losses[str(row)] = value / max(weights[place], 1e-12)

    def _finish_step(self, name: str, step: SlotStep, rate: float, tokens_per_second: float) -> None:
        p, job = self.progress.adapters[name], self.jobs[name]
        if not step.finite:
            self._stop_not_finite(name, "its gradient is NaN or infinite")
            return
        loss = p.pending_loss / max(p.pending_tokens, 1e-12)
        tokens = p.pending_tokens
        p.step, p.pending, p.pending_loss, p.pending_tokens = step.step, 0, 0.0, 0.0
        p.tokens_seen += tokens
        if p.step >= job.total_steps:
            p.status = FINISHED
        elapsed = time.monotonic() - self._started
        record = StepRecord(
            adapter=name,
            step=p.step,
            total_steps=job.total_steps,
            pass_index=self.progress.pass_index,
            epoch=job.epoch(p.position),
            loss=loss,
            learning_rate=rate,
            grad_norm=step.grad_norm,
            tokens=int(tokens),
            tokens_seen=int(p.tokens_seen),
            tokens_per_second=tokens_per_second,
            seconds_left=elapsed / p.step * (job.total_steps - p.step),
        )
        for listener in self.listeners:
            listener.on_step(record)

    def _stop_not_finite(self, name: str, why: str) -> None:
        p = self.progress.adapters[name]
        p.status, p.pending = NOT_FINITE, 0
        self.optimizer.zero_grad(name)
        self.notice(
            f"{name} stopped at step {p.step + 1}: {why}. Its weights are those of step {p.step}; the other adapters go on. "
            "Try a lower learning rate, or look at the rows of its last batch.",
            name,
            "warning",
        )

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        now, every = self.progress.pass_index, self.config.eval.every
        if self.progress.evaluated_pass == now:
            return False
        ended = any(p.status == FINISHED and not self._evaluated(name) for name, p in self.progress.adapters.items())
        return now == 0 or ended or bool(every and now % every == 0)

    def _evaluated(self, name: str) -> bool:
        p = self.progress.adapters[name]
        return p.last_metrics.get("step") == p.step

    def _evaluate(self, flag: InterruptFlag) -> None:
        now = self.progress.pass_index
        names = [n for n, p in self.progress.adapters.items() if p.status in (RUNNING, FINISHED) and not self._evaluated(n)]
        rows = {name: self._val_rows(name) for name in names if self.jobs[name].val}
        if now == 0:
            rows = {BASE_NAME: self.base_rows()} if self.base_rows() else {}
        if rows:
            losses = validation_losses(self.engine, rows, batch_size=self.config.eval.batch_size, busy=self._busy(flag))
            self.progress.evaluated_pass = now
            for name, loss in losses.items():
                self._base_evaluated(loss) if name == BASE_NAME else self._adapter_evaluated(name, loss)
        self.progress.evaluated_pass = now

    def _val_rows(self, name: str) -> Sequence[TokenRow]:
        return spread(self.jobs[name].val, self.config.eval.max_rows)

    def base_rows(self) -> list[TokenRow]:
        """Held-out rows of all adapters, each data set once: what the base is scored on."""
        sets = {id(job.val): self._val_rows(name) for name, job in self.jobs.items()}
        return [row for rows in sets.values() for row in rows]

    def _base_evaluated(self, loss: float) -> None:
        self.progress.base_metrics = {"loss": loss}
        self._emit_eval(
            EvalRecord(adapter=BASE_NAME, step=0, pass_index=self.progress.pass_index, metrics={"loss": loss}, best=False)
        )

    def _adapter_evaluated(self, name: str, loss: float) -> None:
        p = self.progress.adapters[name]
        best = loss == loss and (p.best_loss is None or loss < p.best_loss)
        turned = p.best_loss is not None and loss > TURN_SHARE * p.best_loss
        p.last_metrics = {"loss": loss, "step": p.step}
        if best:
            p.best_loss, p.best_step, p.best_metrics, p.without_gain = loss, p.step, {"loss": loss}, 0
            self.best[name] = {key: leaf.detach().clone() for key, leaf in self.bank.named_parameters(name)}
        else:
            p.without_gain += 1
        self._emit_eval(
            EvalRecord(
                adapter=name, step=p.step, pass_index=self.progress.pass_index, metrics={"loss": loss}, best=best, turned=turned
            )
        )
        patience = self.jobs[name].run.early_stopping
        if patience is not None and p.without_gain >= patience and p.status == RUNNING:
            p.status = STOPPED_EARLY
            self.notice(
                f"{name} stopped at step {p.step}: {patience} evaluations without a better validation loss "
                f"(best {p.best_loss:.4f} at step {p.best_step})",
                name,
            )
        elif turned and p.without_gain == 1:
            self.notice(
                f"{name}: validation loss has turned ({loss:.4f} after {p.best_loss:.4f} at step {p.best_step}); "
                "it may be overfitting",
                name,
                "warning",
            )

    def final_scores(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Every metric of the run's configuration for base and adapters as they stand in the bank now."""
        whole = {id(job.val): job.val for job in self.jobs.values()}
        rows: dict[str, Sequence[TokenRow]] = {BASE_NAME: [row for own in whole.values() for row in own]}
        rows |= {name: rows[BASE_NAME] if len(whole) == 1 else self.jobs[name].val for name in names}
        rows = {name: own for name, own in rows.items() if own}
        if not rows:
            return {}
        with interruptible() as flag:
            return full_scores(self.engine, self.tokenizer, rows, config=self.config.eval, busy=self._busy(flag))

    def use_best(self, name: str) -> None:
        """Put the adapter's best values into the bank."""
        if name in self.best:
            with torch.no_grad():
                for key, leaf in self.bank.named_parameters(name):
                    leaf.copy_(self.best[name][key])

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        now, every = self.progress.pass_index, self.config.save.every
        return self.folder is not None and bool(every and now and now % every == 0 and self.progress.saved_pass != now)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this moment. A full disk costs a notice, not the run."""
        if self.folder is None:
            return
        self.progress.saved_pass = self.progress.pass_index
        state = save_state(self.bank, self.optimizer)
        best = {f"{name}/best/{key}": tensor.cpu() for name, leaves in self.best.items() for key, tensor in leaves.items()}
        values = {"engine": dict(state.values), "progress": self.progress.to_dict(), "identity": dict(self.identity)}
        checkpoint = Checkpoint(tensors={**state.tensors, **best}, values=values)
        try:
            write_checkpoint(self.folder.checkpoints, self.progress.pass_index, checkpoint, keep=self.config.save.keep)
        except OutputError as error:
            self.notice(
                f"no checkpoint at pass {self.progress.pass_index}: {error}. Training goes on; older checkpoints are untouched.",
                level="warning",
            )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's state back. Raises CheckpointError when it belongs to another configuration or other data."""
        saved = checkpoint.values["identity"]
        differing = [key for key in self.identity if saved.get(key) != self.identity[key]]
        if differing:
            shown = "; ".join(f"{key}: was {saved.get(key)!r}, is {self.identity[key]!r}" for key in differing[:3])
            raise CheckpointError(
                f"the checkpoint belongs to another run: {shown}. "
                "Resume with the same settings, or start afresh in another output folder."
            )
        load_state(self.bank, self.optimizer, EngineState(tensors=checkpoint.tensors, values=checkpoint.values["engine"]))
        self.progress = RunProgress.from_dict(checkpoint.values["progress"])
        for key, tensor in checkpoint.tensors.items():
            name, kind, leaf = key.split("/", 2)
            if kind == "best":
                self.best.setdefault(name, {})[leaf] = tensor.to(self.bank.device)

    # ---- telling ----------------------------------------------------------------------------------------------------

    def notice(self, text: str, adapter: str | None = None, level: str = "info") -> None:
        """Tell the user a sentence."""
        for listener in self.listeners:
            listener.on_notice(Notice(text=text, adapter=adapter, level=level))

    def _emit_eval(self, record: EvalRecord) -> None:
        for listener in self.listeners:
            listener.on_eval(record)

    def _busy(self, flag: InterruptFlag):
        def busy(activity: str, done: int, total: int) -> None:
            for listener in self.listeners:
                listener.on_busy(activity, done, total)
            flag.check()

        return busy


def fresh_progress(jobs: Mapping[str, AdapterJob]) -> RunProgress:
    """Before the first pass."""
    return RunProgress(adapters={name: AdapterProgress() for name in jobs})
