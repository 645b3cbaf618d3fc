"""The study's table and pictures, of the files in results/: `python studies/sign_digits/table.py` writes them and README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from lorabank.tasks.images.confusion_plot import confusion_plot
from lorabank.training.plots import COLOURS

HERE = Path(__file__).parent
NAMES = {"full": "full fine-tuning", "lora": "LoRA, convolutions and linears", "head": "the head alone"}
START, END = "<!-- table: written by table.py -->", "<!-- end -->"
Runs = Sequence[Mapping[str, Any]]


def load(folder: Path = HERE / "results") -> list[dict[str, Any]]:
    """Every run, in the order of arms, rates and seeds."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    return sorted(runs, key=lambda run: (list(NAMES).index(run["arm"]), run["rate"], run["seed"]))


def chosen(runs: Runs, arm: str) -> list[Mapping[str, Any]]:
    """The runs of an arm at its best rate: the highest validation accuracy with the first seed, then the lowest loss."""
    own = [run for run in runs if run["arm"] == arm]
    first = min(run["seed"] for run in own)
    last = {run["rate"]: run["curve"][-1] for run in own if run["seed"] == first}
    best = max(last, key=lambda rate: (last[rate]["accuracy"], -last[rate]["loss"]))
    return [run for run in own if run["rate"] == best]


def table(runs: Runs) -> str:
    """Markdown: an arm a row, and the search of rates below."""
    arms = [arm for arm in NAMES if any(run["arm"] == arm for run in runs)]
    whole = next(run["trained_parameters"] for run in runs if run["arm"] == "full")
    lines = [
        "| trained | parameters | rate | test accuracy | test F1 (macro) | test loss | validation accuracy | seeds | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        best = chosen(runs, arm)
        count, rate = best[0]["trained_parameters"], best[0]["rate"]
        scores = [_mean([run["test"][key] for run in best], scale) for key, scale in (("accuracy", 100), ("f1_macro", 100))]
        val = _mean([run["curve"][-1]["accuracy"] for run in best], 100)
        loss, seconds = _mean([run["test"]["loss"] for run in best], 1), mean(run["cpu_seconds"] for run in best)
        lines.append(
            f"| {NAMES[arm]} | {count:,} ({100 * count / whole:.1f} %) | {rate:g} | {scores[0]} | {scores[1]} | {loss} | {val} "
            f"| {len(best)} | {seconds:.0f} |"
        )
    lines += ["", "Searched with the first seed, accuracy on validation pictures after the last epoch (loss in brackets):", ""]
    lines += ["| trained | rates |", "|---|---|"]
    for arm in arms:
        own = [run for run in runs if run["arm"] == arm]
        first = [run for run in own if run["seed"] == min(r["seed"] for r in own)]
        tried = "; ".join(
            f"{run['rate']:g}: {100 * run['curve'][-1]['accuracy']:.1f} % ({run['curve'][-1]['loss']:.3f})" for run in first
        )
        lines.append(f"| {NAMES[arm]} | {tried} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], scale: float) -> str:
    shown = [scale * value for value in values]
    digits, unit = (1, " %") if scale == 100 else (3, "")
    each = f" ({', '.join(f'{value:.{digits}f}' for value in shown)})" if len(shown) > 1 else ""
    return f"{mean(shown):.{digits}f}{unit}{each}"


def with_table(text: str, runs: Runs) -> str:
    """The page with the table in its place."""
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{table(runs)}\n{END}", text, flags=re.DOTALL)


def curves(runs: Runs, out_png: Path) -> None:
    """Validation accuracy and losses by epoch, of each arm's best rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for colour, arm in zip(COLOURS, (arm for arm in NAMES if any(run["arm"] == arm for run in runs)), strict=False):
        for run in chosen(runs, arm):
            first = run is chosen(runs, arm)[0]
            epochs = [row["epoch"] for row in run["curve"]]
            label = NAMES[arm] if first else None
            left.plot(
                epochs, [100 * row["accuracy"] for row in run["curve"]], color=colour, marker="o", markersize=4, label=label
            )
            right.plot(epochs, [row["loss"] for row in run["curve"]], color=colour, marker="o", markersize=4)
            right.plot(epochs, [row["train_loss"] for row in run["curve"]], color=colour, linestyle=":", linewidth=1.2)
    left.set_ylabel("validation accuracy, %")
    right.set_ylabel("loss, nats: validation, dotted training")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    left.legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.savefig(out_png)


def main() -> None:
    """Write README.md's table, curves.png and a confusion matrix of each arm."""
    runs = load()
    page = HERE / "README.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    curves(runs, HERE / "curves.png")
    for arm in NAMES:
        if any(run["arm"] == arm for run in runs):
            best = chosen(runs, arm)
            counts = sum(np.array(run["confusion"]) for run in best)
            pictures = f"{len(best)} × {int(np.array(best[0]['confusion']).sum())} test pictures"
            confusion_plot(
                np.asarray(counts), best[0]["labels"], HERE / f"confusion-{arm}.png", title=f"{NAMES[arm]}: {pictures}"
            )


if __name__ == "__main__":
    main()
