"""exp and sigmoid in the GPU's own few instructions.

Triton's ask for denormal numbers and for divisors near the largest number; each costs instructions that results rounded to bf16
don't show, and flushing denormals to zero is right for both. Being assembly with effects unknown to the compiler, they are also
computed once where it would rather compute them again in another layout than move the result: in the backward of a gated MLP that
is half of all instructions. Under the interpreter they are Triton's. Kernels with these are for opaque ops (op.py) and for what
is never traced, as the loss: torch can't tell what a kernel with assembly writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorabank.kernels.gpu.runtime import interpreted

ASSEMBLY: tl.constexpr = tl.constexpr(not interpreted() and torch.version.hip is None)


@triton.jit
def exp(x):
    """eˣ of fp32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",  # log₂ e
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505  both branches have a type then
        return tl.exp(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ) of fp32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"  # −log₂ e
            " add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505
        return tl.sigmoid(x)
