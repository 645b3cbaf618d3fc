"""What merges and combinations are given."""

from __future__ import annotations

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter, no_adapter


def an_adapter(value: object, call: str) -> Adapter:
    """`value`; raises MergeError where it isn't an adapter."""
    if isinstance(value, Adapter):
        return value
    raise MergeError(no_adapter(value, call))
