"""What is measured of written texts and forms: ROUGE, BLEU and chrF by lorabank's scorers, and slots word for word."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorabank.training.scorers import SCORERS, score

sys.path.insert(0, str(Path(__file__).parent))
from e2e import slots

FIGURE = re.compile(r"£\s?\d+(?:\s?-\s?\d+)?|\d+ out of \d+")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "figures": ("priceRange", "customer rating"),
    "names": ("name", "near"),
    "kind and food": ("eatType", "food"),
    "area": ("area",),
}
"""Groups of slots whose values stand in a text word for word, or don't."""


def said(text: str, value: str) -> bool:
    """Whether a text has a value, upper and lower case and spaces aside."""
    return _plain(value) in _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower()).replace("£ ", "£")


def slot_match(forms: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Share of each group's slots that the text has word for word; `figures`: of prices in pounds and ratings of 5 alone.

    `wrong figure`: share of texts with a price in pounds or a rating of 5 that their form doesn't have.
    """
    hits: dict[str, list[bool]] = {group: [] for group in GROUPS}
    wrong = []
    for form, text in zip(forms, texts, strict=True):
        own = slots(form)
        for group, names in GROUPS.items():
            values = [own[name] for name in names if name in own]
            hits[group] += [said(text, value) for value in values if group != "figures" or re.search(r"£|out of", value)]
        wrong.append(any(not said(form, figure) for figure in FIGURE.findall(text)))
    found = {group: sum(each) / len(each) for group, each in hits.items() if each}
    return {**found, "wrong figure": sum(wrong) / len(wrong)}


def form_match(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """`f1`, `precision`, `recall` of slots with their values over all rows; `exact`: share of rows with all of them and no other.

    And the recall of each slot.
    """
    right, given, there, exact = 0, 0, 0, 0
    by_slot: dict[str, list[bool]] = {}
    for mine, own in zip(map(slots, written), map(slots, wanted), strict=True):
        right += len(mine.items() & own.items())
        given, there, exact = given + len(mine), there + len(own), exact + (mine == own)
        for name, value in own.items():
            by_slot.setdefault(name, []).append(mine.get(name) == value)
    precision, recall = right / max(1, given), right / there
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    slot = {f"recall of {name}": sum(each) / len(each) for name, each in sorted(by_slot.items())}
    return {"f1": f1, "precision": precision, "recall": recall, "exact": exact / len(written), **slot}


def all_scores(task: str, sources: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of what was written for `sources`; `task` as in e2e.py."""
    found = score({name: SCORERS[name] for name in ("rouge", "bleu", "chrf")}, texts, references)
    own = form_match(texts, [each[0] for each in references]) if task.startswith("form") else slot_match(sources, texts)
    return {**found, **own}
