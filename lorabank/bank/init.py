"""How A starts. B starts at zero, so a new adapter changes nothing (LoRA, arXiv:2106.09685, section 4.1)."""

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


INITS: Mapping[str, InitFunction] = {"uniform": uniform, "gaussian": gaussian}


def initial_A(init: str, rank: int, in_features: int, seed: int, path: str) -> Tensor:
    """A layer's first A. Depends on the seed, the layer's path and the shape alone: not on other adapters, nor on the device."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(path.encode())) % 2**63)
    return INITS[init](rank, in_features, generator)
