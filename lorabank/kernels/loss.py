"""Token log-probabilities of a language-model head, in chunks, so that the logits of a whole batch are never held.

Shapes: T tokens, H hidden features, V vocabulary entries. The head's weight is frozen: no gradient is made for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels import onednn

CHUNK_NUMBERS = 2**24
"""Logits held at once: 64 MiB in fp32."""


def _chunks(targets_T: Tensor, weight_VH: Tensor, numbers: int) -> list[slice]:
    """Slices of the tokens, each with at most `numbers` logits (and at least one token)."""
    step = max(1, numbers // max(1, weight_VH.shape[0]))
    return [slice(i, i + step) for i in range(0, len(targets_T), step)]


def _logits(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """fp32 logits of one chunk, a tensor of their own; the product runs in the weight's dtype, like the model's own head."""
    return onednn.linear(hidden_TH.to(weight_VH.dtype), weight_VH, bias_V).float()


def _softmax_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns log p(target) (T,).

    The normaliser is read off the largest probability, which is at least 1/V, so no second tensor of the logits' size is made and
    a target whose probability underflows still has its logarithm.
    """
    top_T = logits_TV.amax(-1)  # without the index that `max` gives: four times as fast
    target_T = logits_TV.gather(1, targets_T[:, None]).squeeze(1)
    torch.softmax(logits_TV, -1, out=logits_TV)
    # in this order a common offset of all logits cancels before anything is rounded
    return target_T - top_T + logits_TV.amax(-1).log()


class _TokenLogprobs(torch.autograd.Function):
    """log p(target), differentiable in the hidden states; backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, bias_V: Tensor | None, numbers: int) -> Tensor:
        out = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        for rows in _chunks(targets_T, weight_VH, numbers):
            out[rows] = _softmax_(_logits(hidden_TH[rows], weight_VH, bias_V), targets_T[rows])
        ctx.numbers = numbers
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, bias_V)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_T,) = grad_outputs
        hidden, weight, targets, bias = ctx.saved_tensors
        dh = torch.empty_like(hidden)
        for rows in _chunks(targets, weight, ctx.numbers):
            probabilities = _logits(hidden[rows], weight, bias)
            _softmax_(probabilities, targets[rows])
            dh[rows] = _hidden_gradient(probabilities, targets[rows], -grad_T[rows], weight)
        return dh, None, None, None, None


class _WeightedNLL(torch.autograd.Function):
    """Σ weight · −log p(target), its gradient made in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        bias_V: Tensor | None,
        numbers: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        dh = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        for rows in _chunks(targets_T, weight_VH, numbers):
            probabilities = _logits(hidden_TH[rows], weight_VH, bias_V)
            logprobs[rows] = _softmax_(probabilities, targets_T[rows])
            if dh is not None:
                dh[rows] = _hidden_gradient(probabilities, targets_T[rows], weights_T[rows], weight_VH)
        if dh is not None:
            ctx.save_for_backward(dh)
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * weights_T).sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        return dh * grad_outputs[0].to(dh.dtype), None, None, None, None, None


def _hidden_gradient(probabilities_TV: Tensor, targets_T: Tensor, scale_T: Tensor, weight_VH: Tensor) -> Tensor:
    """scale · (p − onehot(target)) @ W, writing over the probabilities."""
    probabilities_TV.scatter_add_(1, targets_T[:, None], torch.full_like(targets_T[:, None], -1, dtype=probabilities_TV.dtype))
    # the scale goes onto the short side of the product: H numbers a token, not V
    return onednn.input_grad(probabilities_TV.to(weight_VH.dtype), weight_VH) * scale_T[:, None].to(weight_VH.dtype)


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> Tensor:
    """log p(target | hidden), fp32 (T,), differentiable in `hidden_TH`. Supervised, preference and RL losses stand on it.

    `chunk_numbers`: logits held at once; it changes memory and speed only.
    """
    return _TokenLogprobs.apply(hidden_TH, weight_VH, targets_T, bias_V, chunk_numbers)


def weighted_nll(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> tuple[Tensor, Tensor]:
    """(Σ weight · −log p, log p (T,)): the fast path of `token_logprobs` for the usual loss. Only the sum is differentiable."""
    return _WeightedNLL.apply(hidden_TH, weight_VH, targets_T, weights_T, bias_V, chunk_numbers)
