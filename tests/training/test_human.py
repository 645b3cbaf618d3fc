"""Numbers as people read them."""

from __future__ import annotations

import pytest

from lorabank.training import human


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (42.4, "42.4"),
        (999, "999"),
        (999.9, "1 k"),
        (1234, "1.23 k"),
        (134515008, "135 M"),
        (8e9, "8 B"),
        (float("inf"), "–"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert human.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0s"),
        (2.34, "2.3s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (7500, "2h 05m"),
        (2.7e5, "3d 3h"),
        (-1, "–"),
        (float("nan"), "–"),
    ],
)
def test_duration(value: float, text: str) -> None:
    assert human.duration(value) == text


def test_the_others() -> None:
    assert [human.rate(value) for value in (5.37e-4, 1e-5, 0, 2)] == ["5.37e-4", "1e-5", "0", "2e0"]
    assert [human.size(value) for value in (900, 3 * 2**20, 1.9 * 2**30, 812 * 2**20)] == ["1 kB", "3.0 MB", "1.9 GB", "812 MB"]
    assert human.share(1.22e6, 134.5e6) == "0.91 %"
    assert [human.score(*pair) for pair in (("loss", 1.25), ("bleu", 4.2), ("perplexity", 12345.6), ("rouge", 0.4))] == [
        "1.250",
        "4.2",
        "12,346",
        "0.400",
    ]
