"""`BusyBar`: a progress bar for work outside a training run, on stderr, gone when done."""

from __future__ import annotations

from types import TracebackType


class BusyBar:
    """Call it with (activity, done, total); use it in a `with`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> BusyBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, activity: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=activity, completed=done, total=total, visible=True)
