"""Tables and plots of results/result.json, a CPU's, and results/gpu/result.json.

python studies/base_storage/report.py      # draws and writes README.md's tables anew
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARKS: Mapping[str, str] = {"": "<!-- table: written by report.py -->", "gpu": "<!-- table of gpu: written by report.py -->"}
"""Folder below results/ to what its table stands behind in README.md."""
END = "<!-- end -->"
REFERENCE = "bf16"
FEW_SEEDS = 3
"""Up to which each has a column and a panel of its own."""
COLOURS = {"fp32": "#4D4D4D", "bf16": "#0072B2", "fp8": "#D55E00", "fp8-weight-only": "#CC79A7", "nf4": "#009E73"}
"""By storage, in the order of the table; told apart by colour-blind readers as well."""


def ratios(document: Mapping[str, Any], name: str) -> list[float]:
    """Final validation loss over that of the bf16 base, by seed."""
    own, reference = (document["runs"][storage]["seeds"] for storage in (name, REFERENCE))
    return [own[seed]["final"] / reference[seed]["final"] for seed in own]


def seed_spread(document: Mapping[str, Any]) -> float:
    """Largest over smallest final validation loss of the bf16 base's seeds, less one."""
    finals = [own["final"] for own in document["runs"][REFERENCE]["seeds"].values()]
    return max(finals) / min(finals) - 1


def table(document: Mapping[str, Any]) -> str:
    """Markdown: by storage, the losses, their ratio to bf16 seed by seed, and what merging made of them."""
    runs = document["runs"]
    names = [name for name in COLOURS if name in runs]
    seeds = list(runs[REFERENCE]["seeds"])
    if len(seeds) > FEW_SEEDS:
        return _table_of_many(document, names)
    head = ["base", "untrained", *(f"seed {s}" for s in seeds), *(f"seed {s} ÷ bf16" for s in seeds), "merged into bf16"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        run = runs[name]
        merged = run["merged_into_bf16"]
        unmerged = run["seeds"][merged["seed"]]["final"]
        cells = [name, f"{run['base_loss']:.4f}", *(f"{run['seeds'][s]['final']:.4f}" for s in seeds)]
        cells += [f"{ratio:.4f}" for ratio in ratios(document, name)]
        cells.append(f"{merged['validation']:.4f} ({100 * (merged['validation'] / unmerged - 1):+.2f} %)")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\nThe seeds of bf16 are {100 * seed_spread(document):.2f} % apart.")
    return "\n".join(lines)


def _table_of_many(document: Mapping[str, Any], names: Sequence[str]) -> str:
    """The same where a column for each seed would be too many: means over seeds, how far they scatter, and the extremes."""
    runs = document["runs"]
    count = len(runs[REFERENCE]["seeds"])
    lines = [f"| base | untrained | mean of {count} seeds | ÷ bf16, mean ± standard error | lowest, highest | merged into bf16 |"]
    lines.append("|---|---|---|---|---|---|")
    for name in names:
        run, own = runs[name], ratios(document, name)
        merged = run["merged_into_bf16"]
        unmerged = run["seeds"][merged["seed"]]["final"]
        error = statistics.stdev(own) / len(own) ** 0.5
        final = statistics.mean(seed["final"] for seed in run["seeds"].values())
        into = f"{merged['validation']:.4f} ({100 * (merged['validation'] / unmerged - 1):+.2f} %)"
        lines.append(
            f"| {name} | {run['base_loss']:.4f} | {final:.4f} | {statistics.mean(own):.4f} ± {error:.4f} "
            f"| {min(own):.4f}, {max(own):.4f} | {into} |"
        )
    lines.append(f"\nThe seeds of bf16 are {100 * seed_spread(document):.2f} % apart.")
    return "\n".join(lines)


def with_table(text: str, document: Mapping[str, Any], name: str = "") -> str:
    """README.md with the table of `document` between the marks of results/`name`."""
    before, mark, rest = text.partition(MARKS[name])
    _, _, after = rest.partition(END)
    return f"{before}{mark}\n{table(document)}\n{END}{after}"


def write(folder: Path) -> None:
    """Plot and table of the result in `folder`; README.md's table too where it is the study's own."""
    document = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    draw(document, folder / "loss.png")
    print(table(document))
    for name in MARKS:
        if folder.resolve() == HERE / "results" / name:
            readme = HERE / "README.md"
            readme.write_text(with_table(readme.read_text(encoding="utf-8"), document, name), encoding="utf-8")


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Validation loss by step for every storage, and the difference to bf16 of training and validation loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = document["runs"]
    seeds = list(runs[REFERENCE]["seeds"])
    figure = Figure(figsize=(11, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = seeds if len(seeds) <= FEW_SEEDS else ["all seeds"]
    losses, *differences = figure.subplots(1, 1 + len(panels))
    for name, colour in COLOURS.items():
        for index, (seed, own) in enumerate(runs[name]["seeds"].items() if name in runs else ()):
            line, marker = ("-", "--")[index % 2], "os"[index % 2]
            losses.plot(
                [0, *own["steps"]], [runs[name]["base_loss"], *own["validation"]], color=colour, linestyle=line, marker=marker,
                markersize=4, label=f"{name}, seed {seed}" if len(seeds) <= FEW_SEEDS else None if index else name,
            )  # fmt: skip
            if name == REFERENCE:
                continue
            reference = runs[REFERENCE]["seeds"][seed]
            axes = differences[min(index, len(panels) - 1)]
            train = _percent(own["train"], reference["train"])
            if len(panels) == len(seeds):
                axes.plot(range(1, len(train) + 1), train, color=colour, linewidth=0.8, alpha=0.45)
            held = _percent(own["validation"], reference["validation"])
            label = None if index and len(panels) < len(seeds) else name
            axes.plot(own["steps"], held, color=colour, linestyle=line, marker=marker, markersize=6, label=label)
    losses.set_title("Validation loss, nats a token", fontsize=10)
    for panel, axes in zip(panels, differences, strict=True):
        title, thin = (f"seed {panel}", ", thin: training rows") if len(panels) == len(seeds) else (panel, "")
        axes.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
        axes.axhspan(-1, 1, color="#000000", alpha=0.07, linewidth=0)
        axes.set_title(f"Loss against bf16, {title} (%; band: ±1 %)\nmarkers: validation{thin}", fontsize=10)
    low, high = zip(*(axes.get_ylim() for axes in differences), strict=True)
    for axes in differences:
        axes.set_ylim(min(low), max(high))
    for axes in (losses, *differences):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(f"LoRA over a quantised base: {document['settings']['model']}, E2E", fontsize=12)
    figure.savefig(path)


def _percent(values: list[float], reference: list[float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(values, reference, strict=True)]


if __name__ == "__main__":
    for name in MARKS:
        write(HERE / "results" / name)
