"""fp32 products with a frozen weight on a CPU through oneDNN, which torch ships beside its default BLAS and uses for bf16 alone.

On an AMD EPYC (Zen 4) it reaches 1.1 to 1.5 × the rate of the default (benchmarks/LOG.md). The results differ from the
default's in the last bits, so it serves the passes that may round: training and evaluation, never a plain forward of the user's.
Shapes: x (…, I), weight (O, I) in any strides, y (…, O).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_OP = "mkldnn::_linear_pointwise"
"""What torch's own compiler emits for a linear layer on a CPU; builds without oneDNN lack it."""


def available() -> bool:
    """Whether this build of torch has oneDNN and the user hasn't switched it off (`torch.backends.mkldnn.flags`)."""
    return _built_in() and torch._C._get_mkldnn_enabled()


@functools.cache
def _built_in() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CPU")


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these two goes through oneDNN: fp32 on a CPU, outside autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: through oneDNN where it suits, else torch's default. Not differentiable: autograd functions call it."""
    if not suits(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    # it reads x and the weight through their strides, but a bias as if it were contiguous
    bias_O = None if bias_O is None else bias_O.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


def input_grad(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """dx = dy W, likewise; the weight is read in place, through strides."""
    return linear(dy, weight_OI.t())
