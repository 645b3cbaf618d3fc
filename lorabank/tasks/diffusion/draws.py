"""What is random about a training row, drawn on the host from one seed: of its adapter, its step and its place alone.

So an adapter that is trained beside others sees the noise that it would see alone (law 3), on any device and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VALIDATION = 0x5EED
"""Seed of the noise and of the timesteps that every validation of every run sees."""
_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class RowDraw:
    """One row's numbers. All are drawn for every row, so no setting changes what another is drawn from."""

    place: float
    """Uniform in [0, 1): where between no noise and pure noise the row is trained."""
    drop: float
    """Uniform in [0, 1): below the caption's dropout the row is trained without its caption."""
    normal: float
    """Standard normal, for schedules that take places from a normal distribution."""
    noise: Tensor
    """fp32 standard normal, of the shape of the latents."""
    offset: Tensor
    """fp32 standard normal, one number a channel (C, 1, 1)."""

    def noise_with(self, offset: float) -> Tensor:
        """The noise, with `offset` times one number a channel added (N. Guttenberg, "Diffusion with offset noise", 2023)."""
        return self.noise + offset * self.offset if offset else self.noise


def mixed(*numbers: int) -> int:
    """A 63-bit seed of several numbers; neighbours give unrelated ones (splitmix64's finaliser over each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def draw(shape: tuple[int, ...], seed: int) -> RowDraw:
    """The draws of a row with latents of this shape (C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    place, drop = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    numbers = torch.randn(1 + shape[0], generator=generator)
    noise = torch.randn(shape, generator=generator)
    return RowDraw(place=place, drop=drop, normal=float(numbers[0]), noise=noise, offset=numbers[1:].view(-1, 1, 1))


def fixed_draw(shape: tuple[int, ...], *, row: int, part: int, parts: int) -> RowDraw:
    """The draws of held-out row `row` in the `part`-th of `parts` looks at it: the same in each validation.

    Places are spread evenly over the parts, since the loss depends on them far more than on the weights.
    """
    made = draw(shape, mixed(VALIDATION, part, row))
    place = (part + made.place) / parts
    normal = float(torch.special.ndtri(torch.tensor(min(max(place, 1e-6), 1 - 1e-6), dtype=torch.float64)))
    return RowDraw(place=place, drop=1.0, normal=normal, noise=made.noise, offset=made.offset)


def number_of(digest: str) -> int:
    """A number for a picture's fixed noise, the same in whatever data set it is; by the digest of its content, in hex."""
    return int(digest[:15], 16)
