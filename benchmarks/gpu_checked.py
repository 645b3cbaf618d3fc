"""Which checks of its run a row needs: without some no table is made, others are named under it. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]

QUANTIZED = ("fp8", "nf4")
"""Storages of the base whose own check may fail without ending a run."""
REQUIRED = (*QUANTIZED, "packed")
"""Entries of a check without which a row of that kind was never shown; others are younger than some runs."""
FORMS = {
    "joint": "several adapters in one pass",
    "mixed": "adapters of mixed ranks",
    "recompute": "recomputation",
    "offload": "what recomputation starts from kept on the host",
    "twin": "fp8 beside its emulated twin",
}
"""Entry of a check to the form of a pass that it holds to a plain one."""


def refuse_unchecked(run: Row) -> None:
    """Exit where the check of a run of ours, or of what one of its rows ran in, isn't recorded as passed."""
    if run["kind"] in ("peers", "tests"):
        return
    check = run.get("check")
    by_model = run["kind"] in ("families", "experts")
    if not isinstance(check, Mapping) or (not by_model and check.get("passed") is not True):
        _refuse(run, "no check recorded as passed")
    for row in run["rows"]:
        of_row = row["family"] if run["kind"] == "experts" else f"{row.get('family')}-{row.get('tokens')}"
        if by_model and not _family_passed(check.get(of_row), row):
            _refuse(run, f"no check of {row['item']} recorded as passed")
        if run["kind"] == "training":
            wrong = sorted(name for name in _needed(row) if not _passed(check, name, must_be_there=name in REQUIRED))
            if wrong:
                _refuse(run, f"no check of {', '.join(wrong)} recorded as passed, which {row['item']} needs")


def unchecked_forms(run: Row, row: Row) -> list[str]:
    """The forms of FORMS that a row ran in and that its run's check, an older one, doesn't have."""
    check = run["check"]
    missing = {name for name in _needed(row) if name not in check and name in FORMS}
    if "fp8" in _needed(row) and not any(key.startswith("twin_") for key in check["fp8"]):
        missing.add("twin")
    return [name for name in FORMS if name in missing]


def _needed(row: Row) -> Iterator[str]:
    """Entries of a check that a training row needs. A name says the storage too: rows of a stranger may lack the key."""
    yield from {str(row.get("storage")), row["item"].split("-")[0]} & set(QUANTIZED)
    yield from (name for name in ("recompute", "offload") if row.get(name))
    if row.get("packed", 1) > 1:
        yield "packed"
    if row["item"] == "many-64":
        yield "mixed"
    elif row.get("adapters", 1) > 1:
        yield "joint"


def _passed(check: Row, name: str, *, must_be_there: bool) -> bool:
    entry = check.get(name)
    if entry is None:
        return not must_be_there
    return isinstance(entry, Mapping) and entry.get("passed") is True


def _family_passed(entry: object, row: Row) -> bool:
    """Whether all that is compared was within what it may be, as gpu_families.py records it: in parts of that. NaN isn't."""
    if not isinstance(entry, Mapping) or any(name not in entry for name in ("ours", *["peft"] * ("peft_ms" in row))):
        return False
    return all(isinstance(found, Mapping) and found and all(value <= 1 for value in found.values()) for found in entry.values())


def _refuse(run: Row, why: str) -> None:
    sys.exit(f"a {run['kind']} run of {run.get('date')} has {why}: no table is made from it")
