"""Choosing the next token of each row: greedily, or at a temperature within a nucleus, from a seed of the row's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.config.checks import check_non_negative, check_positive_int
from lorabank.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How `sample` chooses tokens."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Smallest share of probability that the candidates make up (nucleus sampling)."""
    top_k: int = 0
    """Number of candidates; 0: all."""

    def __post_init__(self) -> None:
        check_positive_int("max_new_tokens", self.max_new_tokens)
        check_non_negative("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected a whole number ≥ 0, got {self.top_k!r}")


class RowSamplers:
    """A generator for each row, so that a row draws the same alone and in a batch."""

    def __init__(self, config: SamplingConfig, seeds: list[int]) -> None:
        self._config = config
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits_NV: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Next tokens and their log-probabilities under the model (temperature 1), each (N,), for the rows still running."""
        logprobs = logits_NV.float().log_softmax(-1)
        if self._config.temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            draws = torch.stack([torch.rand((), generator=self._generators[row]) for row in rows])
            tokens = self._draw(logits_NV.float() / self._config.temperature, draws.to(logits_NV.device))
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _draw(self, scores_NV: Tensor, draws_N: Tensor) -> Tensor:
        probabilities, order = scores_NV.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        keep = before < self._config.top_p
        if self._config.top_k:
            keep[:, self._config.top_k :] = False
        kept = (probabilities * keep).double()
        cumulative = kept.cumsum(-1)
        place = torch.searchsorted(cumulative, (draws_N.double() * cumulative[:, -1])[:, None], right=True)
        place = place.clamp(max=keep.sum(-1, keepdim=True) - 1)
        return order.gather(1, place).squeeze(1)
