"""Adapter names: each becomes a folder's name."""

from __future__ import annotations

from collections.abc import Collection

from lorabank.config.checks import check_adapter_name
from lorabank.errors import AdapterNameError


def check_new_name(name: str, taken: Collection[str]) -> None:
    """Raise AdapterNameError unless `name` can name a new adapter beside those in `taken`."""
    check_adapter_name(name)
    if name in taken:
        raise AdapterNameError(f"the bank already has an adapter {name!r}. Choose another name, or bank.remove({name!r}) first.")
