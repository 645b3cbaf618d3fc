"""docs/architectures.md says what the tests over all families know, no more and no less."""

from __future__ import annotations

import re

from tests.bank.families import FAMILIES
from tests.bank.family import Family
from tests.docs.pages import ROOT, cells, code

PAGE = ROOT / "docs" / "architectures.md"
KINDS = {
    "Decoders": "decoder",
    "Mixtures of experts": "mixture of experts",
    "State-space and recurrent": "state-space",
    "Encoders": "encoder",
    "Encoders and decoders": "encoder-decoder",
    "Vision": "vision",
    "Audio": "audio",
    "Text and pictures": "text and pictures",
    "Time series": "time series",
}


def test_every_family_is_listed_under_its_kind() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = {
        KINDS[title]: (int(count), code(names)) for title, count, names in re.findall(r"\*\*(.+?)\*\* \((\d+)\): ([^.]*)\.", text)
    }
    expected: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        expected.setdefault(family.kind, []).append(name)
    assert listed == {kind: (len(names), names) for kind, names in expected.items()}


def _first_cell(family: Family) -> list[str]:
    """What `all-linear` needs beside itself, in words of a configuration."""
    if not family.left:
        return []
    return [*(part for part in family.targets if part != "all-linear"), *family.exclude]


def test_the_limits_are_the_tests() -> None:
    rows = {code(row[0])[0]: row for row in cells(PAGE) if code(row[0])}
    assert list(rows) == [name for name, family in FAMILIES.items() if family.left or family.apart or family.peft]
    for name, (_, linear, apart, peft, why) in rows.items():
        family = FAMILIES[name]
        assert [part.replace("\\|", "|") for part in code(linear)] == _first_cell(family), name
        assert (linear == "nothing left out") == (not family.left), name
        assert apart == ("no" if family.apart else "yes"), name
        assert code(peft) == list(family.peft), name
        assert why != "–" or not (family.left or family.apart), name
