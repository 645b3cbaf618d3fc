"""The table and the claim of the study of sign digits are those of its results."""

from __future__ import annotations

import copy
import importlib.util
from types import ModuleType

import pytest

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "sign_digits"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sign_digits_table", STUDY / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_results(table: ModuleType) -> None:
    text, runs = (STUDY / "README.md").read_text(encoding="utf-8"), table.load()
    assert table.with_table(text, runs) == text, "run python studies/sign_digits/table.py"
    other = copy.deepcopy(runs)
    other[0]["test"]["accuracy"] *= 0.9
    other[0]["curve"][-1]["accuracy"] *= 0.9
    assert table.with_table(text, other) != text


def test_a_tenth_of_the_parameters_is_within_a_point_of_full_fine_tuning(table: ModuleType) -> None:
    runs = table.load()
    full, lora = table.chosen(runs, "full"), table.chosen(runs, "lora")
    assert lora[0]["trained_parameters"] <= 0.1 * full[0]["trained_parameters"]
    accuracy = [sum(run["test"]["accuracy"] for run in own) / len(own) for own in (full, lora)]
    assert accuracy[1] >= accuracy[0] - 0.01
    for run in runs:
        assert sum(map(sum, run["confusion"])) == 310
        right = sum(row[i] for i, row in enumerate(run["confusion"]))
        assert right / 310 == pytest.approx(run["test"]["accuracy"])
