"""Real processes that train and are killed. A fork server has the heavy imports, so that each of them starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import lorabank.api
import lorabank.training.run
from lorabank.cli.main import main
from lorabank.training.events import EvalRecord, Notice, RunPlan, RunResult, StepRecord
from lorabank.training.run_folder import RunFolder

_CONTEXT = multiprocessing.get_context("forkserver")


class Quiet:
    """A listener that does nothing: the base of those that act."""

    def on_start(self, plan: RunPlan) -> None: ...
    def on_step(self, record: StepRecord) -> None: ...
    def on_eval(self, record: EvalRecord) -> None: ...
    def on_notice(self, notice: Notice) -> None: ...
    def on_busy(self, activity: str, done: int, total: int) -> None: ...
    def on_end(self, result: RunResult) -> None: ...


class SignalAt(Quiet):
    """Sends this process a signal at a moment, such as `("step", 7)`: a pass; `("scoring", 3)`: the third report."""

    def __init__(self, moment: tuple[str, int], number: int) -> None:
        self.what, self.when, self.number = *moment, number
        self.seen, self.sent = 0, False

    def on_step(self, record: StepRecord) -> None:
        self._count("step", record.pass_index)

    def on_eval(self, record: EvalRecord) -> None:
        self._count("eval")

    def on_busy(self, activity: str, done: int, total: int) -> None:
        self._count(activity)

    def _count(self, what: str, now: int | None = None) -> None:
        if what != self.what:
            return
        self.seen = self.seen + 1 if now is None else now
        if self.seen == self.when and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def die_at_call(owner: Any, name: str, count: int) -> None:
    """SIGKILL at the `count`-th call of a function: between the parts of a write."""
    real: Callable[..., Any] = getattr(owner, name)
    left = [count]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def _train(folder: str, settings: Mapping[str, Any], resume: bool, moment: tuple[str, int] | None, number: int) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    listeners: list[Any] = []
    if moment is not None and moment[0] == "fsync":
        die_at_call(os, "fsync", moment[1])
    elif moment is not None and moment[0] == "replace":
        die_at_call(Path, "replace", moment[1])
    elif moment is not None and moment[0] == "save_adapter":
        die_at_call(RunFolder, "save_adapter", moment[1])
    elif moment is not None and moment[0] == "write_card":
        die_at_call(lorabank.training.run, "write_card", moment[1])
    elif moment is not None:
        listeners.append(SignalAt(moment, number))
    result = lorabank.api.train(**settings, resume=resume, listeners=listeners)
    sys.exit(130 if result.interrupted else 0)


def _command(folder: str, words: list[str]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(main(words))


def start_command(folder: Path, words: list[str]) -> Any:
    """`lorabank WORDS…` in `folder`, as a process under way; its output is in log.txt."""
    return _started(_command, str(folder), words)


def train_in_child(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    moment: tuple[str, int] | None = None,
    number: int = signal.SIGKILL,
) -> int:
    """Train in `folder` in a process of its own and wait; returns its exit code (−9 when it was killed)."""
    process = _started(_train, str(folder), dict(settings), resume, moment, number)
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def _started(target: Callable[..., None], *args: Any) -> Any:
    _CONTEXT.set_forkserver_preload([__name__])
    process = _CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process
