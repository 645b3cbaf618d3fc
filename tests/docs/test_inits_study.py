"""The study of inits: its tables are those of its results, and one part that fails costs no other."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.training.tiny import tiny_model, tiny_tokenizer

STUDY = ROOT / "studies" / "inits"


def table_module() -> ModuleType:
    """By its path: other studies have a `table.py` too."""
    spec = importlib.util.spec_from_file_location("inits_table", STUDY / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results() -> None:
    table = table_module()
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    for name in table.MARKS:
        assert table.with_table(text, table.read(STUDY / "results" / name), name) == text, "run python studies/inits/table.py"
    runs = table.read(STUDY / "results")
    rates = runs[0]["rates"]
    rates[next(iter(rates))]["validation"]["pissa"] *= 1.01
    assert table.with_table(text, runs) != text
    assert {name for run in runs for rate in run["rates"].values() for name in rate["train"]} >= {
        "uniform", "pissa", "olora", "eva", "loftq", "orthogonal",
    }  # fmt: skip


def run_of(seed: int, losses: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A run whose validation losses are these, by rate and init; training losses are a tenth higher."""
    rates = {rate: {"train": {n: [1.1 * v] * 2 for n, v in found.items()}, "validation": found} for rate, found in losses.items()}
    return {"base": "fp32", "machine": "a machine", "seed": seed, "rates": rates}


def test_seeds_are_told_as_mean_and_range_and_each_init_has_its_best_rate() -> None:
    table = table_module()
    nan = float("nan")
    runs = [
        run_of(1, {"0.001": {"uniform": 2.0, "pissa": 3.0, "eva": 1.0}, "0.0001": {"uniform": 2.5, "pissa": 1.5}}),
        run_of(2, {"0.001": {"uniform": 1.0, "pissa": 3.0, "eva": nan}, "0.0001": {"uniform": 2.5, "pissa": 1.25, "eva": 2.0}}),
    ]
    lines = table.table(runs, full=False).splitlines()
    assert lines[0] == "Base in fp32, a machine, 2 seeds: validation loss by learning rate."
    assert "| `uniform` | 2.5000 | **1.5000** | 0.001 | 1.5000 (1.0000 to 2.0000) | 1.000 |" in lines
    # its best beside the plain start's best, seed by seed: 1.5 / 2 and 1.25 / 1
    assert "| `pissa` | **1.3750** | 3.0000 | 0.0001 | 1.3750 (1.2500 to 1.5000) | 1.000 (0.750 to 1.250) |" in lines
    assert "| `eva` | – | – | – | – | – |" in lines, "no rate has a number for every seed"
    assert "| `pissa` | 0.550 (0.500 to 0.600) | 2.250 (1.500 to 3.000) |" in lines
    assert "| `eva` | 0.800 | " in "\n".join(lines), "what one seed alone has is shown beside the plain start"
    assert "| `uniform` | 2.750 | 2.750 | 2.7500 | " in table.table(runs)


@pytest.mark.slow
@pytest.mark.long
def test_an_init_that_fails_costs_no_other(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, str(STUDY / "run.py"), "--model", str(tmp_path / "tiny"), "--output", str(tmp_path), "--rank", "3"]
    command += ["--bases", "fp32", "--seeds", "1", "--steps", "2", "--rates", "1e-3", "--validation-rows", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    run = json.loads((tmp_path / "fp32-1.json").read_text(encoding="utf-8"))
    assert "'orthogonal' needs an even rank" in run["starts"]["orthogonal"]["failed"]
    assert set(run["rates"]["0.001"]["train"]) == {"uniform", "pissa", "olora", "eva"}
    assert run["settings"]["model"] == "tiny" and run["settings"]["device"] == "cpu" and run["machine"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "fp32, seed 1: all there" in again.stdout
    other = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True, env=environment, check=False)
    assert "holds results of" in other.stderr and json.loads((tmp_path / "fp32-1.json").read_text(encoding="utf-8")) == run
