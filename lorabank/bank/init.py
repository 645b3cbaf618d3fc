"""How A and B start. B starts at zero, so a new adapter changes nothing (LoRA, arXiv:2106.09685, section 4.1).

Of an embedding A starts at zero instead and B from N(0, 1), as loralib and PEFT have it: each id's row of A learns at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

InitFunction = Callable[[int, int, torch.Generator], Tensor]
"""(rank, in_features, generator) → A, fp32 (rank, in) on the CPU."""


def uniform(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """U(−1/√in, 1/√in): Kaiming's bound with a = √5, the customary start."""
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def gaussian(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """N(0, 1/rank²)."""
    return torch.empty(rank, in_features).normal_(0.0, 1.0 / rank, generator=generator)


def orthogonal(rank: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B random, each in half of the ranks' directions, which are at right angles: B A = 0 (PEFT's `orthogonal`).

    With Q an orthogonal (rank, rank): A = Q[::2]ᵀ X/10 and B = Y Q[1::2]/10, X (rank/2, in) and Y (out, rank/2) from N(0, 1).
    """
    Q = torch.linalg.qr(torch.empty(rank, rank).normal_(generator=generator)).Q
    X = torch.empty(rank // 2, size[0]).normal_(generator=generator)
    Y = torch.empty(size[1], rank // 2).normal_(generator=generator)
    return Q[::2].t() @ X / 10, Y @ Q[1::2] / 10


INITS: Mapping[str, InitFunction] = {"uniform": uniform, "gaussian": gaussian}


def initial_A(init: str, rank: int, in_features: int, seed: int, path: str) -> Tensor:
    """A layer's first A where it is random, whatever B is."""
    return INITS[init](rank, in_features, path_generator(seed, path))


def normal(shape: tuple[int, ...], spread: float, seed: int, path: str) -> Tensor:
    """N(0, spread²), as transformers starts a new head's weight."""
    return torch.empty(shape).normal_(0.0, spread, generator=path_generator(seed, path))


def path_generator(seed: int, path: str) -> torch.Generator:
    """What a layer's random start is drawn from."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(path.encode())) % 2**63)


def initial(init: str, rank: int, size: tuple[int, int], seed: int, path: str, *, looks_up: bool) -> tuple[Tensor, Tensor | None]:
    """A layer's first A (rank, in) and B (out, rank), None for zeros; `size` is (in, out), `looks_up` an embedding's.

    They depend on the seed, the layer's path and the shape alone: not on other adapters, nor on the device.
    """
    if looks_up:
        return torch.zeros(rank, size[0]), torch.empty(size[1], rank).normal_(generator=path_generator(seed, path))
    if init == "orthogonal":
        return orthogonal(rank, size, path_generator(seed, path))
    return initial_A(init, rank, size[0], seed, path), None
