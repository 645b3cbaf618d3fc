"""What a bank's hooks are in a copy or a pickle of its model, which is the plain base: nothing."""

from __future__ import annotations

from typing import Any


def nothing(*args: Any) -> None:
    """A hook that does nothing."""
    return


def inert() -> Any:
    """What a hook's `__reduce__` names as its maker."""
    return nothing
