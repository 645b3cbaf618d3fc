"""Learning-rate schedules: every entry of the table, and warm-up's edges."""

from __future__ import annotations

import itertools
import math

import pytest

from lorabank.config.train import SCHEDULES as CONFIGURABLE
from lorabank.errors import ConfigError
from lorabank.optim.schedules import SCHEDULES, learning_rate_factor

HALF = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}
QUARTER = {"constant": 1.0, "linear": 0.75, "cosine": 0.5 + math.sqrt(0.5) / 2}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_peak_and_never_rises(name: str) -> None:
    factors = [learning_rate_factor(name, step, 40, 0) for step in range(41)]
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(QUARTER[name])
    assert factors[20] == pytest.approx(HALF[name])
    assert factors[40] == pytest.approx(1.0 if name == "constant" else 0.0)
    assert all(0 <= later <= earlier <= 1 for earlier, later in itertools.pairwise(factors))
    assert factors[39] > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_evenly_without_a_step_at_zero_and_ends_at_the_peak(name: str) -> None:
    factors = [learning_rate_factor(name, step, 20, 4) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx(HALF[name])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 9), (0, 0), (2, 1)])
def test_edges_stay_within_zero_and_one(name: str, total: int, warmup: int) -> None:
    factors = [learning_rate_factor(name, step, total, warmup) for step in range(max(1, total) + 2)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0


def test_a_run_of_one_step_runs_at_the_peak() -> None:
    assert learning_rate_factor("cosine", 0, 1, 0) == 1.0


def test_an_unknown_schedule_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        learning_rate_factor("cosin", 0, 1, 0)


def test_the_configurations_names_are_the_tables() -> None:
    assert set(CONFIGURABLE) == set(SCHEDULES)
