"""The tables of studies are those of their results."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "base_storage"
sys.path.insert(0, str(STUDY))  # a script, which is imported by name

report = importlib.import_module("report")


@pytest.mark.parametrize("name", ["", "gpu"])
def test_the_base_storage_tables_are_those_of_their_results(name: str) -> None:
    document = json.loads((STUDY / "results" / name / "result.json").read_text(encoding="utf-8"))
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert report.with_table(text, document, name) == text, "run python studies/base_storage/report.py"
    document["runs"]["fp8"]["seeds"]["1"]["final"] *= 1.01
    assert report.with_table(text, document, name) != text


def test_many_seeds_have_a_line_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made of the two that were measured, each moved a little."""
    document = json.loads((STUDY / "results" / "result.json").read_text(encoding="utf-8"))
    for name, run in document["runs"].items():
        seeds = run["seeds"]
        for number in range(3, 9):
            seeds[str(number)] = copy.deepcopy(seeds[str(1 + number % 2)])
            seeds[str(number)]["final"] *= 1 + (0.001 * number if name == "fp8" else 0.0)
    (tmp_path / "result.json").write_text(json.dumps(document), encoding="utf-8")
    report.write(tmp_path)
    table = capsys.readouterr().out
    fp8 = report.ratios(document, "fp8")
    assert f"{sum(fp8) / 8:.4f} ± " in table
    assert f"{min(fp8):.4f}, {max(fp8):.4f}" in table
    assert "| bf16 | 2.1940 | " in table
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_the_combining_table_is_that_of_its_result() -> None:
    study = ROOT / "studies" / "combining"
    sys.path.insert(0, str(study))
    table = importlib.import_module("table")
    document = json.loads((study / "results" / "result.json").read_text(encoding="utf-8"))
    text = (study / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, document) == text, "run python studies/combining/table.py"
    document["cases"][-1]["losses"]["long"] *= 1.01
    assert table.with_table(text, document) != text
    methods = {case["method"] for case in document["cases"]}
    assert methods >= {"exact", "svd", "ties", "dare", "magnitude_prune"}


def test_the_tables_of_label_sets_are_those_of_their_results() -> None:
    study = ROOT / "studies" / "text_classification"
    sys.path.insert(0, str(study))
    tables = importlib.import_module("label_tables")
    documents = tables.load()
    text = (study / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(text, documents) == text, "run python studies/text_classification/label_tables.py"
    for name in documents:
        changed = copy.deepcopy(documents)
        key = next(key for key in changed[name][0]["runs"] if key.startswith("full/"))
        for score in changed[name][0]["runs"][key]["test"]:
            changed[name][0]["runs"][key]["test"][score] *= 0.9
        assert tables.with_tables(text, changed) != text, name
