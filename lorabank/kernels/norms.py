"""Norms of V = W + scaling · B A, output by output: what DoRA divides by (arXiv:2402.09353, eq. 5).

V is made in pieces of some rows, so that neither it nor B A is ever there as a whole. Sums of squares that are expanded into
‖W‖² + 2 c (W Aᵀ ∘ Bᵀ) + … would need none, and lose all digits where B A nearly undoes a row of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabank.kernels.ops import without_autocast

PIECE = 2**22
"""Numbers of V that are held at once, at most."""
PIECES = 8
"""Pieces of V, at least."""


def output_norms(weight_OI: Tensor, A_RI: Tensor, B_RO: Tensor, scaling: float) -> Tensor:
    """(O,) in A's dtype, no gradient, nowhere zero: where all is zero it is the root of the smallest normal number."""
    with torch.no_grad(), without_autocast(weight_OI):
        A, B_OR = A_RI.detach(), B_RO.detach().t()
        outputs, inputs = weight_OI.shape
        rows = max(1, min(PIECE // max(1, inputs), -(-outputs // PIECES)))
        squares = [
            torch.addmm(weight.to(A.dtype), b, A, alpha=scaling).square_().sum(1)
            for weight, b in zip(weight_OI.split(rows), B_OR.split(rows), strict=True)
        ]
        return torch.cat(squares).clamp_min(torch.finfo(A.dtype).tiny).sqrt()


def base_norms(weight_OI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """‖W‖ of each output (O,) in `dtype`: to the bit what `output_norms` gives where B is zero."""
    outputs, inputs = weight_OI.shape
    A_RI, B_RO = (torch.zeros(0, size, dtype=dtype, device=weight_OI.device) for size in (inputs, outputs))
    return output_norms(weight_OI, A_RI, B_RO, 1.0)
