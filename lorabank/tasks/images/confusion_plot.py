"""The confusion matrix as a picture that can be read with ten classes and with two hundred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorabank.tasks.images.metrics import mistaken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUMBERED = 20
"""Classes up to which each cell shows its count."""
NAMED = 45
"""Classes up to which each has its name at the axes."""
PAIRS = 18
"""Of what is mistaken most often, beside it."""
_LONGEST = 18
"""Letters of a name that are shown."""


def confusion_plot(counts: np.ndarray, labels: Sequence[str], out_png: str | Path, *, title: str) -> Path:
    """Draw `counts` (true × predicted) into `out_png`; returns it.

    Colours are each true class's shares, the small ones lifted, so that rare mistakes show; beside it the commonest mistakes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(labels)
    side = min(10.0, max(5.2, 3.2 + 0.22 * size))
    figure = Figure(figsize=(side + 3.4, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=(side, 2.9))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, vmin=0, vmax=1), interpolation="nearest", aspect="equal")
    _ticks(axes, labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11, loc="left")
    if size <= NUMBERED:
        _numbers(axes, counts, shares)
    _pairs(beside, counts, labels)
    figure.savefig(out_png)
    return Path(out_png)


def _ticks(axes: Axes, labels: Sequence[str]) -> None:
    size = len(labels)
    step = 1 if size <= NAMED else math.ceil(size / NAMED)
    places = list(range(0, size, step))
    names = [_short(labels[i]) for i in places]
    letters = max(5.0, min(9.0, 330 / max(size / step, 1)))
    turned = size > NUMBERED or max(map(len, names)) > 3
    axes.set_xticks(places, names, rotation=90 if turned else 0, fontsize=letters)
    axes.set_yticks(places, names, fontsize=letters)
    axes.tick_params(length=2 if step == 1 else 3)
    axes.spines[:].set_visible(False)


def _numbers(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.25
        axes.text(
            int(column),
            int(row),
            f"{counts[row, column]}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else ("#333333" if row == column else "#b00020"),
        )


def _pairs(axes: Axes, counts: np.ndarray, labels: Sequence[str]) -> None:
    axes.set_axis_off()
    right, total = int(np.trace(counts)), int(counts.sum())
    lines = [f"{right:,} of {total:,} right ({100 * right / max(1, total):.1f} %)", ""]
    pairs = mistaken(counts, PAIRS)
    lines.append("mistaken most often" if pairs else "nothing was mistaken")
    for true, predicted, times in pairs:
        lines.append(f"{times:>3} × {_short(labels[true])} → {_short(labels[predicted])}")
    axes.text(0, 1, "\n".join(lines), va="top", ha="left", fontsize=8, linespacing=1.5, transform=axes.transAxes)


def _short(name: str) -> str:
    plain = name.replace("$", r"\$")  # which would begin a formula
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"
