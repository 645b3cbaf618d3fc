"""The tables of studies are those of their results."""

from __future__ import annotations

import importlib
import json
import sys

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "base_storage"
sys.path.insert(0, str(STUDY))  # a script, which is imported by name

report = importlib.import_module("report")


def test_the_base_storage_table_is_that_of_its_results() -> None:
    document = json.loads((STUDY / "results" / "result.json").read_text(encoding="utf-8"))
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert report.with_table(text, document) == text, "run python studies/base_storage/report.py"
    document["runs"]["fp8"]["seeds"]["1"]["final"] *= 1.01
    assert report.with_table(text, document) != text
