"""Causal attention by FlashAttention 4's kernels (the optional package flash-attn-4) as a custom op, `lorabank::flash_attention`.

On an H100 they take 9 % less than cuDNN's, forward and backward together. Its package offers an autograd function, which a
compiled block can't be divided around, so the op calls what that calls, `_flash_attn_fwd` and `_flash_attn_bwd`, and only where a
first try of both gave what torch's attention gives (`missing`). The plain twin is torch's scaled_dot_product_attention.
Shapes: N rows, T tokens, H query heads, G key heads, D features a head.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.notices import warn_once

SWITCH = "LORABANK_FLASH"
"""Environment variable: 0 keeps attention on torch's kernels."""
PACKAGE, INTERFACE = "flash-attn-4", "flash_attn.cute.interface"
CAPABILITY = (9, 0)
"""The GPUs that it was measured on; for others torch chooses."""
DTYPES = (torch.bfloat16, torch.float16)
HEADS = (64, 128)
"""Features of a head that were tested."""
_ALLOWED = 2e-2
"""Of the first try: relative error in norm, against fp32."""


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take q (N, H, T, D), k and v (N, G, T, D)."""
    same = query.dtype == key.dtype == value.dtype and key.shape == value.shape
    sizes = query.shape[2] == key.shape[2] and query.shape[3] == key.shape[3] and query.shape[1] % key.shape[1] == 0
    return same and sizes and query.dtype in DTYPES and query.shape[3] in HEADS


@functools.cache
def ready(device: torch.device, features: int, shared: int) -> bool:
    """Whether attention on `device` goes through these kernels, with such heads of which `shared` have a key head together.

    A package that is installed and doesn't work is told about once.
    """
    if os.environ.get(SWITCH, "1") == "0" or device.type != "cuda" or not torch.cuda.is_available():
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    if not _installed():
        return False
    if features not in HEADS:
        why = f"heads of {features} features were not tried, those of {' and '.join(map(str, HEADS))} were"
        warn_once(f"flash-attn-4 isn't used for this model, torch's attention is: {why}. {SWITCH}=0 silences this.")
        return False
    # said whenever one of its kernels is compiled, and nothing to a user
    warnings.filterwarnings("ignore", message="Argument aux_data", module=r"cutlass\.")
    why = missing(device, features, shared)
    if why is not None:
        warn_once(
            f"flash-attn-4 is installed but doesn't work here, so torch's attention is used: {why}. {SWITCH}=0 silences this."
        )
    return why is None


def _installed() -> bool:
    try:
        metadata.distribution(PACKAGE)  # importing it takes long, and belongs to the try
    except metadata.PackageNotFoundError:
        return False
    return True


def missing(device: torch.device, features: int = HEADS[0], shared: int = 2) -> str | None:
    """Why the kernels can't be used, seen on a first try, forward and backward; None when they can.

    What is compiled for it is what models with such heads run. The rows are longer than a block of the kernels.
    """
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator(device).manual_seed(0)
        sizes = (2 * shared, 2, 2, 2 * shared)
        q, k, v, dy = (
            torch.randn(1, 200, heads, features, generator=generator, device=device, dtype=DTYPES[0]) for heads in sizes
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it says of itself is no failure where warnings are errors
                y, lse = _forward(q, k, v, 0.1, True)
                found = [y, *_backward(dy, q, k, v, y, lse, 0.1, True)]
        except Exception as error:  # noqa: BLE001  whatever another version does: torch's attention is there
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        leaves = [tensor.float().transpose(1, 2).requires_grad_() for tensor in (q, k, v)]
        keys, values = (leaf.repeat_interleave(shared, 1) for leaf in leaves[1:])
        plain = F.scaled_dot_product_attention(leaves[0], keys, values, is_causal=True, scale=0.1)
        grads = torch.autograd.grad(plain, leaves, dy.float().transpose(1, 2))
    for name, mine, exact in zip(("output", "dq", "dk", "dv"), found, (plain, *grads), strict=True):
        exact = exact.detach().transpose(1, 2)
        wrong = (mine.float() - exact).norm() / exact.norm()
        if not wrong <= _ALLOWED:
            return f"its {name} differs from torch's by {float(wrong):.3g} of its norm"
    return None


def _interface() -> Any:
    return importlib.import_module(INTERFACE)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(y (N, T, H, D), its log-sum-exp (N, H, T) in fp32)."""
    rows, tokens, heads, _ = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads, tokens), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # kernels start on the current GPU
        _interface()._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, out=y, lse=lse)
    return y, lse


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), rows next to each other."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    with torch.cuda.device_of(q):  # kernels start on the current GPU
        _interface()._flash_attn_bwd(
            q, k, v, y, dy.contiguous(), lse, softmax_scale=scale, causal=causal, dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("lorabank::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(softmax(scale · q kᵀ) v (N, T, H, D), its log-sum-exp (N, H, T) in fp32); q (N, T, H, D), k and v (N, T, G, D)."""
    return _forward(q, k, v, scale, causal)


@torch.library.custom_op("lorabank::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    return _backward(dy, q, k, v, y, lse, scale, causal)


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    rows, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((rows, heads, tokens), dtype=torch.float32)


@flash_attention_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *flash_attention_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


flash_attention.register_autograd(_gradient, setup_context=_setup)
