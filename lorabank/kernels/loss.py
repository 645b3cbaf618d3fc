"""Token log-probabilities of a language-model head, in chunks, so that the logits of a whole batch are never held.

What is done with one chunk is a `Path`: plain torch, or on a GPU the kernel in gpu/loss.py.

Shapes: T tokens, H hidden features, V vocabulary entries. The head's weight is frozen: no gradient is made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels import onednn
from lorabank.kernels.gpu import runtime
from lorabank.kernels.logit_shape import LogitShape

CHUNK_NUMBERS = 2**24
"""Logits held at once by the plain path: 64 MiB in fp32."""


class Path(NamedTuple):
    """A way to work through one chunk, and the size of chunk that suits it."""

    chunk: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, LogitShape | None], tuple[Tensor, Tensor | None]]
    """(hidden_TH, weight_VH, targets_T, bias_V, scale_T, what is done to logits) → (log p, scale · d(−log p)/d hidden; None
    without a scale): without a shape the latter is scale · (p − onehot(target)) @ W."""
    numbers: int
    """Logits held at once."""
    multiple: int
    """A chunk has a multiple of this many tokens, if it may have as many."""


def _chunks(tokens: int, vocabulary: int, path: Path) -> list[slice]:
    """Slices of the tokens, each with at most `path.numbers` logits (and at least one token)."""
    step = max(1, path.numbers // max(1, vocabulary))
    step -= step % path.multiple if step > path.multiple else 0
    return [slice(i, i + step) for i in range(0, tokens, step)]


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


def _hidden_gradient(
    probabilities_TV: Tensor, targets_T: Tensor, scale_T: Tensor, weight_VH: Tensor, bend_TV: Tensor | None
) -> Tensor:
    """scale · (p − onehot(target)) · bend @ W, writing over the probabilities."""
    probabilities_TV.scatter_add_(1, targets_T[:, None], torch.full_like(targets_T[:, None], -1, dtype=probabilities_TV.dtype))
    if bend_TV is not None:
        probabilities_TV.mul_(bend_TV)
    # the scale goes onto the short side of the product: H numbers a token, not V
    return onednn.input_grad(probabilities_TV.to(weight_VH.dtype), weight_VH) * scale_T[:, None].to(weight_VH.dtype)


def plain_chunk(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None,
    scale_T: Tensor | None,
    shape: LogitShape | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One chunk in torch, with its logits in fp32."""
    probabilities, bend, slope = _logits(hidden_TH, weight_VH, bias_V), None, 1.0
    if shape is not None:
        probabilities, slope = shape(probabilities), shape.slope
        bend = None if scale_T is None else shape.bend(probabilities)
    logprobs = _softmax_(probabilities, targets_T)
    return logprobs, None if scale_T is None else _hidden_gradient(probabilities, targets_T, scale_T * slope, weight_VH, bend)


PLAIN = Path(plain_chunk, numbers=CHUNK_NUMBERS, multiple=1)


def triton_path() -> Path:
    """The path through the Triton kernel, where `runtime.available`. Triton is imported here and not before."""
    from lorabank.kernels.gpu import loss as gpu

    return Path(gpu.chunk, numbers=gpu.CHUNK_NUMBERS, multiple=gpu.CHUNK_MULTIPLE)


def best_path(hidden_TH: Tensor, weight_VH: Tensor) -> Path:
    """The fastest path for these; on a CPU the plain one, also where Triton's interpreter could run the other."""
    suits = hidden_TH.is_cuda and weight_VH.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return triton_path() if suits and runtime.available(hidden_TH.device) else PLAIN


class _TokenLogprobs(torch.autograd.Function):
    """log p(target), differentiable in the hidden states; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        bias_V: Tensor | None,
        path: Path,
        shape: LogitShape | None,
    ) -> Tensor:
        out = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        for rows in _chunks(len(targets_T), len(weight_VH), path):
            out[rows], _ = path.chunk(hidden_TH[rows], weight_VH, targets_T[rows], bias_V, None, shape)
        ctx.path, ctx.shape = path, shape
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, bias_V)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_T,) = grad_outputs
        hidden, weight, targets, bias = ctx.saved_tensors
        dh = torch.empty_like(hidden)
        for rows in _chunks(len(targets), len(weight), ctx.path):
            _, dh[rows] = ctx.path.chunk(hidden[rows], weight, targets[rows], bias, -grad_T[rows], ctx.shape)
        return dh, None, None, None, None, None


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
        path: Path,
        shape: LogitShape | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        dh = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(targets_T), len(weight_VH), path):
            scale = None if dh is None else weights_T[rows]
            logprobs[rows], dh_rows = path.chunk(hidden_TH[rows], weight_VH, targets_T[rows], bias_V, scale, shape)
            if dh is not None and dh_rows is not None:
                dh[rows] = dh_rows
        if dh is not None:
            ctx.save_for_backward(dh)
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * weights_T).sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        return dh * grad_outputs[0].to(dh.dtype), None, None, None, None, None, None


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    shape: LogitShape | None = None,
    chunk_numbers: int | None = None,
    path: Path | None = None,
) -> Tensor:
    """log p(target | hidden), fp32 (T,), differentiable in `hidden_TH`. Supervised, preference and RL losses stand on it.

    `shape`: what the model does to its head's logits.
    `chunk_numbers`: logits held at once, None for what suits the path; it changes memory and speed only.
    `path`: how a chunk is done; None for the fastest that runs here.
    """
    return _TokenLogprobs.apply(hidden_TH, weight_VH, targets_T, bias_V, _sized(path, chunk_numbers, hidden_TH, weight_VH), shape)


def weighted_nll(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    shape: LogitShape | None = None,
    chunk_numbers: int | None = None,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ weight · −log p, log p (T,)): the fast path of `token_logprobs` for the usual loss. Only the sum is differentiable."""
    path = _sized(path, chunk_numbers, hidden_TH, weight_VH)
    return _WeightedNLL.apply(hidden_TH, weight_VH, targets_T, weights_T, bias_V, path, shape)


def _sized(path: Path | None, numbers: int | None, hidden_TH: Tensor, weight_VH: Tensor) -> Path:
    path = path or best_path(hidden_TH, weight_VH)
    return path if numbers is None else path._replace(numbers=numbers)
