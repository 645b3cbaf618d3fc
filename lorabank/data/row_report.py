"""`RowReport` and `Splits`: what became of the rows of a task that isn't text generation, and the rows in their splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from lorabank.data.reasons import Reason, dropped_lines, dropped_rows, gather
from lorabank.data.row import RowError
from lorabank.wording import counted

R = TypeVar("R")


class HasOrigin(Protocol):
    """A row that knows its line."""

    @property
    def origin(self) -> str:
        """Where it came from."""
        ...


Known = TypeVar("Known", bound=HasOrigin)


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """Counts over one data set."""

    read: int
    """Rows (or files) in the sources."""
    kept: int
    dropped: Mapping[str, Reason]
    """Why rows were left out."""
    splits: Mapping[str, int]
    """`train`, `val`, `test` to rows."""
    facts: Sequence[str] = ()
    """Sentences on what there is: labels and their numbers, sizes, durations."""
    notes: Mapping[str, Reason] = field(default_factory=dict)
    """Facts that the user should look at, with their rows."""
    what: str = "rows"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a few short sentences, the most important first."""
        one = self.what.removesuffix("s")
        splits = ", ".join(f"{count:,} {name}" for name, count in self.splits.items() if count)
        lines = [f"{counted(self.read, one)} read, {self.kept:,} kept: {splits}"]
        lines += dropped_lines(self.dropped)
        lines += self.facts
        lines += [f"{note}: {counted(rows.count, one)} ({rows.some})" for note, rows in self.notes.items()]
        return lines


def row_report(
    *,
    read: int,
    errors: Iterable[RowError],
    splits: Mapping[str, Sequence[object]],
    facts: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
    what: str = "rows",
) -> RowReport:
    """The report over `splits`. `errors`: one a row that was dropped; `notes`: sentence to the rows it is about."""
    return RowReport(
        read=read,
        kept=sum(map(len, splits.values())),
        dropped=dropped_rows(errors),
        splits={name: len(part) for name, part in splits.items()},
        facts=tuple(facts),
        notes={note: gather(origins) for note, origins in (notes or {}).items()},
        what=what,
    )


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[R]):
    """One data set's rows, ready to be batched."""

    train: Sequence[R]
    val: Sequence[R]
    test: Sequence[R]
    report: RowReport


def in_two_splits(splits: Mapping[str, Sequence[Known]], key: Callable[[Known], str], what: str) -> dict[str, list[str]]:
    """Notes on rows whose key (their `what`) an earlier split has too, where splits are given apart: their scores flatter."""
    keys = {name: {key(row) for row in rows} for name, rows in splits.items()}
    pairs = [(here, there) for i, here in enumerate(splits) for there in list(splits)[:i]]
    found = {
        f"same {what} in {here} and {there}": [row for row in splits[here] if key(row) in keys[there]] for here, there in pairs
    }
    return {note: [row.origin for row in rows] for note, rows in found.items() if rows}
