"""`Row`: one raw row with where it came from; `RowError` and `NanError`: why one row can't be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabank.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row as it was read, before its form is known."""

    values: Mapping[str, Any]
    """Column to value."""
    origin: str
    """`file:line`, or `row N of …` where the source has no lines; counted from 1."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column of numbers to their names, where the source has some (`ClassLabel` of `datasets`); `column.key` in objects."""


class RowError(DataError):
    """One row can't be used. `prepare` counts it under `reason` and goes on; anywhere else it is a DataError."""

    def __init__(self, reason: str, origin: str = "") -> None:
        self.reason = reason
        """Why, in words that equal those of other rows with the same fault."""
        self.origin = origin
        super().__init__(f"{origin}: {reason}" if origin else reason)

    def at(self, origin: str) -> RowError:
        """The same fault with the row's origin filled in."""
        return self if self.origin else RowError(self.reason, origin)


class NanError(RowError):
    """A column that is used is NaN in this row: mostly a slip of the tool that wrote it. `data.nan_rows` says what follows."""

    def __init__(self, column: str, origin: str = "") -> None:
        self.column = column
        super().__init__(f"column {column!r} holds NaN", origin)

    def at(self, origin: str) -> NanError:
        """The same with the row's origin filled in."""
        return self if self.origin else NanError(self.column, origin)


def typical(rows: Sequence[Row]) -> Row:
    """A row that has the columns of most: the first with those alone, else with more, else the first there is. `rows`: not empty.

    What the columns of a source are isn't for its first row to say, which may lack one.
    """
    counts = Counter(name for row in rows for name in row.values)
    usual = {name for name, count in counts.items() if 2 * count > len(rows)}
    alone = next((row for row in rows if row.values.keys() == usual), None)
    return alone or next((row for row in rows if row.values.keys() >= usual), rows[0])


def unusual(row: Row, usual: Row, read: Collection[str | None] = ()) -> tuple[str, ...]:
    """Columns of a row that the typical one lacks, so that nobody reads them, but for those that are `read` where they are."""
    return tuple(name for name in row.values if name not in usual.values and name not in read)


def unread_note(columns: Collection[str]) -> str:
    """What is said of rows with such columns."""
    return f"with the {'column' if len(columns) == 1 else 'columns'} {quoted(columns)}, which most rows lack: not read"


def quoted(names: Collection[str]) -> str:
    """Names of columns as messages have them."""
    return ", ".join(map(repr, names)) or "no columns"
