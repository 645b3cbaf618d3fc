"""`lorabank inspect`: what an adapter folder, or a run folder, holds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.cli.parser import CommandParser
from lorabank.config.paths import expanded
from lorabank.errors import AdapterFileError, closest

if TYPE_CHECKING:
    from rich.console import Console

    from lorabank.formats.adapter import Adapter, AdapterLayer

EXAMPLES = """\
examples:
  lorabank inspect out/support                a run: its adapters, checkpoints, best scores
  lorabank inspect out/support/formal         an adapter: ranks, layers, norms, NaN check, its base
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        help="what an adapter or a run holds",
        description="Show what an adapter folder (lorabank's or PEFT's) or a run folder holds. Loads no base model.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", metavar="FOLDER", help="adapter folder or file, or run folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print; 1 when an adapter holds NaN or infinity."""
    from rich.console import Console

    console = Console(highlight=False)
    folder = expanded(args.folder, place="FOLDER", kind=AdapterFileError)
    if not folder.exists():
        beside = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise AdapterFileError(f"{folder}: no such file or folder{closest(folder.name, beside)}")
    if not (folder / "config.yaml").is_file():
        return 0 if print_adapter(console, load(folder), str(folder)) else 1
    return print_run(console, folder)


def load(path: Path) -> Adapter:
    """Read an adapter, NaN and infinity included: looking at a broken one is what this command is for."""
    from lorabank.formats.detect import load_adapter
    from lorabank.formats.peft import load_peft

    if (path / "adapter_config.json").is_file():
        return load_peft(path, allow_non_finite=True)
    return load_adapter(path)


def print_run(console: Console, folder: Path) -> int:
    """A run: base, adapters, checkpoints, best scores."""
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
            healthy &= print_adapter(console, load(folder / name), str(folder / name))
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


def print_adapter(console: Console, adapter: Adapter, title: str) -> bool:
    """One adapter as a table by layer kind; returns whether every number is finite."""
    from lorabank.training import human
    from lorabank.training.tables import new_table

    config = adapter.config
    console.print(f"\n[bold]adapter {title}[/]")
    kind = ("rsLoRA, α/√r" if config.use_rslora else "LoRA, α/r") + (", DoRA" if config.use_dora else "")
    scaling = _span(f"{layer.scaling:.3g}" for layer in adapter.layers.values())
    patterns = " (patterns differ)" if config.rank_pattern or config.alpha_pattern else ""
    console.print(f"{kind}, rank {config.rank}, alpha {config.alpha:g}{patterns}, scaling {scaling}, dropout {config.dropout:g}")
    console.print(
        f"base: {adapter.base_model or 'not named'}, {'with' if adapter.fingerprint else 'without'} fingerprint", markup=False
    )
    kinds: dict[str, list[AdapterLayer]] = {}
    for path, layer in adapter.layers.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(layer)
    table = new_table()
    table.add_column("layers", style="cyan", no_wrap=True)
    for head in ("number", "in → out", "rank", "params", "‖A‖", "‖B‖", "‖ΔW‖"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, layers in kinds.items():
        parameters = sum(tensor.numel() for layer in layers for tensor in layer.tensors.values())
        table.add_row(
            name,
            str(len(layers)),
            _span(f"{layer.size[0]} → {layer.size[1]}" for layer in layers),
            _span(layer.rank for layer in layers),
            human.count(parameters),
            *(
                f"{math.sqrt(sum(value**2 for value in norms) / len(norms)):.3g}"
                for norms in zip(*map(norms_of, layers), strict=True)
            ),
        )
    console.print(table)
    broken = [path for path, layer in adapter.layers.items() if not all(t.isfinite().all() for t in layer.tensors.values())]
    zero = sum(1 for layer in adapter.layers.values() if layer.magnitude is None and not (layer.A.any() and layer.B.any()))
    dtypes = sorted({str(layer.A.dtype).removeprefix("torch.") for layer in adapter.layers.values()})
    whole = f"{len(adapter.layers)} layers, {adapter.num_parameters:,} parameters in {', '.join(dtypes)}"
    console.print(f"{whole}; norms are means over the layers")
    if zero:
        console.print(f"{zero} layers have A or B = 0 and change nothing", style="yellow")
    if broken:
        console.print(f"NaN or infinity in {len(broken)} layers, first {broken[0]}", style="bold red")
    else:
        console.print("no NaN, no infinity", style="green")
    return not broken


def norms_of(layer: AdapterLayer) -> tuple[float, float, float]:
    """‖A‖, ‖B‖ and ‖scaling · B A‖ (Frobenius). ‖BA‖² = tr(BᵀB · AAᵀ), so that ΔW is never formed."""
    A, B = layer.A.flatten(1).double(), layer.B.double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    delta = abs(layer.scaling) * (math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else squared)
    return float(A.norm()), float(B.norm()), delta


def _span(values: Iterable[object]) -> str:
    found = list(dict.fromkeys(map(str, values)))
    return found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}"
