"""`preview`: rows of a run as training sees them, for every task; nothing is trained."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lorabank.config.paths import expanded
from lorabank.config.train import TrainConfig
from lorabank.data.preview import Printer
from lorabank.formats.files import write_files
from lorabank.tasks import task_kind
from lorabank.training.busy import BusyBar
from lorabank.training.data_sets import Report, TaskRow, adapter_runs
from lorabank.training.streams import RowStream
from lorabank.training.task import BaseRequest

PICTURES = "lorabank-preview"
"""Folder of the pictures, below the working folder."""
PASSES = 3
"""Over the data, whose draws are shown."""


def preview(config: TrainConfig, *, count: int = 3, pictures: str | Path = PICTURES) -> None:
    """Print `count` rows of every data set, and its report. `pictures`: folder for what is no text; files there are replaced.

    Raises ConfigError, DataError and ModelError as a training does before its first step, and OutputError.
    """
    from rich.console import Console

    console, kind = Console(), task_kind(config.task)
    said = Console(stderr=True)
    base = (kind.load_preview or kind.load)(
        BaseRequest(
            model=config.model, dtype=config.base_dtype, device=config.device, trust_remote_code=config.trust_remote_code
        ),
        lambda line: said.print(line, markup=False, highlight=False),
    )
    task = kind.open(config, base.model, base.processor, {})
    with BusyBar() as busy:
        sets = task.read_preview(config, lambda done, total: busy("reading data", done, total))
    runs, shown, folder = adapter_runs(config), dict[str, str](), expanded(str(pictures), place="pictures")
    for name, prepared in sets.by_adapter.items():
        data = sets.names[name]
        if data in shown:
            continue
        shown[data] = _file_name(data, shown.values())
        console.rule(data)
        rows, run = prepared.train, runs[name]
        seed = config.seed if run.seed is None else run.seed
        numbers = task.previewed(rows, count)

        def draws(
            rows: Sequence[TaskRow] = rows,
            numbers: Sequence[int] = numbers,
            batch_size: int = run.batch_size,
            seed: int = seed,
        ) -> list[list[int]]:
            return first_draws(rows, numbers, batch_size=batch_size, seed=seed)

        made = task.preview(name, [rows[i] for i in numbers], Printer(console), draws)
        write_files(folder, {f"{shown[data]}-{file}": content for file, content in made.items()})
        for file in made:
            console.print(f"drawn: {folder / f'{shown[data]}-{file}'}", markup=False, highlight=False, soft_wrap=True)
        console.print(report_table(prepared.report))


def report_table(report: Report) -> Table:
    """A report's sentences under each other, what should be looked at in yellow."""
    table = Table.grid(padding=(0, 1))
    for number, line in enumerate(report.lines()):
        style = "yellow" if line.startswith(("dropped", "same ", "cut to")) else ""
        table.add_row(Text("data" if number == 0 else "", style="bold"), Text(line, style=style))
    return table


def first_draws(rows: Sequence[TaskRow], numbers: Sequence[int], *, batch_size: int, seed: int) -> list[list[int]]:
    """What each of the rows `numbers` draws in the first passes over all of them, as an adapter of this seed does."""
    stream = RowStream(rows, batch_size, seed)
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for position in range(stream.micro_batches(float(PASSES))):
        for i, draw in zip(stream.batch(position), stream.draws(position), strict=True):
            if i in found:
                found[i].append(draw)
    return list(found.values())


def _file_name(data: str, taken: Collection[str]) -> str:
    """What a data set's pictures begin with, another for each."""
    stem = re.sub(r"[^\w.-]+", "_", Path(data).name) or "data"
    return next(name for number in itertools.count(1) if (name := stem if number == 1 else f"{stem}-{number}") not in taken)
