"""What a report says of rows: each reason with a count and the first of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorabank.data.row import RowError

MAX_ORIGINS = 5
"""Rows named for each reason or note; the count tells of the rest."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """How many rows something happened to, and the first of them."""

    count: int
    origins: tuple[str, ...]
    """Up to MAX_ORIGINS of them, as `file:line`."""

    @property
    def some(self) -> str:
        """The first few, for a sentence."""
        return ", ".join(self.origins) + (", …" if self.count > len(self.origins) else "")


def gather(origins: Iterable[str]) -> Reason:
    """Count rows and keep the first few names."""
    named = list(origins)
    return Reason(count=len(named), origins=tuple(named[:MAX_ORIGINS]))


def by_reason(errors: Iterable[RowError]) -> dict[str, list[str]]:
    """Reason to all its rows, the commonest reason first."""
    reasons: dict[str, list[str]] = {}
    for error in errors:
        reasons.setdefault(error.reason, []).append(error.origin)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def dropped_rows(errors: Iterable[RowError]) -> dict[str, Reason]:
    """Reason to the rows that were left out for it, the commonest first."""
    return {reason: gather(origins) for reason, origins in by_reason(errors).items()}


def dropped_lines(dropped: Mapping[str, Reason]) -> list[str]:
    """A sentence a reason."""
    return [f"dropped {rows.count:,}: {reason} ({rows.some})" for reason, rows in dropped.items()]
