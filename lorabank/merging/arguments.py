"""What merges and combinations are given."""

from __future__ import annotations

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter


def an_adapter(value: object, call: str) -> Adapter:
    """`value`; raises MergeError where it isn't an adapter."""
    if isinstance(value, Adapter):
        return value
    raise MergeError(
        f"{call}: expected a lorabank.Adapter, got {value!r:.80}. lorabank.Adapter.load(path) reads one from a folder or a file, "
        "bank.adapter(name) takes one from a bank."
    )
