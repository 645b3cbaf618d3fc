"""Norms of W + scaling · B A, output by output, without B A: what DoRA divides by (arXiv:2402.09353, eq. 5).

‖W + cBA‖² = ‖W‖² + 2c (W Aᵀ ∘ Bᵀ) + c² (B A Aᵀ ∘ B), summed over ranks. W is read in pieces, so that none of its size is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**22
"""Numbers of W that are held in fp32 at once."""


def output_norms(weight_OI: Tensor, A_RI: Tensor, B_RO: Tensor, scaling: float) -> Tensor:
    """(O,) in A's dtype, no gradient, nowhere zero: where all is zero it is the smallest normal number."""
    with torch.no_grad():
        A, B_OR = A_RI.detach(), B_RO.detach().t()
        squares = [_squares(piece.to(A.dtype), A, part) for piece, part in _pieces(weight_OI, scaling * B_OR)]
        grown = ((scaling * B_OR @ (A @ A.t())) * (scaling * B_OR)).sum(1)
        return (torch.cat(squares) + grown).clamp_min(torch.finfo(A.dtype).tiny).sqrt()


def _squares(weight_oI: Tensor, A_RI: Tensor, B_oR: Tensor) -> Tensor:
    return weight_oI.square().sum(1) + 2 * ((weight_oI @ A_RI.t()) * B_oR).sum(1)


def _pieces(weight_OI: Tensor, B_OR: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, PIECE // max(1, weight_OI.shape[1]))
    return list(zip(weight_OI.split(rows), B_OR.split(rows), strict=True))
