"""Adapter names: each becomes a folder's name."""

from __future__ import annotations

import re
from collections.abc import Collection

from lorabank.errors import AdapterNameError

MAX_LENGTH = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_RESERVED_NAMES = ("base", "BASE", "last", "checkpoints")


def check_new_name(name: str, taken: Collection[str]) -> None:
    """Raise AdapterNameError unless `name` can name a new adapter beside those in `taken`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".") or len(name) > MAX_LENGTH:
        raise AdapterNameError(
            f"adapter name {name!r}: expected at most {MAX_LENGTH} letters, digits, '_', '-' or '.', the first no '-' or '.', "
            "the last no '.', since it becomes a folder's name"
        )
    if name in _RESERVED_NAMES:
        raise AdapterNameError(f"adapter name {name!r} is taken by lorabank itself; choose another")
    if name in taken:
        raise AdapterNameError(f"the bank already has an adapter {name!r}. Choose another name, or bank.remove({name!r}) first.")
