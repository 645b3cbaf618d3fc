"""Frozen products in fp8: the weight kept as e4m3 with one fp32 scale a row, twice, since both directions want rows.

`base` is [W (O, I), scale (O), Wᵀ (I, O), scale (I)]: the first pair makes y = W x, the second dx = Wᵀ dy. On a GPU with fp8
units the input is rounded row by row as well (so no row touches another) and `_scaled_mm` multiplies; the rounding is plain
torch, which a compiler fuses into what made the input. Elsewhere the weight is dequantised for the product: slower, and the
definition of the storage. `emulated_forward` and `emulated_input_grad` compute in plain torch what the units do, on any device.
Shapes: x (…, K) times a stored matrix (F, K).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST_SCALE = 1e-12
"""Of a row of zeros: any will do, and dividing by zero won't."""
MULTIPLE = 32
"""What both sizes of a weight must be a multiple of: cuBLAS refuses products of 48 or 304 numbers a row on an H100."""
OLDEST = (8, 9)
"""Compute capability from which on GPUs have fp8 units (Ada, Hopper)."""


def missing(device: torch.device) -> str | None:
    """Why `device` has no fp8 products, as a clause for people; None when it has them."""
    if device.type != "cuda":
        return f"{device.type} has none"
    if torch.version.hip is not None:
        return "ROCm's are not supported yet"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
        return f"{torch.cuda.get_device_name(device)} has compute capability {have}; they need {needed} or newer"
    return _try_one(device)


@functools.cache
def _try_one(device: torch.device) -> str | None:
    """What torch says of a product in fp8 on a GPU whose units ought to do it: its libraries leave some out."""
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.ones(MULTIPLE, MULTIPLE, device=device)
        values, scale = quantize_rows(rows)
        try:
            found = multiply(values, scale, values, scale)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = " ".join(str(error).split())[:200]
            return f"torch can't multiply in fp8 on {torch.cuda.get_device_name(device)} ({type(error).__name__}: {said})"
        right = bool((found == MULTIPLE).all())
    return None if right else f"torch's fp8 products are wrong on {torch.cuda.get_device_name(device)}"


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """Whether products on `device` go through its fp8 units."""
    return missing(device) is None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, K) in any float dtype → e4m3 of the same shape and fp32 scales (…), so that x ≈ e4m3 · scale.

    Off by 2⁻⁴ of a number, or 2⁻¹⁰ of its row's scale where that is more. A row with NaN or infinity is NaN, and no other is.
    """
    scale = x.abs().amax(-1).float().mul(1 / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x.float() / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_rows` stands for, rounded once into `dtype`."""
    return (values.float() * scale[..., None]).to(dtype)


def quantize_weight(weight_OI: Tensor) -> list[Tensor]:
    """A weight as a product's `base`."""
    return [*quantize_rows(weight_OI), *quantize_rows(weight_OI.t().contiguous())]


def forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """(x (…, I), base, bias) → y (…, O), in x's dtype."""
    return _product(x, base[0], base[1], bias)


def input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    """(dy (…, O), base) → dx (…, I), in dy's dtype."""
    return _product(dy, base[2], base[3], None)


def _product(x: Tensor, weight_FK: Tensor, scale_F: Tensor, bias: Tensor | None) -> Tensor:
    if not runs_on(x.device):
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, dequantize_rows(weight_FK, scale_F, x.dtype), bias)
    rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    within = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    y = multiply(rows, scale, weight_FK, scale_F, within).to(x.dtype)
    if bias is not None and within is None:
        y = y + bias.to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply(rows: Tensor, scale: Tensor, weight_FK: Tensor, scale_F: Tensor, bias: Tensor | None = None) -> Tensor:
    """Quantised rows (N, K) times a stored matrix by the GPU's units, (N, F) in bf16."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows, weight_FK.t(), scale[:, None], scale_F[None], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def emulated_forward(x: Tensor, base: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`forward` as fp8 units do it: x rounded by rows too, sums in fp32, each y rounded to bf16 once and then to x's dtype."""
    return _emulated_product(x, base[0], base[1], bias)


def emulated_input_grad(dy: Tensor, base: Sequence[Tensor]) -> Tensor:
    """`input_grad` likewise, dy rounded by rows."""
    return _emulated_product(dy, base[2], base[3], None)


def _emulated_product(x: Tensor, weight_FK: Tensor, scale_F: Tensor, bias: Tensor | None) -> Tensor:
    rows, scale = quantize_rows(x)
    y = F.linear(rows.float(), weight_FK.float()) * scale[..., None] * scale_F  # e4m3 · e4m3 is exact in fp32
    if bias is not None and bias.dtype == torch.bfloat16:
        return (y + bias.float()).bfloat16().to(x.dtype)
    y = y.bfloat16().to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """The pair as a differentiable product, for a layer that no adapter changes."""

    @staticmethod
    def forward(ctx, x, bias, weight, scale, weight_t, scale_t, emulated):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, scale, weight_t, scale_t)
        ctx.emulated = emulated
        return (emulated_forward if emulated else forward)(x, (weight, scale, weight_t, scale_t), bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        turned = emulated_input_grad if ctx.emulated else input_grad
        dx = turned(dy, ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None, None, None, None, None


def product(x: Tensor, base: Sequence[Tensor], bias: Tensor | None, *, emulated: bool = False) -> Tensor:
    """`forward` or `emulated_forward`, differentiable in x and the bias."""
    return _Product.apply(x, bias, *base, emulated)
