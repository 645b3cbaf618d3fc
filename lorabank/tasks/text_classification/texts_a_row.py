"""How many texts a row has that an adapter was trained on: one, or two that are read together. Its metadata says it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from lorabank.formats.adapter import Adapter
from lorabank.tasks.text_classification.rows import ClassRow

TEXTS_KEY = "texts"
"""Of an adapter's metadata: `1` or `2`."""
ONE, TWO = "1", "2"


def texts_of_rows(rows: Iterable[ClassRow]) -> str | None:
    """Of the first row, since a data set's columns are the same for all; None without a row."""
    return next((ONE if row.source.pair is None else TWO for row in rows), None)


def texts_of_adapters(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Adapter to what it says; those that say nothing are left out."""
    return {name: said for name, adapter in adapters.items() if (said := adapter.metadata.get(TEXTS_KEY)) in (ONE, TWO)}


def warn_of_texts(trained: Mapping[str, str], rows: Iterable[ClassRow]) -> None:
    """Warn of adapters that were trained on pairs where the rows are single texts, or the other way round. `trained`: by name."""
    first = next(iter(rows), None)
    if first is None:
        return
    found = texts_of_rows([first])
    others = [name for name, texts in trained.items() if texts != found]
    if not others:
        return
    names = ", ".join(map(repr, others))
    many = "adapters" if len(others) > 1 else "adapter"
    were = "were" if len(others) > 1 else "was"
    if found == ONE:
        what = f"{many} {names} {were} trained on pairs of texts, and these are single texts: what is said of them means little"
        way_out = "Name the column of the second text `text_pair`."
    else:
        what = f"{many} {names} {were} trained on single texts, and these are pairs, which are read together"
        way_out = "Leave the column of the second text out if the first alone is meant."
    warnings.warn(f"{first.origin}: {what}. {way_out}", stacklevel=2)
