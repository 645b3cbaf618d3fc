"""`loss.png`: training and validation loss of every adapter, from `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.errors import DataError
from lorabank.training.base_rows import is_base
from lorabank.training.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#4D4D4D")
"""Told apart by colour-blind readers as well (Okabe and Ito, the darker ones first)."""
GREY = "#555555"
DASHES = (0, (4, 1.5))
BASE_LABELS = ((1.0, "right"), (0.5, "center"), (0.01, "left"))
"""Where the base's losses are named, from the lowest on: side by side, since they may be near each other."""
SMOOTHING_SHARE = 0.04
"""Time constant of the smoothing, as a share of the steps."""


def loss_plot(metrics_jsonl: str | Path, out_png: str | Path, *, unit: str = "nats a token") -> Path:
    """Draw the run's losses into `out_png`; returns it. `unit`: what they are in.

    Raises DataError where the file holds no step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_jsonl)
    steps, evals = _by_adapter(rows, "step"), _by_adapter(rows, "eval")
    base = {name: float(row["metrics"]["loss"]) for name, own in evals.items() if is_base(name) for row in own[:1]}
    if not steps:
        raise DataError(f"{metrics_jsonl}: holds no training step, so there is nothing to draw")
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn: list[float] = []
    for index, (name, records) in enumerate(steps.items()):
        drawn += _draw_adapter(axes, name, COLOURS[index % len(COLOURS)], records, evals.get(name, []))
    axes.set_ylabel(f"loss ({unit})")
    _finish(figure, axes, drawn, base)
    figure.savefig(out_png)
    return Path(out_png)


def _draw_adapter(
    axes: Axes, name: str, colour: str, records: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]
) -> list[float]:
    """One adapter's lines; returns the values that must be in view."""
    x, y = _finite([r["step"] for r in records], [r["loss"] for r in records])
    smooth = smoothed(y, max(2.0, SMOOTHING_SHARE * len(y)))
    axes.plot(x, y, color=colour, alpha=0.15, linewidth=0.8)
    axes.plot(x, smooth, color=colour, alpha=0.7, linewidth=1.3)
    held = [row for row in evals if "loss" in row["metrics"]]
    held_x, held_y = _finite([r["step"] for r in held], [r["metrics"]["loss"] for r in held])
    label = name
    if held_y:
        axes.plot(held_x, held_y, color=colour, linewidth=1.7, linestyle=DASHES, marker="o", markersize=4.5)
        best = min(range(len(held_y)), key=held_y.__getitem__)
        axes.plot(
            [held_x[best]],
            [held_y[best]],
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=1.3,
        )
        label = f"{name}\nbest {held_y[best]:.3f}, step {held_x[best]:,}"
    axes.plot([], [], color=colour, linewidth=4, label=label)
    return smooth + held_y


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """Exponential mean with a time constant of `window` values, corrected for its start."""
    keep = 1 - 1 / window
    total = weight = 0.0
    result = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        result.append(total / weight)
    return result


def _finish(figure: Figure, axes: Axes, drawn: list[float], base: Mapping[str, float]) -> None:
    axes.set_xlabel("optimizer step of the adapter")
    axes.set_xlim(left=0)
    finite = sorted((loss, name) for name, loss in base.items() if math.isfinite(loss))
    for index, (loss, name) in enumerate(finite):
        place, side = BASE_LABELS[index % len(BASE_LABELS)]
        axes.axhline(loss, color=GREY, linewidth=1.2, linestyle=":")
        axes.annotate(
            f"{name} {loss:.3f}",
            (place, loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha=side,
            fontsize=8.5,
            color=GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )
        drawn = [*drawn, loss]
    if drawn:
        room = 0.07 * (max(drawn) - min(drawn) or 1)
        axes.set_ylim(min(drawn) - 2 * room, max(drawn) + 1.4 * room)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.plot([], [], color=GREY, linewidth=1.3, label="training, smoothed")
    axes.plot([], [], color=GREY, linewidth=1.7, linestyle=DASHES, marker="o", markersize=4.5, label="validation")
    figure.legend(frameon=False, fontsize=8.5, loc="outside right upper", labelspacing=0.9)


def _by_adapter(rows: Sequence[dict[str, Any]], event: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["event"] == event:
            found.setdefault(row["adapter"], []).append(row)
    return found


def _finite(x: Sequence[int], y: Sequence[Any]) -> tuple[list[int], list[float]]:
    """Without the points of a run that went NaN (texts in the file)."""
    pairs = [(a, float(b)) for a, b in zip(x, y, strict=True) if math.isfinite(float(b))]
    return [a for a, _ in pairs], [b for _, b in pairs]
