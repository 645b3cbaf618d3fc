"""The study of forms and descriptions: its pages are those of its results, and its scores count what they say."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
from types import ModuleType

import pytest

from tests.docs.pages import ROOT

STUDY = ROOT / "studies" / "forms"
FORM = "name[The Mill], eatType[pub], priceRange[£20-25], customer rating[3 out of 5], near[Café Rouge]"


def _load(name: str) -> ModuleType:
    """By its path: other studies have a `table.py` too."""
    spec = importlib.util.spec_from_file_location(f"forms_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scripts import `e2e` by name, as scripts do."""
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.delitem(sys.modules, "e2e", raising=False)


def test_the_pages_are_those_of_the_results() -> None:
    table = _load("table")
    document = json.loads((STUDY / "results" / "result.json").read_text(encoding="utf-8"))
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert table.with_tables(text, document["runs"]) == text, "run python studies/forms/table.py"
    assert table.samples(document) == (STUDY / "samples.md").read_text(encoding="utf-8"), "run python studies/forms/table.py"
    for task, score in (("figures", "figures"), ("form", "f1"), ("form", "recall of area"), ("words", "bleu")):
        runs = copy.deepcopy(document["runs"])
        runs["base"]["test"][task][score] += 0.5
        assert table.with_tables(text, runs) != text, score


def test_figures_are_counted_word_for_word() -> None:
    scores = _load("scores")
    good = "The Mill is a pub near café  rouge. It costs £ 20-25 and has 3 out of 5."
    assert scores.slot_match([FORM], [good]) == {"figures": 1.0, "names": 1.0, "kind and food": 1.0, "wrong figure": 0.0}
    bad = "The Mill is a place near Café Sicilia. It costs £20-25 and has 5 out of 5."
    assert scores.slot_match([FORM], [bad]) == {"figures": 0.5, "names": 0.5, "kind and food": 0.0, "wrong figure": 1.0}
    words = "name[The Mill], priceRange[cheap], customer rating[5 out of 5]"
    assert scores.slot_match([words], ["The Mill has 5 out of 5."])["figures"] == 1.0  # a price in words is none


def test_a_form_is_right_slot_by_slot() -> None:
    scores = _load("scores")
    found = scores.form_match([FORM, "near[B], name[A]"], [FORM, "name[A], near[B]"])
    assert (found["f1"], found["exact"], found["recall of near"]) == (1.0, 1.0, 1.0)
    found = scores.form_match(["name[A], food[French]"], ["name[A], food[Indian], area[riverside]"])
    assert (found["precision"], found["recall"], found["exact"]) == (0.5, 1 / 3, 0.0)
    assert scores.form_match(["nothing of the kind"], [FORM])["f1"] == 0.0


def test_the_base_sees_no_figures_and_swapped_names_stand_in_both() -> None:
    data = _load("e2e")
    plain = "name[The Mill], food[Chinese], priceRange[cheap]"
    pairs = [
        data.Pair(form=FORM, text="The Mill is a pub."),
        data.Pair(form=plain, text="The Mill has 4 stars."),
        data.Pair(form=plain, text="The Mill is cheap and Chinese."),
    ]
    (kept,) = data.for_base(pairs)
    assert kept is pairs[2]
    made = data.swapped(kept, {"name": ["Cocum"], "food": ["French"]}, random.Random(3))
    assert made == data.Pair(form="name[Cocum], food[French], priceRange[cheap]", text="Cocum is cheap and French.")


def test_no_form_lands_in_two_parts() -> None:
    data = _load("e2e")
    prices = ("cheap", "£20-25")
    pairs = [
        data.Pair(form=f"name[{i}], priceRange[{price}]", text=str(j)) for i in range(20) for price in prices for j in range(3)
    ]
    train, val = data.split(pairs)
    assert not {pair.form for pair in train} & {pair.form for pair in val}
    assert len(train) + len(val) == len(pairs)
    assert sorted({pair.has_figures for pair in val}) == [False, True]
