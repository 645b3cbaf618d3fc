"""Columns that predictions are written into, beside those of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.data.row import Row
from lorabank.errors import DataError


def refuse_taken(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raise DataError where rows have a column called as one of `names`: what it holds, a reference say, would be lost."""
    for row in rows:
        taken = [name for name in names if name in row.values]
        if taken:
            raise DataError(
                f"{row.origin}: has a column {taken[0]!r}, and what {taken[0]!r} says would be written over it. Rename it, "
                "or name other adapters (--adapters)."
            )
