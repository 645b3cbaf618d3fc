"""The scripts of image generation as far as a machine without a GPU can tell: that they run, and compare like with like."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "emoji_styles"


def test_both_systems_of_the_benchmark_compute_the_same() -> None:
    """Loss and gradients of our pass and of diffusers' loop, with one adapter on the same noise."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # they are scripts, which import each other by name
    bench = importlib.import_module("text_to_image")
    found = bench.check(bench.Work(device=torch.device("cpu"), dtype=torch.float32, tiny=True))
    assert found["loss"] == pytest.approx(found["exact_loss"], rel=1e-5)
    assert found["our_gradient_error"] < 1e-4
    assert found["exact_gradient"] > 1e-3
    eight = bench.Ours(bench.Work(device=torch.device("cpu"), dtype=torch.float32, tiny=True), bench.STYLES, 1, how="plain")
    assert torch.isfinite(eight(0))
    assert all(eight.optimizer.steps(name) == 1 for name in bench.STYLES)


@pytest.mark.slow
def test_the_study_runs_from_pictures_to_a_grid(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    names = [f"thing {i}" for i in range(24)]
    np.savez(
        tmp_path / "emoji.npz",
        styles=np.array(["noto", "twemoji", "openmoji", "fluent"]),
        pictures=chance.integers(0, 255, (4, 24, 16, 16, 3), dtype=np.uint8),
        captions=np.array(names),
        concepts=np.array(names),
        text=chance.normal(size=(24, 5, 24)).astype(np.float16),
    )
    small = "--device cpu --minutes 0.02 --pretrain-batch 4 --width 16 --steps 3 --batch 2 --rank 2"
    drawn = "--names 2 --draw-steps 2 --held-out 0.1"
    command = [sys.executable, str(STUDY / "run.py"), *small.split(), *drawn.split(), "--data", str(tmp_path / "emoji.npz")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--base", str(tmp_path / "base.pt"), "--bf16"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert facts["losses"].keys() == {"base", "openmoji", "fluent"}
    assert facts["styles"]["steps"] == 3
    with Image.open(tmp_path / "out" / "grid.png") as page:
        assert page.size[1] > 2 * 32
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["fluent.safetensors", "openmoji.safetensors"]


def test_the_studys_numbers_are_those_of_its_results() -> None:
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    facts = json.loads((STUDY / "results" / "results.json").read_text())
    for who in facts["losses"].values():
        for value in who.values():
            assert f"{value:.3f}" in text
    for column in ("openmoji", "mix 50:50", "fluent"):
        assert f"{100 * facts['dark'][column]:.1f} %" in text


def test_the_pages_speeds_are_those_of_the_recorded_run() -> None:
    page = (ROOT / "docs" / "text-to-image.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks" / "results" / "text-to-image-h200.json").read_text())["runs"]
    eight = "ours, eight styles at batch 1"
    part = "ours, batch 4, transformer blocks alone"
    number, rows = next((i, run["rows"]) for i, run in reversed(list(enumerate(runs))) if eight in run["rows"])
    blocks = next(run["rows"][part] for run in runs[number:] if part in run["rows"])
    again = next(run["rows"]["ours, batch 4"] for run in runs if "finds on the disk" in run.get("note", ""))
    peer, ours, alone = (rows[name] for name in ("peer, batch 4, bf16 adapter", "ours, batch 4", "peer, batch 1, bf16 adapter"))
    for row in (peer, ours, alone, blocks, rows[eight]):
        assert f"{row['ms']:.1f} ms" in page
        assert f"{row['peak_gib']:.2f} GiB" in page
    assert f"{peer['ms'] / ours['ms']:.2f} × as fast" in page
    assert f"{peer['ms'] / blocks['ms']:.2f} × as fast" in page
    assert f"{8 * alone['ms'] / rows[eight]['ms']:.1f} × as fast" in page
    more = ours["warm_up_s"] - blocks["warm_up_s"]
    assert f"{blocks['warm_up_s']:.0f} s before the first step, convolutions {more:.0f} s more" in page
    assert f"both {again['warm_up_s']:.0f} s in a later process" in page
