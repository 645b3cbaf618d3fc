"""The largest singular values and vectors of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def leading(matrix_NM: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, K), S (K,), Vh (K, M) of the `count` largest singular values, fewer where there are fewer; fp32.

    Through the eigenvectors of the smaller Gram matrix in fp64, which several times as fast as an SVD gives the large values to
    fp32's last digits; those below 1e-7 of the largest are taken as zero, with zero vectors on the longer side.
    """
    device = matrix_NM.device
    work = (matrix_NM.cpu() if device.type == "mps" else matrix_NM).double()  # which has no fp64
    wide = work.shape[0] <= work.shape[1]
    values, vectors = torch.linalg.eigh(work @ work.t() if wide else work.t() @ work)
    S = values.flip(0)[:count].clamp(min=0).sqrt()
    short = vectors.flip(1)[:, :count]
    inverse = torch.where(1e-7 * S[:1] < S, 1 / S, 0.0)
    S = torch.where(inverse > 0, S, 0.0)
    long = (work.t() @ short if wide else work @ short) * inverse
    U, V = (short, long) if wide else (long, short)
    return U.to(device, torch.float32), S.to(device, torch.float32), V.t().to(device, torch.float32)
