"""The table and the plot of results/result.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCE = "bf16"
COLOURS = {"fp32": "#4D4D4D", "bf16": "#0072B2", "fp8": "#D55E00", "fp8-weight-only": "#E69F00", "nf4": "#009E73"}


def table(document: Mapping[str, Any]) -> str:
    """Markdown: by storage, the losses and their ratio to bf16, seed by seed."""
    runs = document["runs"]
    order = [name for name in COLOURS if name in runs]
    seeds = list(runs[order[0]]["seeds"])
    head = [
        "base",
        "untrained",
        *(f"seed {s}" for s in seeds),
        *(f"÷ bf16, seed {s}" for s in seeds),
        "merged into bf16 (÷ unmerged)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in order:
        run = runs[name]
        finals = [run["seeds"][s]["final"] for s in seeds]
        ratios = [run["seeds"][s]["final"] / runs[REFERENCE]["seeds"][s]["final"] for s in seeds]
        merged = [run["seeds"][s]["merged_into_bf16"]["validation"] for s in seeds]
        cells = [name, f"{run['base_loss']:.4f}", *(f"{v:.4f}" for v in finals), *(f"{v:.4f}" for v in ratios)]
        cells.append(", ".join(f"{m:.4f} ({m / f:.4f})" for m, f in zip(merged, finals, strict=True)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Validation loss by step for every storage, and its ratio to bf16."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = document["runs"]
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, ratios = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        if name not in runs:
            continue
        for index, (seed, own) in enumerate(runs[name]["seeds"].items()):
            style = {"color": colour, "linestyle": ("-", "--")[index % 2], "marker": "os"[index % 2], "markersize": 4}
            label = f"{name}, seed {seed}"
            losses.plot([0, *own["steps"]], [runs[name]["base_loss"], *own["validation"]], label=label, **style)
            if name != REFERENCE:
                reference = runs[REFERENCE]["seeds"][seed]["validation"]
                percent = [100 * (a / b - 1) for a, b in zip(own["validation"], reference, strict=True)]
                ratios.plot(own["steps"], percent, label=label, **style)
    losses.set_yscale("log")
    losses.set_yticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    losses.minorticks_off()
    losses.set_title("Validation loss, nats a token")
    ratios.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
    ratios.axhspan(-1, 1, color="#000000", alpha=0.06, linewidth=0)
    ratios.set_title("Difference to the bf16 base, same seed (band: ±1 %)")
    ratios.set_ylabel("%")
    for axes in (losses, ratios):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5)
    figure.suptitle(f"LoRA over a quantised base: {document['settings']['model']}, E2E", fontsize=12)
    figure.savefig(path)
