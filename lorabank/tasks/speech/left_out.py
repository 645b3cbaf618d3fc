"""What `predict` says of recordings or texts that it couldn't use."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.data.reasons import MAX_ORIGINS
from lorabank.data.row import RowError


def left_out(dropped: Sequence[RowError]) -> str:
    """A sentence that names the first of them, behind a space; "" where there are none."""
    some = f"{'; '.join(map(str, dropped[:MAX_ORIGINS]))}{'; …' if len(dropped) > MAX_ORIGINS else ''}"
    return f" {len(dropped)} left out: {some}." if dropped else ""
