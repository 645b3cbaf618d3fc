"""The tables of the study of spoken digits are those of its results."""

from __future__ import annotations

import copy
import importlib.util
import json
from types import ModuleType

import pytest

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "spoken_digits"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spoken_digits_table", STUDY / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_result(table: ModuleType) -> None:
    document = json.loads((STUDY / "results" / "result.json").read_text(encoding="utf-8"))
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert table.with_table(text, document) == text, "run python studies/spoken_digits/table.py"
    for change in (
        lambda d: d["held_out"]["adapters"]["others"].update(wer_normalized=0.5),
        lambda d: d["joint"]["adapters"]["george"].update(loss=9.0),
        lambda d: d["connected"]["base"].update(digit_errors=0.9),
    ):
        other = copy.deepcopy(document)
        change(other)
        assert table.with_table(text, other) != text


def test_the_conversion_was_held_to_its_runtime() -> None:
    said = json.loads((STUDY / "results" / "conversion.json").read_text(encoding="utf-8"))
    assert said["same_tokens"] == said["of"] == len(said["rows"]) == 24
    assert all(row["same_tokens"] and row["encoder"] < 1e-5 and row["logits"] < 1e-3 for row in said["rows"])
