"""Words that messages and tables share."""

from __future__ import annotations


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`, `1,200 rows`; `many` where an s at the end doesn't make the plural."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
