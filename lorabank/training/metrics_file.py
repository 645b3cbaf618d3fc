"""`metrics.jsonl`: every event of a run as one JSON object a line.

Every line has `event` (`start`, `step`, `eval`, `notice`, `end`) and `pass_index` (forward passes done; 0 before the first).
All values follow from configuration, data and seed, so that two runs of one configuration on one machine write the same lines,
but for what `CLOCK_KEYS` names, which hold wall-clock measurements and stand in an object of their own, `clock`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorabank.errors import OutputError
from lorabank.training.events import EvalRecord, Notice, RunPlan, RunResult, StepRecord

CLOCK_KEYS = ("tokens_per_second", "seconds_left", "seconds")
"""Keys inside `clock`: the only ones that differ between two runs."""


class MetricsFile:
    """A `Listener` that appends to `metrics.jsonl`, each line written through at once. A resumed run goes on in the same file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        self._write("notice", asdict(notice), {})

    def on_busy(self, activity: str, done: int, total: int) -> None:
        """Progress isn't recorded."""

    def on_end(self, result: RunResult) -> None:
        """An `end` line."""
        values = asdict(result)
        self._write("end", values, {"seconds": values.pop("seconds")})

    def _write(self, event: str, values: Mapping[str, Any], clock: Mapping[str, float]) -> None:
        line = {"event": event, "pass_index": self._pass, **values}
        if clock:
            line["clock"] = dict(clock)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:  # opened for each line: a run that dies leaves nothing unwritten
                file.write(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: can't be written: {error.strerror or error}") from error


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


def cut_back(path: str | Path, pass_index: int) -> None:
    """Drop every line after a checkpoint's `pass_index`, and an `end`, so that a resumed run writes them again. Atomic.

    Nothing happens where there is no file.
    """
    file = Path(path)
    if not file.exists():
        return
    kept = []
    for row, text in zip(read_metrics(file), file.read_bytes().splitlines(keepends=True), strict=False):
        if row["pass_index"] > pass_index:
            break
        if row["event"] != "end":
            kept.append(text)
    scratch = file.with_name(file.name + ".new")
    with scratch.open("wb") as out:
        out.write(b"".join(kept))
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(file)
