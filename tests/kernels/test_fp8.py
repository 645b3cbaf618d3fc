"""fp8 storage: what rounding costs, and the products against their plain definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabank.kernels import fp8
from lorabank.kernels.base import BASE_PRODUCTS


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), power=st.integers(-12, 12), seed=st.integers(0, 99))
def test_rounding_is_within_its_bound(rows: int, columns: int, power: int, seed: int) -> None:
    x = random(rows, columns, seed=seed) * 10.0**power
    values, scale = fp8.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (rows,)
    bound = torch.maximum(x.abs() * 2.0**-4, scale[:, None] * 2.0**-10) * (1 + 1e-5)
    assert ((fp8.dequantize_rows(values, scale, torch.float32) - x).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_of_a_row_stays_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    x = random(6, 48, dtype=dtype)
    x[2] = 0
    back = fp8.dequantize_rows(*fp8.quantize_rows(x), dtype)
    top = x.abs().amax(-1)
    torch.testing.assert_close(back.abs().amax(-1), top, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert not back[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_isnt_finite_stays_alone(bad: float) -> None:
    x = random(4, 16)
    x[1, 3] = bad
    values, scale = fp8.quantize_rows(x)
    clean, its_scale = fp8.quantize_rows(random(4, 16)[[0, 2, 3]])
    assert torch.equal(values[[0, 2, 3]].view(torch.uint8), clean.view(torch.uint8))
    assert torch.equal(scale[[0, 2, 3]], its_scale)
    assert not fp8.dequantize_rows(values, scale, torch.float32)[1].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fallback_is_the_product_with_the_dequantised_weight(dtype: torch.dtype, bias: bool) -> None:
    weight, x, dy = (
        random(32, 48, seed=1, dtype=dtype),
        random(2, 5, 48, seed=2, dtype=dtype),
        random(2, 5, 32, seed=3, dtype=dtype),
    )
    b = random(32, seed=4, dtype=dtype) if bias else None
    base = fp8.quantize_weight(weight)
    assert [tuple(part.shape) for part in base] == [(32, 48), (32,), (48, 32), (48,)]
    product = BASE_PRODUCTS["fp8"]
    assert torch.equal(product.forward(x, base, b), F.linear(x, fp8.dequantize_rows(base[0], base[1], dtype), b))
    assert torch.equal(product.input_grad(dy, base), F.linear(dy, fp8.dequantize_rows(base[2], base[3], dtype)))
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert float((product.forward(x, base, b).double() - exact).norm() / exact.norm()) < 0.04


def test_the_differentiable_product_has_the_pairs_gradient() -> None:
    base, dy = fp8.quantize_weight(random(16, 32)), random(3, 16, seed=2)
    x, bias = random(3, 32, seed=1).requires_grad_(), random(16, seed=3).requires_grad_()
    y = fp8.product(x, base, bias)
    y.backward(dy)
    assert torch.equal(y, fp8.forward(x, base, bias))
    assert x.grad is not None and torch.equal(x.grad, fp8.input_grad(dy, base))
    assert bias.grad is not None and torch.equal(bias.grad, dy.sum(0))


def test_a_gpu_says_why_it_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.missing(torch.device("cuda")) == "NVIDIA A100 has compute capability 8.0; they need 8.9 or newer"
    monkeypatch.setattr(fp8, "_try_one", lambda device: None)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fp8.missing(torch.device("cuda")) is None
    assert fp8.missing(torch.device("cpu")) == "cpu has none"


def test_products_that_torch_refuses_or_gets_wrong_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the GPU's units could do. On a CPU torch has such products itself."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert fp8._try_one.__wrapped__(cpu) is None
    monkeypatch.setattr(fp8, "multiply", lambda *args: torch.zeros(32, 32))
    assert fp8._try_one.__wrapped__(cpu) == "torch's fp8 products are wrong on NVIDIA L4"

    def refuse(*args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on\nother devices")

    monkeypatch.setattr(fp8, "multiply", refuse)
    assert fp8._try_one.__wrapped__(cpu) == (
        "torch can't multiply in fp8 on NVIDIA L4 (RuntimeError: torch._scaled_mm is only supported on other devices)"
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fp8_units_path_multiplies_the_rounded_rows(
    dtype: torch.dtype, bias: torch.dtype | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU through torch's own `_scaled_mm` there: what a GPU runs, up to the order of sums and rounding to bf16."""
    monkeypatch.setattr(fp8, "runs_on", lambda device: True)
    base, x, dy = (
        fp8.quantize_weight(random(32, 48, seed=1)),
        random(2, 5, 48, seed=2, dtype=dtype),
        random(2, 5, 32, seed=3, dtype=dtype),
    )
    b = None if bias is None else random(32, seed=4, dtype=bias)
    forward, input_grad = fp8.forward, fp8.input_grad
    if compiled:
        forward, input_grad = torch.compile(forward), torch.compile(input_grad)
    x_rounded, dy_rounded = (fp8.dequantize_rows(*fp8.quantize_rows(value), torch.float64) for value in (x, dy))
    y = x_rounded @ fp8.dequantize_rows(base[0], base[1], torch.float64).t() + (0 if b is None else b.double())
    dx = dy_rounded @ fp8.dequantize_rows(base[2], base[3], torch.float64).t()
    for found, expected in ((forward(x, base, b), y), (input_grad(dy, base), dx)):
        assert found.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
        assert relative(found, expected) < 4e-3  # bf16 keeps 8 bits
    assert (
        relative(
            forward(x, base, b),
            F.linear(x.double(), fp8.dequantize_rows(base[0], base[1], torch.float64), None if b is None else b.double()),
        )
        < 0.04
    )


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_emulation_is_what_scaled_mm_computes(
    dtype: torch.dtype, bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very different sizes, so that a scale in the wrong place shows. Off by one rounding to bf16 where sums differ."""
    base = fp8.quantize_weight(random(32, 48, seed=1) * 10.0 ** torch.linspace(-3, 1, 32)[:, None])
    x = (random(2, 5, 48, seed=2) * 10.0 ** torch.linspace(-4, 2, 5)[:, None]).to(dtype)
    dy = (random(2, 5, 32, seed=3) * 10.0 ** torch.linspace(-7, 0, 5)[:, None]).to(dtype)
    b = None if bias is None else random(32, seed=4, dtype=bias)
    emulated = fp8.emulated_forward(x, base, b), fp8.emulated_input_grad(dy, base)
    weight_only = fp8.forward(x, base, b), fp8.input_grad(dy, base)
    monkeypatch.setattr(fp8, "runs_on", lambda device: True)
    units = fp8.forward(x, base, b), fp8.input_grad(dy, base)
    for ours, theirs, other in zip(emulated, units, weight_only, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        # the sum of a row cancels: what differs is held to the row's size
        size = theirs.double().norm(dim=-1, keepdim=True)
        assert ((ours.double() - theirs.double()).abs() <= 2.0**-8 * theirs.double().abs() + 1e-6 * size).all()
        assert relative(other, theirs) > 4e-3  # and it isn't the product that leaves the input as it is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_emulation_multiplies_rounded_rows_and_rounds_once(dtype: torch.dtype) -> None:
    base, x, dy = (
        fp8.quantize_weight(random(32, 48, seed=1)),
        random(6, 48, seed=2, dtype=dtype),
        random(6, 32, seed=3, dtype=dtype),
    )
    for found, rows, (weight, scale) in (
        (fp8.emulated_forward(x, base, None), x, base[:2]),
        (fp8.emulated_input_grad(dy, base), dy, base[2:]),
    ):
        rounded = fp8.dequantize_rows(*fp8.quantize_rows(rows), torch.float64)
        exact = rounded @ fp8.dequantize_rows(weight, scale, torch.float64).t()
        assert torch.equal(found, found.bfloat16().to(dtype))
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6 * exact.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_isnt_finite_stays_alone_in_the_emulation(bad: float) -> None:
    base, x = fp8.quantize_weight(random(32, 48, seed=1)), random(4, 48, seed=2)
    clean = fp8.emulated_forward(x, base, None)
    x[1, 3] = bad
    found = fp8.emulated_forward(x, base, None)
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]]) and not found[1].isfinite().any()


def test_the_differentiable_emulation_has_its_own_gradient() -> None:
    base, dy = fp8.quantize_weight(random(16, 32)), random(3, 16, seed=2)
    x, bias = random(3, 32, seed=1).requires_grad_(), random(16, seed=3).requires_grad_()
    y = fp8.product(x, base, bias, emulated=True)
    y.backward(dy)
    assert torch.equal(y, fp8.emulated_forward(x, base, bias))
    assert x.grad is not None and torch.equal(x.grad, fp8.emulated_input_grad(dy, base))
    assert bias.grad is not None and torch.equal(bias.grad, dy.sum(0))
