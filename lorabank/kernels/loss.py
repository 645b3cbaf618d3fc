"""Token log-probabilities of a language-model head, in chunks, so that the logits of a whole batch are never held.

Shapes: T tokens, H hidden features, V vocabulary entries. The head's weight is frozen: no gradient is made for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 2**24
"""Logits held at once: 64 MiB in fp32."""


def _chunks(tokens: int, vocabulary: int) -> range:
    return range(0, tokens, max(1, CHUNK_NUMBERS // max(1, vocabulary)))


def _step(tokens: int, vocabulary: int) -> int:
    return _chunks(tokens, vocabulary).step


def _logits(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """fp32 logits of one chunk; the product runs in the weight's dtype, like the model's own head."""
    return F.linear(hidden_TH.to(weight_VH.dtype), weight_VH, bias_V).float()


class _TokenLogprobs(torch.autograd.Function):
    """log p(target), differentiable in the hidden states; backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, bias_V: Tensor | None) -> Tensor:
        out = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        norm = torch.empty_like(out)
        step = _step(*_sizes(targets_T, weight_VH))
        for i in _chunks(*_sizes(targets_T, weight_VH)):
            logits = _logits(hidden_TH[i : i + step], weight_VH, bias_V)
            norm[i : i + step] = logits.logsumexp(-1)
            out[i : i + step] = logits.gather(1, targets_T[i : i + step, None]).squeeze(1) - norm[i : i + step]
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, bias_V, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, bias, norm = ctx.saved_tensors
        dh = torch.empty_like(hidden)
        step = _step(*_sizes(targets, weight))
        for i in _chunks(*_sizes(targets, weight)):
            rows = slice(i, i + step)
            dlogits = _logits(hidden[rows], weight, bias).sub_(norm[rows, None]).exp_()
            dh[rows] = _hidden_gradient(dlogits, targets[rows], -grad_T[rows], weight)
        return dh, None, None, None


class _WeightedNLL(torch.autograd.Function):
    """Σ weight · −log p(target), its gradient made in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        dh = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        step = _step(*_sizes(targets_T, weight_VH))
        for i in _chunks(*_sizes(targets_T, weight_VH)):
            rows = slice(i, i + step)
            logits = _logits(hidden_TH[rows], weight_VH, bias_V)
            norm = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets_T[rows, None]).squeeze(1) - norm
            if dh is not None:
                probabilities = logits.sub_(norm[:, None]).exp_()
                dh[rows] = _hidden_gradient(probabilities, targets_T[rows], weights_T[rows], weight_VH)
        if dh is not None:
            ctx.save_for_backward(dh)
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * weights_T).sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_logprobs: Tensor) -> tuple[Any, ...]:
        (dh,) = ctx.saved_tensors
        return dh * grad_total.to(dh.dtype), None, None, None, None


def _sizes(targets_T: Tensor, weight_VH: Tensor) -> tuple[int, int]:
    return len(targets_T), weight_VH.shape[0]


def _hidden_gradient(probabilities_TV: Tensor, targets_T: Tensor, scale_T: Tensor, weight_VH: Tensor) -> Tensor:
    """scale · (p − onehot(target)) @ W, writing over the probabilities."""
    probabilities_TV.scatter_add_(1, targets_T[:, None], torch.full_like(targets_T[:, None], -1, dtype=probabilities_TV.dtype))
    return probabilities_TV.mul_(scale_T[:, None].to(probabilities_TV.dtype)).to(weight_VH.dtype) @ weight_VH


def token_logprobs(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """log p(target | hidden), fp32 (T,), differentiable in `hidden_TH`. Supervised, preference and RL losses stand on it."""
    return _TokenLogprobs.apply(hidden_TH, weight_VH, targets_T, bias_V)


def weighted_nll(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Σ weight · −log p, log p (T,)): the fast path of `token_logprobs` for the usual loss. Only the sum is differentiable."""
    return _WeightedNLL.apply(hidden_TH, weight_VH, targets_T, weights_T, bias_V)
