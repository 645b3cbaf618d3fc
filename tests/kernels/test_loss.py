"""The chunked head against the plain definition, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabank.kernels import reference
from lorabank.kernels.logit_shape import LogitShape
from lorabank.kernels.loss import token_logprobs, weighted_nll

V, H = 13, 8


def _inputs(
    tokens: int = 7, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype)
    targets = torch.randint(V, (tokens,), generator=g)
    return hidden, weight, targets, torch.randn(V, generator=g).to(dtype) if bias else None


def _weights(tokens: int) -> Tensor:
    return torch.linspace(0.0, 2.0, tokens) if tokens else torch.zeros(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 6, 7, 8, 100])
def test_token_logprobs(chunk_tokens: int, bias: bool) -> None:
    hidden, weight, targets, bias_V = _inputs(bias=bias)
    upstream = torch.randn(7)
    expected = reference.token_logprobs(hidden, weight, targets, bias_V)
    (dh,) = torch.autograd.grad(expected, hidden, upstream)
    found = token_logprobs(hidden, weight, targets, bias_V, chunk_numbers=chunk_tokens * V)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden, upstream)[0], dh)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_weighted_nll(chunk_tokens: int, bias: bool) -> None:
    hidden, weight, targets, bias_V = _inputs(bias=bias)
    weights = _weights(7)
    expected = reference.token_logprobs(hidden, weight, targets, bias_V)
    (dh,) = torch.autograd.grad(-(weights * expected).sum() * 3, hidden)
    total, logprobs = weighted_nll(hidden, weight, targets, weights, bias_V, chunk_numbers=chunk_tokens * V)
    torch.testing.assert_close(logprobs, expected.detach())
    torch.testing.assert_close(total, -(weights * expected).sum())
    torch.testing.assert_close(torch.autograd.grad(total * 3, hidden)[0], dh)
    assert not logprobs.requires_grad


SHAPES = [
    LogitShape(factor=0.25),
    LogitShape(divisor=3.0),
    LogitShape(cap=2.0),
    LogitShape(factor=0.5, divisor=0.7, cap=1.5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_what_is_done_to_logits(chunk_tokens: int, shape: LogitShape) -> None:
    """Logits here reach ±8, so a cap bends most of them."""
    hidden, weight, targets, bias_V = _inputs(bias=True)
    weights, upstream = _weights(7), torch.randn(7)
    expected = reference.token_logprobs(hidden, weight, targets, bias_V, shape)
    plain = reference.token_logprobs(hidden, weight, targets, bias_V)
    assert (expected - plain).abs().max() > 0.1
    found = token_logprobs(hidden, weight, targets, bias_V, shape=shape, chunk_numbers=chunk_tokens * V)
    torch.testing.assert_close(found, expected)
    (dh,) = torch.autograd.grad(expected, hidden, upstream, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found, hidden, upstream)[0], dh)
    total, logprobs = weighted_nll(hidden, weight, targets, weights, bias_V, shape=shape, chunk_numbers=chunk_tokens * V)
    torch.testing.assert_close(logprobs, expected.detach())
    (dh,) = torch.autograd.grad(-(weights * expected).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], dh)


def test_a_vocabulary_above_the_chunk_goes_token_by_token() -> None:
    hidden, weight, targets, _ = _inputs()
    torch.testing.assert_close(
        token_logprobs(hidden, weight, targets, chunk_numbers=1), reference.token_logprobs(hidden, weight, targets)
    )


def test_no_tokens() -> None:
    hidden, weight, targets, _ = _inputs(tokens=0)
    assert token_logprobs(hidden, weight, targets).shape == (0,)
    total, logprobs = weighted_nll(hidden, weight, targets, _weights(0))
    total.backward()
    assert total == 0
    assert logprobs.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_isnt_finite_reaches_no_other(bad: float) -> None:
    hidden, weight, targets, _ = _inputs()
    poisoned = hidden.detach().clone()
    poisoned[2, 0] = bad
    others = torch.tensor([0, 1, 3, 4, 5, 6])
    for chunk in (2 * V, 100 * V):
        clean, sick = hidden.detach().clone().requires_grad_(), poisoned.clone().requires_grad_()
        for x in (clean, sick):
            token_logprobs(x, weight, targets, chunk_numbers=chunk).sum().backward()
        assert clean.grad is not None
        assert sick.grad is not None
        assert torch.equal(sick.grad[others], clean.grad[others])
        fused = poisoned.clone().requires_grad_()
        total, logprobs = weighted_nll(fused, weight, targets, torch.ones(7), chunk_numbers=chunk)
        total.backward()
        assert fused.grad is not None
        torch.testing.assert_close(fused.grad[others], -clean.grad[others])
        assert logprobs[others].isfinite().all()
        assert not logprobs[2].isfinite()


def test_a_bf16_head_has_fp32_log_probabilities() -> None:
    hidden, weight, targets, _ = _inputs(dtype=torch.bfloat16)
    found = token_logprobs(hidden, weight, targets, chunk_numbers=3 * V)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference.token_logprobs(hidden, weight, targets))
    exact = hidden.detach().float().requires_grad_()
    reference.token_logprobs(exact, weight.float(), targets).sum().backward()
    found.sum().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=0.05, atol=0.05)  # probabilities and dh in bf16: 3 digits


def test_fp32_hidden_states_meet_a_bf16_head_in_its_dtype() -> None:
    hidden, weight, targets, _ = _inputs()
    low = weight.bfloat16()
    expected = reference.token_logprobs(hidden.bfloat16(), low, targets)
    torch.testing.assert_close(token_logprobs(hidden, low, targets), expected)


def test_the_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, bias = _inputs(bias=True)
    assert bias is not None
    weight.requires_grad_()
    bias.requires_grad_()
    token_logprobs(hidden, weight, targets, bias).sum().backward()
    assert weight.grad is None
    assert bias.grad is None


def test_the_loss_is_as_exact_as_log_softmax_on_its_own_logits() -> None:
    """With whole numbers products are exact in any order, so only the softmax is compared."""
    torch.manual_seed(0)
    hidden = torch.randint(-3, 4, (7, H)).float()
    weight = torch.randint(-3, 4, (V, H)).float()
    bias, targets = torch.full((V,), 1e5), torch.randint(V, (7,))
    exact = torch.nn.functional.linear(hidden, weight, bias).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for logprobs in (
        token_logprobs(hidden, weight, targets, bias),
        weighted_nll(hidden, weight, targets, torch.ones(7), bias)[1],
    ):
        torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)
