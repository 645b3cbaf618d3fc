"""What a run shows: a summary before, one live table during, a result after. Plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.config.tasks import DEFAULT_TASK
from lorabank.training import human
from lorabank.training.base_rows import BASE_NAME, base_table
from lorabank.training.events import AdapterPlan, EvalRecord, Notice, RunPlan, RunResult, StepRecord
from lorabank.training.memory import memory_line
from lorabank.training.progress import NOT_FINITE
from lorabank.training.serving import serve_lines
from lorabank.training.tables import metrics_table, new_table, plan_table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

NOTICES_SHOWN = 4


@dataclass
class _Progress:
    """What is known of one adapter so far."""

    plan: AdapterPlan
    step: StepRecord | None = None
    loss: float | None = None
    """Smoothed training loss."""
    val: float | None = None
    best: float | None = None
    turned: bool = False


class ConsoleListener:
    """A `Listener` that draws on the terminal. Call `close()` when a run dies between events, so that the cursor returns.

    Without a terminal it prints a line every `plain_every` seconds.
    """

    def __init__(self, console: Console | None = None, *, plain_every: float = 15.0, refresh_per_second: float = 4.0) -> None:
        if console is None:
            from rich.console import Console as RichConsole

            console = RichConsole(highlight=False)
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.plain_every = plain_every
        self.refresh_per_second = refresh_per_second
        self._plan: RunPlan | None = None
        self._adapters: dict[str, _Progress] = {}
        self._base: dict[str, dict[str, float]] = {}
        self._notices: deque[Notice] = deque(maxlen=NOTICES_SHOWN)
        self._busy: tuple[str, int, int] | None = None
        self._display: Live | None = None
        self._last_line = 0.0
        self._started = 0.0

    @property
    def _unit(self) -> str:
        return self._plan.unit if self._plan is not None else "tokens"

    # events -------------------------------------------------------------------------------------------------------

    def on_start(self, plan: RunPlan) -> None:
        """Print the summary and open the live table."""
        self._plan = plan
        self._started = time.monotonic()
        self._last_line = -math.inf  # the first step is told at once
        self._adapters = {item.name: _Progress(item) for item in plan.adapters}
        self._print_plan(plan)
        if self.live:
            from rich.live import Live

            self._display = Live(
                get_renderable=self.render, console=self.console, refresh_per_second=self.refresh_per_second, transient=True
            )
            self._display.start()

    def on_step(self, record: StepRecord) -> None:
        """Remember the step."""
        progress = self._adapters[record.adapter]
        progress.step = record
        known = progress.loss
        progress.loss = record.loss if known is None else 0.9 * known + 0.1 * record.loss
        if not self.live and (time.monotonic() - self._last_line >= self.plain_every):
            self._plain_line()

    def on_eval(self, record: EvalRecord) -> None:
        """Remember the validation loss; a line each without a terminal."""
        if record.adapter == BASE_NAME or record.adapter not in self._adapters:
            self._base[record.adapter] = dict(record.metrics)
        else:
            progress = self._adapters[record.adapter]
            progress.val = record.metrics.get("loss", progress.val)
            progress.turned = record.turned
            if record.best:
                progress.best = progress.val
        if not self.live:
            scores = ", ".join(f"{name} {human.score(name, value)}" for name, value in record.metrics.items())
            mark = " (best)" if record.best else " (rising)" if record.turned else ""
            self._print_plain(f"evaluation of {record.adapter} after step {record.step}: {scores}{mark}")

    def on_notice(self, notice: Notice) -> None:
        """Show it below the table; a warning is printed above it, and stays."""
        if notice.level == "warning" or self._display is None:
            self.console.print(_notice_text(notice), soft_wrap=not self.live)
        else:
            self._notices.append(notice)

    def on_busy(self, activity: str, done: int, total: int) -> None:
        """Show a bar until `done == total`."""
        self._busy = (activity, done, total) if done < total else None

    def on_end(self, result: RunResult) -> None:
        """Close the table, print results, folders and the next commands."""
        self.close()
        self._print_result(result)

    def close(self) -> None:
        """Stop drawing. Safe to call twice."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    # before -------------------------------------------------------------------------------------------------------

    def _print_plan(self, plan: RunPlan) -> None:
        model = plan.model or "a model without a name"
        self.console.print(
            f"[bold]{model}[/], {human.count(plan.base_parameters)} parameters, {plan.base_dtype} on {plan.device}"
        )
        where = f"run folder {plan.output}" if plan.output else "nothing is written"
        self.console.print(where + (f", resumed from {plan.resumed_from}" if plan.resumed_from else ""))
        self.console.print(plan_table(plan, wide=self.console.width >= 100))
        reasons: dict[str, list[str]] = {}
        for item in plan.adapters:
            reasons.setdefault(f"{human.rate(item.learning_rate)}: {item.learning_rate_reason}", []).append(item.name)
        for reason, names in reasons.items():
            whose = "" if len(reasons) == 1 else f" of {', '.join(names)}"
            self.console.print(f"learning rate{whose} {reason}", style="dim")

    # during -------------------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The table and what stands below it, as they are now."""
        from rich.console import Group
        from rich.text import Text

        width = self.console.width
        parts: list[RenderableType] = [self._table(wide=width >= 100)]
        busy = self._busy
        if busy is not None:
            parts.append(self._bar(*busy))
        if self._plan is not None:
            line = f"{memory_line(self._plan.device)} · {human.duration(time.monotonic() - self._started)} so far"
            parts.append(Text(line, style="dim", no_wrap=True, overflow="ellipsis"))
        parts += [_notice_text(notice) for notice in list(self._notices)]  # drawn in rich's thread
        return Group(*parts)

    def _table(self, *, wide: bool) -> RenderableType:
        table = new_table()
        table.add_column("adapter", style="cyan", no_wrap=True)
        speed = f"{self._unit}/s"
        names = ["step", "loss", "validation", "learning rate", speed, "left"]
        for name in names if wide else ["step", "loss", "val", "lr", "tok/s" if speed == "tokens/s" else speed, "left"]:
            table.add_column(name, justify="right", no_wrap=True)
        for name, progress in self._adapters.items():
            table.add_row(name, *self._cells(progress))
        for name, metrics in self._base.items():
            if "loss" in metrics:
                table.add_row(f"[dim]{name}[/]", "", "", f"[dim]{metrics['loss']:.3f}  [/]", "", "", "")
        return table

    def _cells(self, progress: _Progress) -> list[str]:
        step = progress.step
        total = progress.plan.total_steps
        val = "–"
        if progress.val is not None:
            # two columns for the arrow, so that the digits stay under each other
            mark = "[bold yellow] ▲[/]" if progress.turned else "[green] ▼[/]" if progress.val == progress.best else "  "
            val = f"{progress.val:.3f}{mark}"
        if step is None:
            return [f"0/{total:,}", "–", val, human.rate(progress.plan.learning_rate), "–", "–"]
        done = step.step >= step.total_steps
        return [
            f"{step.step:,}/{step.total_steps:,}",
            f"{progress.loss:.3f}" if progress.loss is not None else "–",
            val,
            human.rate(step.learning_rate),
            human.count(step.tokens_per_second),
            "[green]done[/]" if done else human.duration(step.seconds_left),
        ]

    def _bar(self, activity: str, done: int, total: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 1))
        grid.add_row(activity, ProgressBar(total=total, completed=done, width=24), f"{done:,}/{total:,}")
        return grid

    def _plain_line(self) -> None:
        self._last_line = time.monotonic()
        parts = []
        for name, progress in self._adapters.items():
            step = progress.step
            if step is None:
                continue
            val = f" val {progress.val:.3f}" if progress.val is not None else ""
            parts.append(
                f"{name} {step.step}/{step.total_steps} loss {progress.loss:.3f}{val} lr {human.rate(step.learning_rate)}"
            )
        last = [p.step for p in self._adapters.values() if p.step is not None]
        speed = human.count(sum(s.tokens_per_second for s in last))
        left = human.duration(max(s.seconds_left for s in last))
        self._print_plain(f"{' | '.join(parts)} | {speed} {self._unit}/s, {left} left")

    def _print_plain(self, text: str) -> None:
        self.console.print(f"[{human.duration(time.monotonic() - self._started)}] {text}", markup=False, soft_wrap=True)

    # after --------------------------------------------------------------------------------------------------------

    def _print_result(self, result: RunResult) -> None:
        scores = base_table(result.base_metrics, result.base_metrics_of)
        scores |= {name: dict(item.best_metrics or item.final_metrics) for name, item in result.adapters.items()}
        extra = {}
        for name, item in result.adapters.items():
            best = f"step {item.best_step:,} of {item.steps:,}" if item.best_step is not None else f"step {item.steps:,}"
            extra[name] = {"kept": best, "end": item.status}
        head = "interrupted" if result.interrupted else "finished"
        self.console.print(f"[bold]{head}[/] after {human.duration(result.seconds)}. Held-out rows:")
        self.console.print(metrics_table(scores, extra, width=self.console.width))
        names = [name for name, item in result.adapters.items() if item.folder and Path(item.folder).is_dir()]
        for name in names:
            self._print_command(result.adapters[name].folder)
        if result.resume_command:
            self.console.print("\nto go on:", style="bold")
            self._print_command(result.resume_command)
        if self._plan is None or result.interrupted:
            return
        names = [name for name in names if result.adapters[name].status != NOT_FINITE]
        if not names:
            return
        for title, lines in result.next_lines:
            self.console.print(f"\n{title}", style="bold")
            for line in lines:
                self._print_command(line)
        if not self._plan.model or self._plan.task != DEFAULT_TASK:
            return
        title, lines = serve_lines(self._plan.model, {name: result.adapters[name].folder for name in names})
        self.console.print(f"\n{title}", style="bold")
        for line in lines:
            self._print_command(line)

    def _print_command(self, line: str) -> None:
        """Whole, on one logical line, so that it can be copied."""
        self.console.print(f"  {line}", markup=False, soft_wrap=True)


def _notice_text(notice: Notice) -> RenderableType:
    from rich.text import Text

    who = f"{notice.adapter}: " if notice.adapter else ""
    return Text(
        f"{'!' if notice.level == 'warning' else '·'} {who}{notice.text}", style="yellow" if notice.level == "warning" else "dim"
    )
