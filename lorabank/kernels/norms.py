"""Norms of V = W + scaling · B A, output by output: what DoRA divides by (arXiv:2402.09353, eq. 5).

V is made in pieces of some rows, so that neither it nor B A is ever there as a whole. Sums of squares that are expanded into
‖W‖² + 2 c (W Aᵀ ∘ Bᵀ) + … would need none, and lose all digits where B A nearly undoes a row of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabank.kernels.ops import without_autocast

PIECE, CPU_PIECE = 2**22, 2**20
"""Numbers of V that are held at once, at most; fewer on a CPU, whose cache then holds them."""
PIECES = 8
"""Pieces of V, at least."""


def output_norms(weight_OI: Tensor, A_RI: Tensor, B_RO: Tensor, scaling: float) -> Tensor:
    """(O,) in A's dtype, no gradient, nowhere zero: where all is zero it is the root of the smallest normal number."""
    with torch.no_grad(), without_autocast(weight_OI):
        A, B = A_RI.detach(), B_RO.detach()
        if weight_OI.stride(0) < weight_OI.stride(1):  # stored (in, out), as embeddings are, it is read in order by inputs
            squares_O = torch.stack(_squares(weight_OI.t(), A.t(), B, scaling, 0)).sum(0)
        else:
            squares_O = torch.cat(_squares(weight_OI, B.t(), A, scaling, 1))
        return squares_O.clamp_min(torch.finfo(A.dtype).tiny).sqrt()


def _squares(weight: Tensor, left: Tensor, right: Tensor, scaling: float, dim: int) -> list[Tensor]:
    """Of pieces of weight + scaling · left @ right, some rows each, the sums of squares along `dim`."""
    most = CPU_PIECE if weight.device.type == "cpu" else PIECE
    rows = max(1, min(most // max(1, weight.shape[1]), -(-len(weight) // PIECES)))
    return [
        torch.addmm(piece.to(left.dtype), mine, right, alpha=scaling).square_().sum(dim)
        for piece, mine in zip(weight.split(rows), left.split(rows), strict=True)
    ]


def base_norms(weight_OI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """‖W‖ of each output (O,) in `dtype`: to the bit what `output_norms` gives where B is zero."""
    outputs, inputs = weight_OI.shape
    A_RI, B_RO = (torch.zeros(0, size, dtype=dtype, device=weight_OI.device) for size in (inputs, outputs))
    return output_norms(weight_OI, A_RI, B_RO, 1.0)
