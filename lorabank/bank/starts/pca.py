"""Principal components of rows that come batch by batch, without keeping the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lorabank.bank.leading import leading


class PrincipalComponents:
    """The largest `components` directions of the rows seen so far, about their mean (Ross et al. 2008, the update of section 2).

    Of one batch it is exact. Of several, what a batch has beyond the components that are kept is lost to those that follow.
    Shapes: K components, N rows, I numbers a row.
    """

    def __init__(self, components: int) -> None:
        self.components, self.count = components, 0
        self._squares = 0.0
        """Σ ‖x − mean‖² of all rows."""

    _mean_I: Tensor
    _S_K: Tensor
    directions: Tensor
    """(K, I), orthonormal, the largest first."""

    @property
    def shares(self) -> Tensor:
        """(K,) of the variance that each direction explains, fp64; they add up to 1 over all directions."""
        return self._S_K.double() ** 2 / max(self._squares, torch.finfo(torch.float64).tiny)

    def add(self, rows_NI: Tensor) -> None:
        """Take in a batch."""
        count = len(rows_NI)
        if not count:
            return
        mean_I = rows_NI.mean(0)
        centred_NI = rows_NI - mean_I
        squares = float(centred_NI.double().square().sum())
        if self.count:
            total, moved_I = self.count + count, mean_I - self._mean_I
            step_I = moved_I * (self.count * count / total) ** 0.5
            centred_NI = torch.cat([self._S_K[:, None] * self.directions, centred_NI, step_I[None]])
            self._squares += squares + float(step_I.double().square().sum())
            self._mean_I = self._mean_I + moved_I * (count / total)
        else:
            self._squares, self._mean_I = squares, mean_I
        _, self._S_K, self.directions = leading(centred_NI, self.components)
        self.count += count
