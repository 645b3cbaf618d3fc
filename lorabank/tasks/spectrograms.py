"""Log-Mel pictures of recordings, for people."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One recording."""

    title: str
    mel_TM: np.ndarray
    """Frames × bins, logarithms."""
    seconds: float
    """That its frames last."""


def spectrograms(panels: Sequence[Panel]) -> bytes:
    """A PNG: a row a recording, low pitches below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2 * len(panels) + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        bins = panel.mel_TM.shape[1]
        extent = (0.0, panel.seconds, 0.0, float(bins))
        axes.imshow(panel.mel_TM.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest", extent=extent)
        axes.set_title(panel.title.replace("$", r"\$")[:110], fontsize=9, loc="left")
        axes.set_ylabel("Mel bin", fontsize=8)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7)
    stream = io.BytesIO()
    figure.savefig(stream)
    return stream.getvalue()
