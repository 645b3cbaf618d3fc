"""`Trainer`: the joint training loop over the engine's verbs. One forward and backward a pass, for all that still run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabank.bank.bank import AdapterBank
from lorabank.config.train import TrainConfig
from lorabank.engine.batch import Batch
from lorabank.engine.model_batch import ModelBatch
from lorabank.engine.model_pass import row_losses
from lorabank.engine.parts import is_out_of_memory
from lorabank.engine.state import EngineState, load_state, save_state
from lorabank.engine.step import Engine, SlotLoss, forward_backward, logprobs, optim_step
from lorabank.errors import OutputError, TooLargeError
from lorabank.optim.slot_optimizer import SlotOptimizer, SlotStep
from lorabank.training.checkpoint import Checkpoint, write_checkpoint
from lorabank.training.events import EvalRecord, Listener, Notice, StepRecord
from lorabank.training.identity import check_identity
from lorabank.training.interrupt import InterruptFlag, StopRequested
from lorabank.training.jobs import AdapterJob
from lorabank.training.progress import FINISHED, NOT_FINITE, RUNNING, AdapterProgress, RunProgress
from lorabank.training.run_folder import RunFolder
from lorabank.training.start import adapter_is_finite, restart_adapter
from lorabank.training.task import Busy, Task
from lorabank.training.validation import Validation
from lorabank.wording import counted


@dataclass(kw_only=True)
class Trainer:
    """One run: its fixed parts, and its progress."""

    engine: Engine
    task: Task[Any]
    jobs: Mapping[str, AdapterJob]
    config: TrainConfig
    listeners: Sequence[Listener]
    progress: RunProgress
    optimizer: SlotOptimizer
    validation: Validation
    identity: Mapping[str, Any]
    """What a checkpoint must agree with."""
    folder: RunFolder | None = None
    """None: nothing is written."""
    _started: float = field(init=False, default_factory=time.monotonic)
    _unsaved: bool = field(init=False, default=True)
    """Whether anything has happened since the last checkpoint."""
    _paced: dict[str, tuple[int, float]] = field(init=False, default_factory=dict)
    """Each adapter's first step here and the seconds until then: it may have compiled, and says nothing about others."""
    _shown: int = field(init=False, default=-1)
    """Pass after which the task's files for people were written."""
    _tried: int = field(init=False, default=-1)
    """Pass of the last attempt at a checkpoint: on a full disk there is one attempt a pass."""

    @property
    def bank(self) -> AdapterBank:
        """The adapters."""
        return self.engine.bank

    def run(self, flag: InterruptFlag) -> bool:
        """Train until every adapter is done. False when interrupted. A checkpoint is written at the end in both cases."""
        self._started = time.monotonic() - self.progress.seconds
        self._make_room()
        while True:
            try:
                self._validate(flag)
                self._show(flag)
            except TooLargeError:
                self.save_checkpoint()
                raise
            if self._save_due() or flag.set:
                self.save_checkpoint()
            if flag.set:
                return False
            running = [name for name, p in self.progress.adapters.items() if p.status == RUNNING]
            if not running:
                self._check_the_ends()
                self.save_checkpoint()
                return True
            try:
                self._pass(running)
            except TooLargeError:
                self.save_checkpoint()  # nothing of this pass is in it
                raise

    def _make_room(self) -> None:
        """For the optimizer, before anything else fills the memory that its first step would ask for."""
        names = [name for name, p in self.progress.adapters.items() if p.status == RUNNING]
        try:
            self.optimizer.make_room(names)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TooLargeError(
                f"out of memory: there is no room for the optimizer's state of {counted(len(names), 'adapter')} "
                f"({(str(error).splitlines() or [''])[0]}). Train fewer adapters at once or lower ranks, or keep the base in "
                "fewer bits (base_dtype: nf4)."
            ) from error

    def rehearse(self) -> None:
        """A forward pass of each adapter's first row, so that what would fail in the first step fails here."""
        if any(job.stream.pack_to for job in self.jobs.values()):
            self.engine.packing(max(job.stream.longest for job in self.jobs.values()))
        rows = [[job.stream.rows[job.stream.batch(0)[0]]] for job in self.jobs.values()]
        numbers = list(range(len(rows)))
        batch = self.task.batch(
            rows, list(self.jobs), examples=numbers, draws=[job.stream.draws(0)[0] for job in self.jobs.values()]
        )
        if isinstance(batch, ModelBatch):
            row_losses(self.engine, batch)
        else:
            logprobs(self.engine, batch)

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def _pass(self, running: Sequence[str]) -> None:
        began = time.monotonic()
        rows: list[list[Any]] = []
        routes: list[str] = []
        examples: list[int] = []
        draws: list[int] = []
        taken: dict[str, list[int]] = {}
        for name in running:
            job, p = self.jobs[name], self.progress.adapters[name]
            packed = job.stream.packed(p.position)
            taken[name] = [i for row in packed for i in row]
            rows += [[job.stream.rows[i] for i in row] for row in packed]
            routes += [name] * len(packed)
            draws += job.stream.draws(p.position)
            examples += [p.pending * job.stream.most_examples + i for i in range(len(taken[name]))]
        batch = self.task.batch(rows, routes, examples=examples, draws=draws)
        steps = {name: self.progress.adapters[name].step for name in running}
        self._unsaved = True
        tried = self.engine.fits.times
        losses = forward_backward(self.engine, batch, steps=steps)
        if self.engine.fits.times > tried:
            self._tell_of_memory(batch)
        self.progress.pass_index += 1
        due = [name for name in running if self._step_is_due(name)]
        rates = {name: self.jobs[name].learning_rate_at(self.progress.adapters[name].step) for name in due}
        tokens = {name: self.progress.adapters[name].pending_tokens + losses[name].tokens for name in due}
        # the step is put behind the pass before any loss is looked at, which on a GPU waits for both
        done = optim_step(self.optimizer, rates, tokens) if due else {}
        weights = batch.example_weights()
        for name in running:
            self._account(name, losses[name], taken[name], weights)
        seconds = max(time.monotonic() - began, 1e-9)
        for name in due:
            if self.progress.adapters[name].status == RUNNING:
                read = sum(self.jobs[name].stream.rows[i].size for i in taken[name])
                self._finish_step(name, done[name], rates[name], read / seconds)
        self.progress.seconds = time.monotonic() - self._started

    def _step_is_due(self, name: str) -> bool:
        return self.progress.adapters[name].pending + 1 == self.jobs[name].run.gradient_accumulation

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
        if not step.finite and self.engine.scales_losses and not self.engine.loss_scales.exhausted(name):
            self._skip_step(name)
            return
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
            seconds_left=self._seconds_a_step(name, p.step, elapsed) * (job.total_steps - p.step),
        )
        for listener in self.listeners:
            listener.on_step(record)

    def _seconds_a_step(self, name: str, step: int, elapsed: float) -> float:
        first, then = self._paced.setdefault(name, (step, elapsed))
        return (elapsed - then) / (step - first) if step > first else elapsed / step

    def _skip_step(self, name: str) -> None:
        p = self.progress.adapters[name]
        p.skipped, p.pending, p.pending_loss, p.pending_tokens = p.skipped + 1, 0, 0.0, 0.0
        if p.skipped == 1:
            self.notice(
                f"its gradient overflowed fp16 after step {p.step}: the step was skipped and its loss scale halved to "
                f"{self.engine.loss_scales[name].value:g}. A few of these are usual, and not said again.",
                name,
            )

    def _tell_of_memory(self, batch: Batch | ModelBatch) -> None:
        if isinstance(batch, ModelBatch):
            self.notice(
                f"out of memory with {counted(batch.rows, 'row')} in one pass: they went through in parts, and "
                f"passes are smaller from here "
                "on. Gradients add up to the same; gradient_checkpointing or a smaller batch_size may be faster.",
                level="warning",
            )
            return
        self.notice(
            f"out of memory with {counted(batch.rows, 'row')} of up to {counted(max(batch.lengths), 'token')} "
            f"in one pass: they went through in parts, "
            f"and passes have at most {self.engine.fits.tokens:,} tokens from here on. Gradients add up to the same; "
            "gradient_checkpointing or a smaller batch_size may be faster.",
            level="warning",
        )

    def _stop_not_finite(self, name: str, why: str) -> None:
        p = self.progress.adapters[name]
        p.status, p.pending, p.pending_loss, p.pending_tokens = NOT_FINITE, 0, 0.0, 0.0
        self.optimizer.zero_grad(name)
        # weights that lead to a loss or gradient without a number may be finite and useless all the same
        if name in self.validation.best:
            self.validation.use_best(name)
            kept = f"set back to those of step {p.best_step}, its best by validation"
        else:
            restart_adapter(self.bank, name, self.jobs[name])
            kept = "set back to its start, since no validation had found a good step yet"
        self.notice(
            f"stopped after step {p.step}: {why}. Its weights are {kept}; the other adapters go on. "
            "Try a lower learning rate, or look at the rows of its last batch.",
            name,
            "warning",
        )

    def _check_the_ends(self) -> None:
        """The last step of an adapter has no pass after it that would notice what it did."""
        for name, p in self.progress.adapters.items():
            if p.status != NOT_FINITE and not adapter_is_finite(self.bank, name):
                self._unsaved = True
                self._stop_not_finite(name, "its last step made its weights infinite")

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _validate(self, flag: InterruptFlag) -> None:
        try:
            told = self.validation.run(self.progress, self.busy(flag))
        except StopRequested:
            return
        self._unsaved = self._unsaved or bool(told)
        for item in told:
            for listener in self.listeners:
                listener.on_eval(item) if isinstance(item, EvalRecord) else listener.on_notice(item)

    def _show(self, flag: InterruptFlag) -> None:
        now, every = self.progress.pass_index, self.config.eval.every
        if self.folder is None or not every or now % every or self._shown == now or flag.set:
            return
        self._shown, rows = now, {name: self.validation.val_rows(name) for name in self.jobs}
        try:
            self.task.show(
                self.engine, rows, self.folder.path, pass_index=now, config=self.config.eval, busy=self.busy(flag, "samples")
            )
        except StopRequested:
            return

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        now, every = self.progress.pass_index, self.config.save.every
        return bool(every and now and now % every == 0 and self._tried != now)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this moment, unless there is one. A full disk costs a notice, not the run."""
        if self.folder is None or not self._unsaved:
            return
        self._tried = self.progress.pass_index
        state = save_state(self.bank, self.optimizer, self.engine.loss_scales)
        best = {f"{name}/best/{key}": leaf.cpu() for name, leaves in self.validation.best.items() for key, leaf in leaves.items()}
        values = {
            "engine": dict(state.values),
            "progress": self.progress.to_dict(),
            "identity": dict(self.identity),
            "metrics_lines": self.folder.metrics_lines(),
        }
        checkpoint = Checkpoint(tensors={**state.tensors, **best}, values=values)
        try:
            write_checkpoint(self.folder.checkpoints, self.progress.pass_index, checkpoint, keep=self.config.save.keep)
        except OutputError as error:
            self.notice(
                f"no checkpoint at pass {self.progress.pass_index}: {error} Training goes on; older checkpoints are untouched.",
                level="warning",
            )
        else:
            self._unsaved = False

    def resume(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's state back. Raises CheckpointError, before anything changes, when it belongs to another run."""
        check_identity(checkpoint.values["identity"], self.identity)
        state = EngineState(tensors=checkpoint.tensors, values=checkpoint.values["engine"])
        load_state(self.bank, self.optimizer, state, self.engine.loss_scales)
        self.progress = RunProgress.from_dict(checkpoint.values["progress"])
        for key, tensor in checkpoint.tensors.items():
            name, kind, leaf = key.split("/", 2)
            if kind == "best":
                self.validation.best.setdefault(name, {})[leaf] = tensor.to(self.bank.device)
        self._unsaved = False

    # ---- telling ----------------------------------------------------------------------------------------------------

    def notice(self, text: str, adapter: str | None = None, level: str = "info") -> None:
        """Tell the user a sentence."""
        notice = Notice(text=text, adapter=adapter, level=level, pass_index=self.progress.pass_index)
        for listener in self.listeners:
            listener.on_notice(notice)

    def busy(self, flag: InterruptFlag, activity: str | None = None) -> Busy:
        """Hands progress to the listeners (under the name `activity`, if given), and gives up when the flag is set."""

        def busy(what: str, done: int, total: int) -> None:
            for listener in self.listeners:
                listener.on_busy(activity or what, done, total)
            flag.check()

        return busy


def fresh_progress(jobs: Mapping[str, AdapterJob]) -> RunProgress:
    """Before the first pass."""
    return RunProgress(adapters={name: AdapterProgress() for name in jobs})
