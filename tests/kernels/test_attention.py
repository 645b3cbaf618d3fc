"""attention.c against torch's attention, outputs and gradients, in every width of vector."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorabank.kernels.native import attention
from lorabank.kernels.native import library as native_library

pytestmark = pytest.mark.skipif(
    native_library.loaded() is None, reason="no C compiler here, or no OpenMP runtime that torch loads"
)
LAYOUTS = ("heads outside", "heads inside", "a slice of a wider tensor", "expanded")


def heads(rows: int, count: int, tokens: int, features: int, layout: str = "heads inside") -> Tensor:
    """Random (B, H, T, D)."""
    if layout == "heads outside":
        return torch.randn(rows, count, tokens, features)
    if layout == "a slice of a wider tensor":
        return torch.randn(rows, tokens, count, 2 * features)[..., features:].transpose(1, 2)
    if layout == "expanded":
        return torch.randn(1, tokens, count, features).expand(rows, -1, -1, -1).transpose(1, 2)
    return torch.randn(rows, tokens, count, features).transpose(1, 2)


def results(inputs: list[Tensor], dout_BHTD: Tensor, *, ours: bool, causal: bool, scale: float) -> list[Tensor]:
    """Output (B, H, T, D), dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    if ours:
        assert attention.suits(q, k, v)
        out = attention.attention(q, k, v, scale=scale, causal=causal).transpose(1, 2)
    else:
        k_, v_ = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q.double(), k_.double(), v_.double(), is_causal=causal, scale=scale).float()
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout_BHTD)]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 40), st.integers(60, 140)),
    features=st.sampled_from([32, 64, 96]),
    causal=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    scale=st.sampled_from([0.125, 1.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_torchs_attention(
    library: ctypes.CDLL,
    rows: int,
    groups: int,
    shared: int,
    tokens: int,
    features: int,
    causal: bool,
    layouts: tuple[str, ...],
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q = heads(rows, groups * shared, tokens, features, layouts[0])
    k, v = (heads(rows, groups, tokens, features, layout) for layout in layouts[1:3])
    dout = heads(rows, groups * shared, tokens, features, layouts[3])
    mine = results([q, k, v], dout, ours=True, causal=causal, scale=scale)
    torchs = results([q, k, v], dout, ours=False, causal=causal, scale=scale)
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_large_scores_and_a_key_far_below_the_rest(library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(1, 2, 20, 32) for _ in range(3))
    q, k = q * 30, k.clone()
    k[:, :, 5] = -k[:, :, 6] * 40
    dout = heads(1, 2, 20, 32)
    mine = results([q, k, v], dout, ours=True, causal=True, scale=1.0)
    torchs = results([q, k, v], dout, ours=False, causal=True, scale=1.0)
    assert mine[0].isfinite().all()
    torch.testing.assert_close(mine[0], torchs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_threads_change_nothing(library: ctypes.CDLL, causal: bool) -> None:
    torch.manual_seed(0)
    inputs, dout = [heads(2, n, 70, 64) for n in (4, 2, 2)], heads(2, 4, 70, 64)
    one = results(inputs, dout, ours=True, causal=causal, scale=0.125)
    torch.set_num_threads(2)  # the package's fixture sets one thread
    try:
        two = results(inputs, dout, ours=True, causal=causal, scale=0.125)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_row_that_isnt_finite_stays_alone(library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 2, 20, 32) for _ in range(3))
    clean = attention.attention(q, k, v, scale=1.0, causal=True)
    for x in (q, k, v):
        bad = x.clone()
        bad[0, :, 11] = float("nan")
        found = attention.attention(*(bad if x is y else y for y in (q, k, v)), scale=1.0, causal=True)
        assert torch.equal(found[1], clean[1])
        assert torch.equal(found[0, :8], clean[0, :8])  # nor does it reach tokens well before it
        assert found[0, 11].isnan().all()


@pytest.mark.parametrize("form", [lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2), lambda t: t.double()])
def test_what_was_saved_may_come_back_in_another_form(form: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs, dout = [heads(2, n, 20, 32) for n in (4, 2, 2)], heads(2, 4, 20, 32)
    expected = results(inputs, dout, ours=True, causal=True, scale=0.2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, form):
        found = results(inputs, dout, ours=True, causal=True, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_it_takes() -> None:
    def suits(q: Any, k: Any = None, v: Any = None) -> bool:
        return attention.suits(q, q if k is None else k, q if v is None else v)

    x = torch.zeros(2, 4, 5, 32)
    assert suits(x)
    assert suits(x, x[:, :2], x[:, :2])
    assert not suits(x, x[:, :3], x[:, :3])
    assert not suits(x, x[:, :, :4], x[:, :, :4])
    assert not suits(x[:, :, :1], x, x)
    assert not suits(x, x[:, :2], x)
    assert not suits(torch.zeros(2, 4, 5, 24))
    assert not suits(x.bfloat16())
    assert not suits(x.double())
    assert not suits(x.to("meta"))
    assert not suits(x[:0])
    assert not suits(torch._neg_view(x))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (heads(1, 1, 4, 32).requires_grad_() for _ in range(3))
    out = attention.attention(q, k, v, scale=1.0, causal=True)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
