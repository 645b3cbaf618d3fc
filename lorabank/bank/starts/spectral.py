"""Starts that are read off the base weight W (out, in): A₀ and B₀ with scaling · B₀ A₀ a part of W.

In the papers the base becomes W − scaling · B₀ A₀. Here it is shared and stays: the adapter's change is scaling · (B A − B₀ A₀),
zero at first, whose gradients in A and B are the papers' (bank/starts/frozen.py holds A₀ and B₀).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorabank.bank.kinds import EXPERTS, layer_kind
from lorabank.bank.leading import leading
from lorabank.config.adapter import AdapterConfig
from lorabank.config.inits import PREPARED, is_difference, niter
from lorabank.errors import TargetError

Pair = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank), fp32."""


def factors(U_OK: Tensor, S_K: Tensor, Vh_KI: Tensor, scaling: float) -> Pair:
    """A = √(S/scaling) Vh and B = U √(S/scaling), so that scaling · B A = U S Vh."""
    root_K = (S_K / scaling).sqrt()
    return root_K[:, None] * Vh_KI, U_OK * root_K


def principal(weight_OI: Tensor, rank: int, scaling: float) -> Pair:
    """The `rank` largest singular values and vectors of a matrix, exactly: PiSSA's start (arXiv:2404.02948, eq. 2 and 3).

    W = U S Vᵀ; A₀ = √(S[:r]/scaling) V[:, :r]ᵀ, B₀ = U[:, :r] √(S[:r]/scaling).
    """
    return factors(*leading(weight_OI, rank), scaling)


def principal_fast(weight_OI: Tensor, rank: int, scaling: float, iterations: int, generator: torch.Generator) -> Pair:
    """The same to an approximation, by `iterations` subspace iterations from a random start (section 4 there; Halko et al.,
    arXiv:0909.4061, algorithm 4.4). Without oversampling, as PEFT's `pissa_niter_<n>` has it.
    """
    start = torch.randn(weight_OI.shape[1], rank, generator=generator).to(weight_OI.device)
    Q_OR = torch.linalg.qr(weight_OI @ start).Q
    for _ in range(iterations):
        Q_IR = torch.linalg.qr(weight_OI.t() @ Q_OR).Q
        Q_OR = torch.linalg.qr(weight_OI @ Q_IR).Q
    U, S, Vh = torch.linalg.svd(Q_OR.t() @ weight_OI, full_matrices=False)
    return factors(Q_OR @ U, S, Vh, scaling)


def orthonormal(weight_OI: Tensor, rank: int) -> Pair:
    """OLoRA's start (arXiv:2406.01775, section 3): W = Q R; A₀ = R[:r], B₀ = Q[:, :r]."""
    Q, R = torch.linalg.qr(weight_OI)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def start_of_difference(config: AdapterConfig, weight_OI: Tensor, rank: int, scaling: float, generator: torch.Generator) -> Pair:
    """A₀ and B₀ of a layer, for an `init` that is a difference, in fp32 on the weight's device."""
    weight_OI = weight_OI.float()
    if config.init == "olora":
        return orthonormal(weight_OI, rank)
    iterations = niter(config.init)
    if iterations is None:
        return principal(weight_OI, rank, scaling)
    return principal_fast(weight_OI, rank, scaling, iterations, generator)


def check_start(config: AdapterConfig, layers: dict[str, nn.Module], ranks: dict[str, int]) -> None:
    """Raise TargetError for a layer that the configuration's `init` isn't for, or whose rank it can't give."""
    spectral = is_difference(config.init) or config.init in PREPARED
    if not spectral and config.init != "orthogonal":
        return
    for path, layer in layers.items():
        kind = layer_kind(layer)
        if kind is not None and (not kind.linear or kind.storage == EXPERTS):
            what = "a stack of experts" if kind.storage == EXPERTS else f"a {type(layer).__name__}"
            raise TargetError(
                f"init: {config.init!r} is for linear layers, and {path!r} is {what}. Leave it out of "
                "targets, or use init 'uniform'."
            )
        if kind is not None and spectral and ranks[path] > (most := _directions(config.init, *kind.features(layer))):
            raise TargetError(
                f"init: {config.init!r} can't give layer {path!r} the rank {ranks[path]}: there are {most} directions to start "
                f"from. Use a rank of at most {most} there (rank_pattern), or init 'uniform'."
            )
        if kind is not None and config.init == "orthogonal" and ranks[path] % 2:
            raise TargetError(f"init: 'orthogonal' needs an even rank, and layer {path!r} has {ranks[path]} (rank_pattern).")


def _directions(init: str, fan_in: int, fan_out: int) -> int:
    """How many there are: EVA's are those of the inputs alone."""
    return fan_in if init == "eva" else min(fan_in, fan_out)
