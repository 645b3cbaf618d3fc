"""`make quickstart`: two adapters trained in one pass on a real model and real data, compared with the base and with each other.

It runs examples/quickstart.yaml through `lorabank.train`, then measures what the same passes cost one adapter at a time.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabank.api import train
from lorabank.bank.attach import attach
from lorabank.config.parse import load_config
from lorabank.config.train import TrainConfig
from lorabank.engine.batch import Batch, make_batch
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.errors import LorabankError
from lorabank.models.load import load_base
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.tasks.text_generation import read_rows
from lorabank.training.allocation import keep_freed_memory
from lorabank.training.console import ConsoleListener
from lorabank.training.data_sets import adapter_runs
from lorabank.training.streams import RowStream

HERE = Path(__file__).parent
CONFIG = HERE / "quickstart.yaml"
TIMED_PASSES = 5


def free_output(wanted: str) -> str:
    """`wanted`, or the first numbered name beside it that is free: an earlier run is never written over."""
    path, number = Path(wanted), 2
    while path.exists():
        path, number = Path(f"{wanted}-{number}"), number + 1
    return str(path)


def seconds_a_pass(config: TrainConfig, groups: list[list[str]]) -> list[float]:
    """Median seconds of a training pass that holds a micro-batch of each adapter of a group, group by group in turn.

    In turn, since a machine's speed drifts: all groups see the same minutes.
    """
    base = load_base(config.model, dtype=config.base_dtype, device=config.device)
    rows = read_rows(config, base.tokenizer).by_adapter
    bank = attach(base.model)
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    runs = adapter_runs(config)
    for name, run in runs.items():
        bank.add(name, run.adapter_config())
        optimizer.add(name)
    times: list[list[float]] = [[] for _ in groups]
    for position in range(TIMED_PASSES + 1):
        for names, seconds in zip(groups, times, strict=True):
            batch = _batch({name: RowStream(rows[name].train, runs[name].batch_size, config.seed) for name in names}, position)
            began = time.perf_counter()
            losses = forward_backward(engine, batch, steps=dict.fromkeys(names, 0))
            optim_step(optimizer, dict.fromkeys(names, 1e-4), {name: loss.tokens for name, loss in losses.items()})
            seconds.append(time.perf_counter() - began)
    return [median(seconds[1:]) for seconds in times]  # the first ones warm up


def _batch(streams: dict[str, RowStream], position: int) -> Batch:
    taken = [(name, stream.rows[i]) for name, stream in streams.items() for i in stream.batch(position)]
    return make_batch([(row.input_ids, row.weights) for _, row in taken], [name for name, _ in taken])


def print_samples(console: Console, folder: Path) -> None:
    """The generated sentences of samples.md, side by side."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, header_style="bold", pad_edge=False)
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("sentence")
    for line in (folder / "samples.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("**Prompt**"):
            table.add_section()
            table.add_row("meaning", Text(line.split("user", 1)[-1].split("<|im_end|>")[0].strip(" `")), style="bold")
        elif line.startswith("| ") and len(cells) == 2 and cells[0].strip() and set(cells[0]) != {"-"}:
            table.add_row(cells[0].strip("| "), Text(cells[1].strip("| ")))
    console.print(table)


def main() -> int:
    """Train, print, compare the times."""
    keep_freed_memory()
    console = Console(highlight=False)
    config, _ = load_config(CONFIG)
    config = replace(config, output=free_output(config.output))
    console.print(
        f"[bold]lorabank train {CONFIG.relative_to(HERE.parent)} --output {config.output}[/]   (swap in your own model and data)"
    )
    listener = ConsoleListener(console)
    try:
        result = train(config, listeners=[listener])
    except LorabankError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    finally:
        listener.close()
    if result.interrupted:
        return 130
    print_samples(console, Path(result.output))
    console.print(f"measuring a pass of both adapters, and of each alone ({TIMED_PASSES} passes each, in turn) …", style="dim")
    names = list(adapter_runs(config))
    together, *each_alone = seconds_a_pass(config, [names, *([name] for name in names)])
    alone = dict(zip(names, each_alone, strict=True))
    one_by_one = sum(each_alone)
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in alone.items())
    console.print(
        f"one pass, both adapters: {together:.2f} s. One after the other: {one_by_one:.2f} s ({each}), "
        f"{one_by_one / together:.2f} × as long."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
