"""The Triton path of the chunked head against the plain definition, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabank.kernels import loss, reference
from lorabank.kernels.gpu import loss as gpu
from lorabank.kernels.logit_shape import LogitShape

H = 8
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},  # the order of sums
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},  # logits, their gradient and dh are each rounded to 8 bits
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},  # to 11 bits
}
DTYPES = list(TOLERANCES)


def _inputs(device: torch.device, tokens: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets (the first and the last column among them) and bias."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, H, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(device, dtype)
    targets = torch.randint(V, (tokens,), generator=g)
    targets[:1], targets[1:2] = V - 1, 0
    return hidden, weight, targets.to(device), torch.randn(V, generator=g).to(device, dtype)


def _weights(tokens: int, device: torch.device) -> Tensor:
    """−1 to 2; the third of four is zero."""
    return (torch.arange(tokens) % 4 - 2.0).mul(-1).to(device)


def _logits(device: torch.device, tokens: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(tokens, V, generator=g).mul(3).to(device, dtype), torch.randint(V, (tokens,), generator=g).to(device)


def _expected(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, the gradient of −Σ weight · log p with respect to the logits), in fp64."""
    x = logits.double().requires_grad_()
    logprobs = x.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(-(weights.double() * logprobs).sum(), x)
    return logprobs.detach(), gradient


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the path asks for holds NaN until it is written."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)

        def nan(*args: Any, made: Callable[..., Tensor] = made, **kwargs: Any) -> Tensor:
            out = made(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, nan)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "V", "chunk_tokens"), [(1, 7, 9), (6, 97, 9), (6, 97, 4), (4, 97, 1), (3, 5000, 2)])
def test_token_logprobs(device: torch.device, tokens: int, V: int, chunk_tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = _inputs(device, tokens, V, dtype)
    upstream = torch.linspace(-1, 2, tokens, device=device)
    expected = reference.token_logprobs(hidden, weight, targets, bias)
    (dh,) = torch.autograd.grad(expected, hidden, upstream)
    found = loss.token_logprobs(hidden, weight, targets, bias, chunk_numbers=chunk_tokens * V, path=loss.triton_path())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    (found_dh,) = torch.autograd.grad(found, hidden, upstream)
    torch.testing.assert_close(found_dh, dh, **TOLERANCES[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "V", "chunk_tokens"), [(1, 7, 9), (6, 97, 9), (6, 97, 4), (3, 5000, 2)])
def test_weighted_nll(device: torch.device, tokens: int, V: int, chunk_tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = _inputs(device, tokens, V, dtype)
    weights = _weights(tokens, device)
    expected = reference.token_logprobs(hidden, weight, targets, bias)
    (dh,) = torch.autograd.grad(-(weights * expected).sum() * 3, hidden)
    total, logprobs = loss.weighted_nll(
        hidden, weight, targets, weights, bias, chunk_numbers=chunk_tokens * V, path=loss.triton_path()
    )
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected.detach(), **TOLERANCES[dtype])
    torch.testing.assert_close(total, -(weights * expected).sum(), **TOLERANCES[dtype])
    (found_dh,) = torch.autograd.grad(total * 3, hidden)
    torch.testing.assert_close(found_dh, dh, rtol=TOLERANCES[dtype]["rtol"], atol=6 * TOLERANCES[dtype]["atol"])  # 3 · weight ≤ 6
    assert not found_dh[weights == 0].any()


SHAPES = [LogitShape(factor=0.25), LogitShape(cap=2.0), LogitShape(factor=0.5, divisor=0.7, cap=1.5)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_done_to_logits(device: torch.device, shape: LogitShape, dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = _inputs(device, 6, 97, dtype)
    weights, path = _weights(6, device), loss.triton_path()
    expected = reference.token_logprobs(hidden, weight, targets, bias, shape)
    found = loss.token_logprobs(hidden, weight, targets, bias, shape=shape, chunk_numbers=4 * 97, path=path)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    (dh,) = torch.autograd.grad(-(weights * expected).sum(), hidden, retain_graph=True)
    total, logprobs = loss.weighted_nll(hidden, weight, targets, weights, bias, shape=shape, chunk_numbers=4 * 97, path=path)
    torch.testing.assert_close(logprobs, expected.detach(), **TOLERANCES[dtype])
    (found_dh,) = torch.autograd.grad(total, hidden)
    near = {"rtol": TOLERANCES[dtype]["rtol"], "atol": 2 * TOLERANCES[dtype]["atol"]}  # weight ≤ 2
    torch.testing.assert_close(found_dh, dh, **near)
    assert not found_dh[weights == 0].any()
    (dh,) = torch.autograd.grad(expected, hidden, weights)
    torch.testing.assert_close(torch.autograd.grad(found, hidden, weights)[0], dh, **near)


def test_an_idle_row_that_is_not_finite_has_no_gradient(device: torch.device) -> None:
    hidden, weight, targets, _ = _inputs(device, 4, 97, torch.float32)
    with torch.no_grad():
        hidden[2] = float("nan")
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0], device=device)
    total, _ = loss.weighted_nll(hidden, weight, targets, weights, shape=LogitShape(cap=2.0), path=loss.triton_path())
    (found,) = torch.autograd.grad(total, hidden)
    assert not found[2].any()


def test_the_two_agree_where_no_gradient_is_wanted(device: torch.device) -> None:
    hidden, weight, targets, _ = _inputs(device, 5, 97, torch.float32)
    weights, path = _weights(5, device), loss.triton_path()
    total, logprobs = loss.weighted_nll(hidden, weight, targets, weights, path=path)
    frozen_total, frozen_logprobs = loss.weighted_nll(hidden.detach(), weight, targets, weights, path=path)
    assert not frozen_total.requires_grad
    torch.testing.assert_close(frozen_total, total.detach())
    torch.testing.assert_close(frozen_logprobs, logprobs)
    torch.testing.assert_close(loss.token_logprobs(hidden.detach(), weight, targets, path=path), logprobs)


def test_an_expanded_upstream_gradient(device: torch.device) -> None:
    """`.sum().backward()` hands over one number for all tokens, with stride 0."""
    hidden, weight, targets, _ = _inputs(device, 5, 97, torch.float32)
    (expected,) = torch.autograd.grad(reference.token_logprobs(hidden, weight, targets).sum(), hidden)
    found = loss.token_logprobs(hidden, weight, targets, chunk_numbers=3 * 97, path=loss.triton_path())
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], expected, **TOLERANCES[torch.float32])


def test_weights_and_targets_in_any_strides(device: torch.device) -> None:
    logits, targets = _logits(device, 4, 97)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], device=device)
    _, gradient = _expected(logits, targets, weights)
    gpu.softmax_(logits, targets.repeat_interleave(2)[::2], torch.stack((weights, weights * 7), dim=1)[:, 0])
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=2e-6)
    logits, _ = _logits(device, 4, 97)
    _, gradient = _expected(logits, targets, torch.full((4,), 2.0, device=device))
    gpu.softmax_(logits, targets, torch.tensor(2.0, device=device).expand(4))
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=2e-6)


def test_fp32_hidden_states_meet_a_bf16_head_in_its_dtype(device: torch.device) -> None:
    hidden, weight, targets, _ = _inputs(device, 5, 97, torch.float32)
    low = weight.bfloat16()
    found = loss.token_logprobs(hidden, low, targets, path=loss.triton_path())
    torch.testing.assert_close(found, reference.token_logprobs(hidden.bfloat16(), low, targets), **TOLERANCES[torch.bfloat16])
    (dh,) = torch.autograd.grad(found.sum(), hidden)
    assert dh.dtype == torch.float32


def test_no_tokens(device: torch.device) -> None:
    hidden, weight, targets, _ = _inputs(device, 0, 7, torch.float32)
    assert loss.token_logprobs(hidden, weight, targets, path=loss.triton_path()).shape == (0,)
    assert gpu.softmax_(torch.zeros(0, 7, device=device), targets).shape == (0,)
    total, logprobs = loss.weighted_nll(hidden, weight, targets, torch.zeros(0, device=device), path=loss.triton_path())
    total.backward()
    assert total == 0
    assert logprobs.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("V", "block"), [(1, 16), (7, 16), (97, 16), (97, 32), (96, 32), (97, gpu.BLOCK), (5000, 1024)])
def test_the_kernel_on_given_logits(device: torch.device, V: int, block: int, dtype: torch.dtype) -> None:
    """Several blocks a row, also where the last is one column wide; only the result's own rounding is left to tolerate."""
    logits, targets = _logits(device, 4, V, dtype)
    targets[:2] = torch.tensor([0, V - 1])
    weights = _weights(4, device)
    logprobs, gradient = _expected(logits, targets, weights)
    untouched = logits.clone()
    read = gpu.softmax_(logits, targets, block=block)
    assert torch.equal(logits, untouched)
    written = gpu.softmax_(logits, targets, weights, block=block)
    torch.testing.assert_close(read, written)
    torch.testing.assert_close(read.double(), logprobs, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)
    assert not logits[2].any()  # weight 0


def test_nothing_beside_the_rows_is_touched(device: torch.device) -> None:
    """Rows of a wider tensor: what lies between one row's end and the next one's start is another's."""
    wide = torch.full((5, 120), 9.0, device=device)
    logits, targets = _logits(device, 3, 97)
    wide[1:4, 10:107] = logits
    found = gpu.softmax_(wide[1:4, 10:107], targets, _weights(3, device), block=16)
    torch.testing.assert_close(found, gpu.softmax_(logits, targets, _weights(3, device), block=16))
    torch.testing.assert_close(wide[1:4, 10:107], logits)
    wide[1:4, 10:107] = 9.0
    assert (wide == 9.0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 2.0**20])
def test_a_common_offset_of_all_logits_cancels(device: torch.device, offset: float) -> None:
    logits = _logits(device, 4, 97)[0].round()  # whole numbers: the offset itself rounds nothing
    targets, weights = torch.arange(4, device=device), torch.ones(4, device=device)
    shifted = logits + offset
    assert torch.equal(gpu.softmax_(shifted, targets, weights, block=32), gpu.softmax_(logits, targets, weights, block=32))
    assert torch.equal(shifted, logits)


def test_a_target_whose_probability_underflows_still_has_its_logarithm(device: torch.device) -> None:
    logits, targets = _logits(device, 3, 97)
    logits[torch.arange(3, device=device), targets] = torch.tensor([-1e4, -200.0, -3e38], device=device)
    logprobs, gradient = _expected(logits, targets, torch.ones(3, device=device))
    found = gpu.softmax_(logits, targets, torch.ones(3, device=device), block=32)
    torch.testing.assert_close(found.double(), logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)


def test_columns_at_minus_infinity_have_no_probability(device: torch.device) -> None:
    """A vocabulary padded by a bias of −∞; the first block of a row may hold nothing else."""
    logits, targets = _logits(device, 4, 97)
    logits[:2, :40], logits[2:, 60:] = float("-inf"), float("-inf")
    targets[:] = torch.tensor([96, 40, 0, 59])
    logprobs, gradient = _expected(logits, targets, torch.ones(4, device=device))
    found = gpu.softmax_(logits, targets, torch.ones(4, device=device), block=16)
    torch.testing.assert_close(found.double(), logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)
    assert not logits[:2, :40].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 50, 96])
def test_a_row_that_isnt_finite_stays_alone(device: torch.device, bad: float, column: int) -> None:
    logits, targets = _logits(device, 5, 97)
    weights = torch.ones(5, device=device)
    sick = logits.clone()
    sick[1, column] = sick[3, column] = bad
    weights[3] = 0
    sick_logprobs, logprobs = (gpu.softmax_(x, targets, weights, block=32) for x in (sick, logits))
    others = [0, 2, 4]
    assert torch.equal(sick[others], logits[others])
    assert torch.equal(sick_logprobs[others], logprobs[others])
    assert sick[1].isnan().all()
    assert sick_logprobs[[1, 3]].isnan().all()
    assert not sick[3].any()  # exact zeros: 0 · NaN would be NaN


@pytest.mark.parametrize("target", [-100, -1, 97, 2**40])
def test_a_target_that_is_no_column_spoils_its_own_row_only(device: torch.device, target: int) -> None:
    logits, targets = _logits(device, 3, 97)
    weights, clean = torch.ones(3, device=device), logits.clone()
    logprobs = gpu.softmax_(clean, targets, weights, block=32)
    targets[1] = target
    found = gpu.softmax_(logits, targets, weights, block=32)
    assert found[1].isnan()
    assert logits[1].isnan().all()
    assert torch.equal(found[[0, 2]], logprobs[[0, 2]])
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])


def test_a_weight_is_applied_before_rounding(device: torch.device) -> None:
    """weight · (p − onehot) is rounded once: the nearest number is found. fp16, since the interpreter truncates to bf16."""
    logits, targets = _logits(device, 4, 97, torch.float16)
    weights = torch.tensor([0.3, -1.7, 10.1, 77.0], device=device)
    _, gradient = _expected(logits, targets, weights)
    gpu.softmax_(logits, targets, weights)
    # half a unit in the last place, that of subnormal numbers too, and the fp32 before it
    torch.testing.assert_close(logits.double(), gradient, rtol=1.01 * 2**-11, atol=1.01 * 2**-25)


def test_more_logits_than_32_bits_count(device: torch.device) -> None:
    """Only the pages that are touched become real memory."""
    memory = torch.empty(2**31 + 97, dtype=torch.bfloat16, device=device)
    logits, (expected, targets) = memory.as_strided((3, 97), (2**30, 1)), _logits(device, 3, 97, torch.bfloat16)
    logits.copy_(expected)
    weights = torch.ones(3, device=device)
    found = gpu.softmax_(logits, targets, weights)
    torch.testing.assert_close(found, gpu.softmax_(expected, targets, weights))
    torch.testing.assert_close(logits, expected)


def test_chunks_come_in_whole_tiles() -> None:
    path = loss.triton_path()
    assert [s.stop - s.start for s in loss._chunks(3000, 128_256, path)] == [1024] * 3
    assert loss._chunks(10, 97, path._replace(numbers=300 * 97))[0] == slice(0, 256)
    assert loss._chunks(10, 97, path._replace(numbers=100 * 97))[0] == slice(0, 100)
    assert loss._chunks(2, 97, path._replace(numbers=1)) == [slice(0, 1), slice(1, 2)]
    assert loss._chunks(999, 97, loss.PLAIN._replace(numbers=300 * 97))[0] == slice(0, 300)


def test_the_path_is_chosen_by_device_and_dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = _inputs(device, 5, 97, torch.float32)
    assert loss.best_path(hidden.cpu(), weight.cpu()) is loss.PLAIN  # the interpreter is slow: tests alone ask for it
    assert loss.best_path(hidden, weight.double()) is loss.PLAIN
    if device.type == "cuda":
        assert loss.best_path(hidden, weight) == loss.triton_path()
        plain = loss.token_logprobs(hidden, weight, targets, path=loss.PLAIN)
        torch.testing.assert_close(loss.token_logprobs(hidden, weight, targets), plain, **TOLERANCES[torch.float32])
        monkeypatch.setattr(loss.runtime, "available", lambda device: False)
        assert loss.best_path(hidden, weight) is loss.PLAIN
