"""Choosing the next token of each row: greedily, or at a temperature within a nucleus, from a seed of the row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.config.checks import check_non_negative, check_non_negative_int, check_positive_int
from lorabank.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How `sample` chooses tokens."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Share of probability that the fewest candidates make up (nucleus sampling, arXiv:1904.09751); after `top_k`."""
    top_k: int = 0
    """Number of likeliest candidates; 0: all."""

    def __post_init__(self) -> None:
        check_positive_int("max_new_tokens", self.max_new_tokens)
        check_non_negative("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        check_non_negative_int("top_k", self.top_k)


class RowSamplers:
    """A generator for each row, so that a row draws the same alone and in a batch."""

    def __init__(self, config: SamplingConfig, seeds: Sequence[int]) -> None:
        self._config = config
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits_NV: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Next tokens and their log-probabilities under the model (temperature 1), each (N,), for the rows still running."""
        logprobs = logits_NV.float().log_softmax(-1)
        if self._config.temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            draws = torch.stack([torch.rand((), generator=self._generators[row], dtype=torch.float64) for row in rows])
            tokens = self._draw(logits_NV.float() / self._config.temperature, draws.to(logits_NV.device))
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _draw(self, scores_NV: Tensor, draws_N: Tensor) -> Tensor:
        """One token a row: its place on the cumulative scale of the candidates, likeliest first, that the row's draw falls on."""
        scores, order = scores_NV.sort(dim=-1, descending=True, stable=True)
        if self._config.top_k:
            scores = scores[:, : self._config.top_k]
        probabilities = scores.double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        kept = (cumulative - probabilities < self._config.top_p).sum(-1, keepdim=True).clamp(min=1)
        total = cumulative.gather(1, kept - 1)
        place = torch.searchsorted(cumulative, draws_N[:, None] * total, right=True)
        # a row whose scores are NaN, a broken adapter's, has no candidates and takes place 0: the other rows go on
        return order.gather(1, place.minimum(kept - 1)).squeeze(1)
