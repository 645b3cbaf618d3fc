"""loss.png: drawn from metrics.jsonl, without pyplot's global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorabank.errors import DataError
from lorabank.training.metrics_file import MetricsFile
from lorabank.training.plots import loss_plot, smoothed
from tests.training.events_for_tests import evaluation, play, step


def test_a_picture_with_both_adapters_colours(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    file = MetricsFile(tmp_path / "metrics.jsonl")
    play([file])
    path = loss_plot(file.path, tmp_path / "loss.png")
    pixels = imread(path)
    assert pixels.shape[:2] == (690, 1200)
    for colour in ("#0072B2", "#D55E00", "#555555"):
        near = abs(pixels[:, :, :3] - to_rgb(colour)).max(axis=2) < 0.02
        assert near.sum() > 100, colour


def test_a_run_that_went_nan_or_has_no_evaluation_is_drawn(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_step(step("formal", 1))
    file.on_eval(evaluation("formal", 1, float("nan"), best=False))
    assert loss_plot(file.path, tmp_path / "loss.png").stat().st_size > 1000


def test_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(DataError, match="no training step"):
        loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png")


def test_smoothing() -> None:
    assert smoothed([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    assert smoothed([0.0, 1.0], 2)[1] == pytest.approx(1 / 1.5)


def test_pyplot_is_not_imported() -> None:
    code = "import sys, lorabank.training.plots as p, matplotlib.figure; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_losses_are_in_is_said_and_the_bases_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: seen.append(figure))
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_step(step("formal", 1))
    for name, loss in (("base (a's rows)", 10.48), ("base (b's rows)", 10.21)):
        file.on_eval(evaluation(name, 0, loss, best=False))
    loss_plot(file.path, tmp_path / "loss.png", unit="squared error")
    (axes,) = seen[0].axes
    assert axes.get_ylabel() == "loss (squared error)"
    assert [(text.get_text(), text.get_horizontalalignment()) for text in axes.texts] == [
        ("base (b's rows) 10.210", "right"),
        ("base (a's rows) 10.480", "center"),
    ]
