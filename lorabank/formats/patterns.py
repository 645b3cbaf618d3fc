"""PEFT's patterns: how `rank_pattern` and `alpha_pattern` give a layer its number, and how numbers by layer become patterns."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T", int, float)


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches the end of `path`, else `default`. Raises re.error for a broken pattern."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def to_patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """A default and patterns that give exactly `values` (path → number) back, whatever the order the patterns are read in.

    The default is the commonest value. Layers of one name that share another value share a pattern, others get their path.
    """
    counts = Counter(values.values())
    default = max(counts, key=lambda value: (counts[value], -value))
    by_leaf: dict[str, set[T]] = defaultdict(set)
    for path, value in values.items():
        by_leaf[path.rpartition(".")[2]].add(value)
    patterns: dict[str, T] = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if len(by_leaf[leaf]) == 1:
            if value != default:
                patterns[re.escape(leaf)] = value
        elif value != default:
            key = re.escape(path)
            nested = any(other.endswith(f".{path}") for other in values)
            patterns[f"^{key}" if nested else key] = value
    return default, dict(sorted(patterns.items()))
