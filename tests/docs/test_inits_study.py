"""The tables of the study of inits are those of its results."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.docs.pages import ROOT

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
    runs = table.read(STUDY / "results")
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, runs) == text, "run python studies/inits/table.py"
    rates = runs[0]["rates"]
    rates[next(iter(rates))]["validation"]["pissa"] *= 1.01
    assert table.with_table(text, runs) != text
    assert {name for run in runs for rate in run["rates"].values() for name in rate["train"]} >= {
        "uniform", "pissa", "olora", "eva", "loftq", "orthogonal",
    }  # fmt: skip
