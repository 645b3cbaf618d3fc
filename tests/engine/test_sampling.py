"""Drawing a token: statistics with fixed seeds, nucleus and top-k by their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorabank.engine.sampling import RowSamplers, SamplingConfig
from lorabank.errors import ConfigError

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -math.inf, 0.0])


def _counts(config: SamplingConfig, draws: int = 4000) -> torch.Tensor:
    samplers = RowSamplers(config, list(range(draws)))
    chosen, _ = samplers.choose(LOGITS.repeat(draws, 1), range(draws))
    return torch.bincount(chosen, minlength=len(LOGITS)).double()


def _chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert not counts[expected == 0].any()
    return float(((counts - expected).square() / expected)[expected > 0].sum())


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 5]),
        ({"temperature": 2.0, "top_k": 3}, [0, 2, 3]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 3]),  # 0.57, 0.21 | 0.13, 0.08, 0.03
        ({"temperature": 1.0, "top_p": 0.57}, [0, 3]),  # 0.568 alone is just short of it
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, [0]),  # after top-k the first has 0.63
    ],
)
def test_frequencies_are_the_probabilities(config: dict[str, Any], kept: list[int]) -> None:
    """χ² with at most 4 degrees of freedom stays below 18.5 in all but 0.1 % of the runs; the seeds are fixed."""
    scores = torch.full_like(LOGITS, -math.inf)
    scores[kept] = LOGITS[kept] / config["temperature"]
    assert _chi_square(_counts(SamplingConfig(**config)), scores.softmax(0)) < 18.5


def test_greedy_and_the_logprob_of_the_choice() -> None:
    logits = torch.stack([LOGITS, -LOGITS.nan_to_num(neginf=-3.0)])
    chosen, logprobs = RowSamplers(SamplingConfig(), [0, 1]).choose(logits, [0, 1])
    assert chosen.tolist() == [0, 4]
    assert torch.allclose(logprobs, logits.log_softmax(-1).max(-1).values)
    drawn, at_one = RowSamplers(SamplingConfig(temperature=0.3, top_k=2), [0, 1]).choose(logits, [0, 1])
    assert torch.allclose(
        at_one, logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    )  # of the model, not of the cut distribution


def test_each_rows_draws_are_its_own() -> None:
    config = SamplingConfig(temperature=1.0)
    logits = torch.zeros(3, 50)
    together, apart = RowSamplers(config, [7, 8, 9]), RowSamplers(config, [7, 8, 9])
    for step in range(5):
        rows = [0, 1, 2] if step < 3 else [2]
        whole, _ = together.choose(logits[: len(rows)], rows)
        single = [int(apart.choose(logits[:1], [row])[0]) for row in rows]
        assert whole.tolist() == single


def test_a_row_of_nan_hurts_no_other() -> None:
    config = SamplingConfig(temperature=1.0, top_p=0.9, top_k=3)
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, math.nan)])
    chosen, logprobs = RowSamplers(config, [1, 2]).choose(logits, [0, 1])
    alone, _ = RowSamplers(config, [1]).choose(LOGITS[None], [0])
    assert int(chosen[0]) == int(alone[0])
    assert 0 <= int(chosen[1]) < len(LOGITS)
    assert bool(logprobs[1].isnan())


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"temperature": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingConfig(**bad)
