"""Losses over token log-probabilities. One table: `LOSSES`, a name to a plain function.

Each example of a packed row is a row of its own here.

A loss returns one number a row, a *sum* over its tokens: `optim_step` divides by the adapter's own token weights, which keeps
gradient accumulation, retries and joint batches exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """T trained tokens of N rows."""

    logprobs_T: Tensor
    """log p(token), fp32, differentiable."""
    weights_T: Tensor
    """fp32 weight of each token."""
    rows_T: Tensor
    """int64 row of each token in the batch."""
    rows: int
    """N: rows of the batch, those without trained tokens included."""
    reference_logprobs_T: Tensor | None = None
    """The same tokens' log-probabilities under a reference: given, or read off `BASE` rows of the same batch."""

    def per_row(self, values_T: Tensor) -> Tensor:
        """Sum a number a token into a number a row, (N,)."""
        return values_T.new_zeros(self.rows).index_add(0, self.rows_T, values_T)


Loss = Callable[[LossInputs], Tensor]
"""LossInputs → (N,) sums. A row's number must depend on that row alone, or adapters in one batch would disturb one another."""


def nll(inputs: LossInputs) -> Tensor:
    """Weighted negative log-likelihood, nats: Σ −w log p."""
    return inputs.per_row(-inputs.weights_T * inputs.logprobs_T)


def reverse_kl(inputs: LossInputs) -> Tensor:
    """Weighted estimate of KL(p ‖ q), nats, q the reference: Σ w (q/p − 1 − log q/p), never negative.

    Unbiased on tokens drawn from p (the estimator k3 of http://joschu.net/blog/kl-approx.html). Raises ConfigError without a
    reference.
    """
    if inputs.reference_logprobs_T is None:
        raise ConfigError(
            "loss 'reverse_kl' needs reference log-probabilities: pass with_base_references(batch), or reference_logprobs_NL=..."
        )
    log_ratio = inputs.reference_logprobs_T.detach() - inputs.logprobs_T
    return inputs.per_row(inputs.weights_T * (torch.expm1(log_ratio) - log_ratio))


LOSSES: Mapping[str, Loss] = {"nll": nll, "reverse_kl": reverse_kl}
