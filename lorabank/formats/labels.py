"""The names of a classifier's labels, which an adapter's metadata has."""

from __future__ import annotations

import json

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter

LABELS = "labels"
"""Key of the metadata: the names as a JSON list, in the order of the head's outputs."""


def label_names(adapter: Adapter) -> list[str] | None:
    """What an adapter with a head of its own says that its labels are called; None where it says nothing, or has no head.

    Raises AdapterFileError for what is no list.
    """
    said = adapter.metadata.get(LABELS)
    if not said or not adapter.modules:
        return None
    try:
        names = json.loads(said)
    except ValueError as error:
        raise AdapterFileError(f"the adapter's names of labels can't be read ({error}). Fetch it again.") from error
    if not isinstance(names, list):
        raise AdapterFileError(f"the adapter's names of labels are a {type(names).__name__}, not a list. Fetch it again.")
    return [str(name) for name in names]
