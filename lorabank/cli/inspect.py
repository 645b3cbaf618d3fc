"""`lorabank inspect`: what an adapter folder, or a run folder, holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.cli.folders import chosen_path
from lorabank.cli.parser import CommandParser
from lorabank.errors import AdapterFileError, closest

if TYPE_CHECKING:
    from rich.console import Console

    from lorabank.formats.adapter import Adapter

EXAMPLES = """\
examples:
  lorabank inspect out/support                a run: its adapters, checkpoints, best scores
  lorabank inspect out/support/formal         an adapter: ranks, norms, what stands out, who reads it
  lorabank inspect out/support/formal --layers        a row for each layer
  lorabank inspect out/support/formal --json          the same for machines
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        help="what an adapter or a run holds",
        description="Show what an adapter folder (lorabank's or PEFT's) or a run folder holds. Loads no base model.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="adapter folder or file, FOLDER:NAME of several in a folder, or run folder"
    )
    parser.add_argument("--layers", action="store_true", help="a row for each layer instead of each kind of module")
    parser.add_argument("--json", action="store_true", help="print JSON: of a run, a list with its adapters")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print; 1 when an adapter holds NaN or infinity."""
    from rich.console import Console

    console = Console(highlight=False)
    folder = chosen_path(args.folder, place="FOLDER")
    if not folder.exists():
        beside = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise AdapterFileError(f"{folder}: no such file or folder{closest(folder.name, beside)}")
    from lorabank.cli.inspect_adapter import print_adapter

    if folder.name == "adapter_config.json":
        folder = folder.parent
    is_run = (folder / "config.yaml").is_file()
    if args.json:
        return print_json(folder, is_run=is_run)
    if is_run:
        return print_run(console, folder, layers=args.layers)
    return 0 if print_adapter(console, load(folder), folder, layers=args.layers) else 1


def print_json(folder: Path, *, is_run: bool) -> int:
    """One adapter as an object, a run's as a list; 1 when one holds NaN or infinity."""
    from lorabank.cli.inspect_adapter import as_json

    if not is_run:
        document = as_json(load(folder), folder)
        print(json.dumps(document, indent=2))
        return 1 if document["broken"] else 0
    from lorabank.config.parse import load_config

    names = load_config(folder)[0].adapters or ("default",)
    written = [folder / name for name in names if (folder / name / "adapter_config.json").is_file()]
    documents = [as_json(load(path), path) for path in written]
    print(json.dumps(documents, indent=2))
    return 1 if any(document["broken"] for document in documents) else 0


def load(path: Path) -> Adapter:
    """Read an adapter, NaN and infinity included: looking at a broken one is what this command is for."""
    from lorabank.formats.detect import load_adapter

    return load_adapter(path, allow_non_finite=True)


def print_run(console: Console, folder: Path, *, layers: bool = False) -> int:
    """A run: base, adapters, checkpoints, best scores."""
    from lorabank.cli.inspect_adapter import print_adapter
    from lorabank.config.parse import load_config
    from lorabank.training.tables import metrics_table

    config, _ = load_config(folder)
    console.print(f"[bold]run {folder}[/]: base {config.model}, task {config.task}, seed {config.seed}")
    checkpoints = sorted(
        (item.name for item in (folder / "checkpoints").glob("step-*")), key=lambda name: int(name.rpartition("-")[2])
    )
    console.print(f"checkpoints: {', '.join(checkpoints) or 'none'}")
    scores = best_scores(folder / "metrics.jsonl")
    if scores:
        console.print("best scores on held-out rows:")
        console.print(metrics_table(scores, width=console.width))
    healthy = True
    for name in config.adapters or ("default",):
        if (folder / name / "adapter_config.json").is_file():
            healthy &= print_adapter(console, load(folder / name), folder / name, layers=layers)
        else:
            console.print(f"{name}: not written yet")
    return 0 if healthy else 1


def best_scores(path: Path) -> dict[str, Mapping[str, float]]:
    """The metrics of the best evaluation of every adapter (and of the base), from a run's metrics file."""
    from lorabank.training.base_rows import base_table
    from lorabank.training.metrics_file import read_metrics

    best: dict[str, Mapping[str, float]] = {}
    for row in read_metrics(path) if path.is_file() else []:
        if row["event"] == "eval" and (row["best"] or row["adapter"] not in best):
            best[row["adapter"]] = _numbers(row["metrics"])
        elif row["event"] == "end":  # scored once more, with the metrics that take generation
            ends = {name: adapter["best_metrics"] for name, adapter in row["adapters"].items()}
            ends |= base_table(row["base_metrics"], row.get("base_metrics_of", {}))
            for name, metrics in ends.items():
                if metrics:
                    best[name] = {**best.get(name, {}), **_numbers(metrics)}
    return best


def _numbers(metrics: Mapping[str, float | str]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}  # NaN is a text in the file
