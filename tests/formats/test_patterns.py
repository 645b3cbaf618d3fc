from __future__ import annotations

import itertools

import pytest

from lorabank.formats.patterns import pattern_value, to_patterns

CASES = [
    {"a.q": 4, "b.q": 4},
    {"a.q": 4, "b.q": 4, "a.v": 8, "b.v": 8},
    {"a.q": 4, "b.q": 8, "c.q": 4},
    {"q": 4, "a.q": 8, "b.a.q": 16, "b.q": 4, "x.b.a.q": 2},
    {"a.0.q+x": 4, "a.1.q+x": 2, "ab0.q+x": 4, "a.0.qx": 9},
    {"layers.1.q": 1, "layers.11.q": 2, "layers.1x1.q": 3, "layers.1.1.q": 4},
]


@pytest.mark.parametrize("values", CASES)
def test_patterns_give_the_same_numbers_back_in_any_order(values: dict[str, int]) -> None:
    default, patterns = to_patterns(values)
    for order in itertools.islice(itertools.permutations(patterns.items()), 200):
        assert {path: pattern_value(dict(order), path, default) for path in values} == values


def test_layers_of_one_name_share_a_pattern() -> None:
    values = {f"layers.{i}.{name}": rank for i in range(9) for name, rank in (("q", 4), ("v", 4), ("down", 8))}
    assert to_patterns(values) == (4, {"down": 8})
