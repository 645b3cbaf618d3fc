"""Rows that can't be used: refused by name where the user wants to be told of them rather than to lose them."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.config.train import DataConfig
from lorabank.data.reasons import MAX_ORIGINS, by_reason
from lorabank.data.row import NanError, RowError
from lorabank.errors import DataError, Setting
from lorabank.wording import counted

NAMED = 20
"""Rows that a refusal names for each reason: they are to be mended."""
NAN = "NaN, a missing value, in {}, in a column that is used"


def refuse(errors: Sequence[RowError], read: int, data: DataConfig, *, what: str = "rows") -> None:
    """Raise DataError for errors of `read` rows that `data.nan_rows` or `data.bad_rows` says to stop at."""
    nan = [error for error in errors if isinstance(error, NanError)]
    rest = [error for error in errors if not isinstance(error, NanError)]
    if nan and data.nan_rows == "stop":
        raise refusal(nan, read, "data.nan_rows", said=NAN, what=what)
    if rest and data.bad_rows == "stop":
        raise refusal(rest, read, "data.bad_rows", what=what)


def refusal(
    errors: Sequence[RowError],
    read: int,
    setting: str,
    way_out: str = "drop, which leaves them out and counts them",
    *,
    said: str = "{} can't be used",
    what: str = "rows",
) -> DataError:
    """The error that names them all, and what `setting` could be instead."""
    told = said.format(f"{len(errors):,} of {counted(read, what.removesuffix('s'))}")
    return DataError(
        f"data: {told}:{listed(errors, NAMED)}\nCorrect or delete them, or set ", Setting(setting), f" to {way_out}."
    )


def nothing_left(role: str, count: int, errors: Sequence[RowError], *, what: str = "rows") -> DataError:
    """The error for a source without a row that can be used."""
    none = f"none of the {count:,} {what}" if count != 1 else f"not the only {what.removesuffix('s')}"
    return DataError(f"{role} data: {none} can be used:{listed(errors)}")


def listed(errors: Sequence[RowError], most: int = MAX_ORIGINS) -> str:
    """A line a reason, the commonest first: how often, and `most` of the rows."""
    reasons = by_reason(errors).items()
    return "".join(f"\n  - {len(origins):,} × {reason} ({_first(origins, most)})" for reason, origins in reasons)


def _first(origins: Sequence[str], most: int) -> str:
    different = list(dict.fromkeys(origins))  # a picture may have several bad boxes
    return ", ".join(different[:most]) + (", …" if len(different) > most else "")
