"""`metrics.jsonl`: every event of a run as one JSON object a line.

Every line has `event` (`start`, `step`, `eval`, `notice`, `end`) and `pass_index` (forward passes done; 0 before the first).
All values follow from configuration, data and seed, so that two runs of one configuration on one machine write the same lines,
but for what `CLOCK_KEYS` names, which hold wall-clock measurements and stand in an object of their own, `clock`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorabank.errors import OutputError
from lorabank.formats.files import utf8
from lorabank.training.events import EvalRecord, Notice, RunPlan, RunResult, StepRecord

CLOCK_KEYS = ("tokens_per_second", "seconds_left", "seconds")
"""Keys inside `clock`: the only ones that differ between two runs."""


class MetricsFile:
    """A `Listener` that appends to `metrics.jsonl`, each line written through at once. A resumed run goes on in the same file.

    A disk that is full doesn't end the training: lines wait in memory, `on_full` is told once, and they are written when there
    is room. What is still waiting at the end is an OutputError.
    """

    def __init__(self, path: str | Path, on_full: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._on_full = on_full
        self._waiting: list[str] = []
        self._pass = 0
        self._early: list[Notice] | None = []  # before the start, which says whether the file goes on

    def on_start(self, plan: RunPlan) -> None:
        """A `start` line and the notices before it, unless the file goes on: then it has them."""
        early, self._early = self._early or [], None
        if plan.resumed_from is not None and self.path.exists():
            self._pass = max((row["pass_index"] for row in read_metrics(self.path)), default=0)
            return
        self._write("start", {key: value for key, value in asdict(plan).items() if key != "resumed_from"}, {})
        for notice in early:
            self.on_notice(notice)

    def on_step(self, record: StepRecord) -> None:
        """A `step` line."""
        self._pass = record.pass_index
        values = asdict(record)
        clock = {key: values.pop(key) for key in CLOCK_KEYS if key in values}
        self._write("step", values, clock)

    def on_eval(self, record: EvalRecord) -> None:
        """An `eval` line."""
        self._pass = record.pass_index
        self._write("eval", asdict(record), {})

    def on_notice(self, notice: Notice) -> None:
        """A `notice` line."""
        if self._early is not None:
            self._early.append(notice)
            return
        if notice.pass_index is not None:
            self._pass = notice.pass_index
        values = asdict(notice)
        del values["pass_index"]
        self._write("notice", values, {})

    def on_busy(self, activity: str, done: int, total: int) -> None:
        """Progress isn't recorded."""

    def on_end(self, result: RunResult) -> None:
        """An `end` line. Raises OutputError when lines couldn't be written."""
        values = asdict(replace(result, trained={}, next_lines=()))  # numbers and names only
        del values["next_lines"]
        del values["trained"]
        self._write("end", values, {"seconds": values.pop("seconds")}, last=True)

    def _write(self, event: str, values: Mapping[str, Any], clock: Mapping[str, float], *, last: bool = False) -> None:
        line = {"event": event, "pass_index": self._pass, **values}
        if clock:
            line["clock"] = dict(clock)
        self._waiting.append(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n")
        try:
            self._append(utf8("".join(self._waiting)))
        except OSError as error:
            self._told(error, last=last)
        else:
            self._waiting = []

    def _append(self, text: bytes) -> None:
        """All of it or nothing. The file is opened each time: a run that dies leaves nothing unwritten."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            done = 0
            try:
                while done < len(text):
                    done += file.write(text[done:]) or 0
            except OSError:
                file.truncate(before)
                raise

    def _told(self, error: OSError, *, last: bool) -> None:
        message = f"{self.path}: can't be written: {error.strerror or error}"
        waits = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if self._on_full is None or last or not waits:
            raise OutputError(message) from error
        if len(self._waiting) == 1:
            self._on_full(f"{message}. Training goes on, and the lines are written when there is room.")


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become the texts `nan`, `inf`, `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for text in Path(path).read_bytes().splitlines():
        try:
            rows.append(json.loads(text))
        except ValueError:
            break
    return rows


def count_lines(path: str | Path) -> int:
    """Whole lines of the file; 0 where there is none."""
    file = Path(path)
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def cut_back(path: str | Path, lines: int) -> None:
    """Keep the first `lines` lines, as many as there were when a checkpoint was made; a resumed run writes the others again.

    Atomic. Nothing happens where there is no file. By number and not by pass: an evaluation may come before a checkpoint of its
    pass or after it.
    """
    file = Path(path)
    if not file.is_file():
        return
    kept = file.read_bytes().splitlines(keepends=True)[:lines]
    scratch = file.with_name(file.name + ".new")
    try:
        with scratch.open("wb") as out:
            out.write(b"".join(text for text in kept if text.endswith(b"\n")))
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"{file}: can't be cut back to the checkpoint: {error.strerror or error}") from error
