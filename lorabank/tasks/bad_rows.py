"""Rows that can't be used: refused by name where the user wants to be told of them rather than to lose them."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.config.train import DataConfig
from lorabank.data.report import MAX_ORIGINS
from lorabank.data.row import NanError, RowError
from lorabank.errors import DataError, Setting


def refuse(errors: Sequence[RowError], read: int, data: DataConfig) -> None:
    """Raise DataError for errors of `read` rows that `data.nan_rows` or `data.bad_rows` says to stop at."""
    nan = [error for error in errors if isinstance(error, NanError)]
    rest = [error for error in errors if not isinstance(error, NanError)]
    for setting, what, found, stops in (
        ("nan_rows", "NaN, a missing value, in {}", nan, data.nan_rows == "stop"),
        ("bad_rows", "{} can't be used", rest, data.bad_rows == "stop"),
    ):
        if found and stops:
            counted = what.format(f"{len(found):,} of {read:,} rows")
            raise DataError(
                f"data: {counted}:{_listed(found)}\nCorrect or delete these rows, or set ",
                Setting(f"data.{setting}"),
                " to drop, which leaves them out and counts them.",
            )


def nothing_left(role: str, count: int, errors: Sequence[RowError]) -> DataError:
    """The error for a source without a row that can be used."""
    return DataError(f"{role} data: none of the {count:,} rows can be used:{_listed(errors)}")


def _listed(errors: Sequence[RowError]) -> str:
    reasons: dict[str, list[str]] = {}
    for error in errors:
        reasons.setdefault(error.reason, []).append(error.origin)
    lines = [
        f"\n  - {len(origins):,} × {reason} ({', '.join(origins[:MAX_ORIGINS])}{', …' if len(origins) > MAX_ORIGINS else ''})"
        for reason, origins in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return "".join(lines)
