"""`class_names`: what numbers in columns stand for, by the features that the datasets library notes, in Parquet files as well."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

METADATA_KEY = b"huggingface"
"""Under which a Parquet file's schema has the features of its columns."""
_LISTS = ("List", "LargeList", "Sequence")


def class_names(features: Any) -> dict[str, list[str]]:
    """Column to the names of its numbers, or of those in its lists; of a column of objects `column.key`.

    `features`: as `datasets.Features.to_dict` has them.
    """
    return dict(_named(features, "")) if isinstance(features, Mapping) else {}


def class_names_noted(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The same from a Parquet file's metadata; nothing where another tool wrote it."""
    try:
        noted = json.loads((metadata or {}).get(METADATA_KEY, b"{}"))
    except (ValueError, RecursionError):
        return {}
    info = noted.get("info") if isinstance(noted, Mapping) else None
    return class_names(info.get("features")) if isinstance(info, Mapping) else {}


def _named(feature: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(feature, Sequence) and not isinstance(feature, str):  # a list of one feature is that of its items
        for inner in feature:
            yield from _named(inner, path)
    if not isinstance(feature, Mapping):
        return
    kind, names = feature.get("_type"), feature.get("names")
    if kind == "ClassLabel" and isinstance(names, list):
        yield path, list(map(str, names))
    elif kind in _LISTS:
        yield from _named(feature.get("feature"), path)
    elif not isinstance(kind, str):  # an object of columns, of which one may be called as it likes
        for column, inner in feature.items():
            yield from _named(inner, f"{path}.{column}" if path else str(column))
