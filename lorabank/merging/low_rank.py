"""Truncated singular value decompositions of ΔW: from its factors where it has some, else of the matrix, one layer at a time.

Of B·A none of the large matrix is made: with QR of both factors, B = Q_B R_B and Aᵀ = Q_A R_A, the core R_B R_Aᵀ has the same
singular values and is as small as the rank. Shape suffixes: O out, I in, R ranks, K kept ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLED = 16
"""Directions that the randomised decomposition looks at beyond those that are kept."""
POWER_STEPS = 4
"""How often it multiplies by M Mᵀ. A flat spectrum, which pruned matrices have, needs them."""
RANDOMISED_BELOW = 0.25
"""Share of the smaller side up to which looking at that many directions is cheaper than a whole decomposition."""


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The best factors of a rank, balanced: B and A share the singular values' square roots."""

    A: Tensor
    """(K, I)"""
    B: Tensor
    """(O, K)"""
    dropped: float
    """‖M − B A‖, Frobenius."""


def factored_norm(A_RI: Tensor, B_OR: Tensor) -> float:
    """‖B A‖ (Frobenius) without the product, in float64: exact to its rounding where terms cancel, too."""
    return float(torch.linalg.matrix_norm(_core(A_RI.double(), B_OR.double())[2]))


def stacked(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """(A, B, weight) of each term → (A (ΣR, I), B (O, ΣR)) of the weighted sum, float64."""
    A = torch.cat([A.detach().double() for A, _, _ in factors])
    B = torch.cat([B.detach().to(A.device).double() * weight for _, B, weight in factors], dim=1)
    return A, B


def truncate_factors(A_RI: Tensor, B_OR: Tensor, *, rank: int, energy: float | None) -> Truncated:
    """B·A with the fewest ranks that hold `energy` of ‖B A‖², at most `rank`."""
    left_OK, right_IK, core = _core(A_RI, B_OR)
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    return _truncated(left_OK @ U, S, Vt @ right_IK.t(), rank=rank, energy=energy, total=float(S.square().sum()))


def truncate(matrix_OI: Tensor, *, rank: int, energy: float | None) -> Truncated:
    """The same of any matrix. A low rank of a large one is found by random projections (Halko et al., arXiv:0909.4061)."""
    few = rank + OVERSAMPLED <= RANDOMISED_BELOW * min(matrix_OI.shape)
    if few and energy is None:
        U, S, Vt = _randomised_svd(matrix_OI, rank + OVERSAMPLED)
    else:  # how many ranks hold an energy shows only in the whole spectrum
        U, S, Vt = torch.linalg.svd(matrix_OI, full_matrices=False)
    return _truncated(U, S, Vt, rank=rank, energy=energy, total=float(matrix_OI.double().square().sum()))


def _core(A_RI: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, upper_B = torch.linalg.qr(B_OR)
    right, upper_A = torch.linalg.qr(A_RI.t())
    return left, right, upper_B @ upper_A.t()


def _randomised_svd(matrix_OI: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # its own: combining doesn't move the caller's random numbers
    probe_IK = torch.randn(matrix_OI.shape[1], directions, generator=generator).to(matrix_OI)
    basis_OK = torch.linalg.qr(matrix_OI @ probe_IK).Q
    for _ in range(POWER_STEPS):
        basis_OK = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.t() @ basis_OK).Q).Q
    U, S, Vt = torch.linalg.svd(basis_OK.t() @ matrix_OI, full_matrices=False)
    return basis_OK @ U, S, Vt


def _truncated(U: Tensor, S: Tensor, Vt: Tensor, *, rank: int, energy: float | None, total: float) -> Truncated:
    """`total`: ‖M‖², of which S may be a part; what is left out then counts as dropped."""
    squares = S.double().square()
    noise = torch.finfo(S.dtype).eps * len(S) * S[0]
    kept = min(rank, max(1, int(S.gt(noise).sum())))
    if energy is not None:
        held = squares.cumsum(0)
        kept = min(kept, 1 + int((held < energy * held[-1]).sum()))
    # what is dropped is summed itself where the spectrum is whole: a difference of sums would lose a small one
    rest = float(squares[kept:].sum()) + max(0.0, total - float(squares.sum())) * (len(S) < min(U.shape[0], Vt.shape[1]))
    root = S[:kept].sqrt()
    return Truncated(A=root[:, None] * Vt[:kept], B=U[:, :kept] * root, dropped=rest**0.5)
