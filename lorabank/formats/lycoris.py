"""LyCORIS' other forms as plain LoRA: Tucker convolutions exactly, LoHa and LoKr by a singular value decomposition.

LoHa: ΔW = s · (W1a W1b) ⊙ (W2a W2b), of rank r² at most (FedPara, Hyeon-Woo et al., arXiv:2108.06098, proposition 1).
LoKr: ΔW = s · W1 ⊗ W2, of rank r(W1) · r(W2) (Yeh et al., arXiv:2309.14859, section 3.2).
Tucker: a convolution's k × k core between two 1 × 1 maps (arXiv:2108.06098, proposition 3).
Neither ΔW is decomposed as a whole where its factors' decompositions give the same: those are much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.errors import AdapterFileError

TUCKER_KEYS = ("lora_mid.weight",)
LOHA_KEYS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_KEYS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
EXACT = 1e-6
"""Relative error below which a decomposition counts as the whole: float32's rounding."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """ΔW without its scaling as B (out, rank) and A (rank, in · kernel), and what a smaller rank lost of it."""

    A: Tensor
    B: Tensor
    error: float
    """‖lost‖ / ‖ΔW‖, Frobenius; 0 where nothing was left out."""
    full_rank: int
    """The rank that would lose nothing but rounding."""


def tucker(up: Tensor, mid: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(A (r, in, *kernel), B (out, r)) of a Tucker convolution: the core is multiplied into A; exact up to rounding.

    Shapes: up (out, r, 1, 1), mid (r, r, *kernel), down (r, in, 1, 1).
    """
    A = torch.einsum("kl...,li->ki...", mid.double(), down.flatten(1).double())
    return A.to(torch.promote_types(mid.dtype, torch.float32)), up.flatten(1)


def loha(tensors: Mapping[str, Tensor], rank: int | None) -> Factors:
    """LoHa as LoRA of its full rank, or of `rank`. Without Tucker: w_a (out, r), w_b (r, in · kernel)."""
    halves = [_half(tensors, side) for side in "12"]
    (a1, b1), (a2, b2) = halves
    # row o of ΔW is Σ over pairs (i, j) of a1[o, i] a2[o, j] · b1[i] ∘ b2[j]
    if a1.shape[1] * a2.shape[1] < min(len(a1), b1.shape[1]):
        B = torch.einsum("oi,oj->oij", a1, a2).flatten(1)
        A = torch.einsum("in,jn->ijn", b1, b2).flatten(0, 1)
        return _reduced(B, A, rank)
    return _reduced((a1 @ b1) * (a2 @ b2), None, rank)


def lokr(tensors: Mapping[str, Tensor], rank: int | None) -> Factors:
    """LoKr as LoRA of its full rank, or of `rank`: the decomposition of W1 ⊗ W2 is that of W1 ⊗ that of W2."""
    first, second = _kron_half(tensors, "1"), _kron_half(tensors, "2")
    u1, s1, v1 = torch.linalg.svd(first, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(second.flatten(1), full_matrices=False)
    # Kronecker products of columns are the columns of the product
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    kept, error, full = _kept(values[order], rank)
    i, j = order[:kept] // len(s2), order[:kept] % len(s2)
    root = values[order[:kept]].sqrt()
    B = torch.einsum("ak,ck->ack", u1[:, i], u2[:, j]).flatten(0, 1) * root
    A = torch.einsum("kb,kd->kbd", v1[i], v2[j]).flatten(1) * root[:, None]
    return Factors(A=A.float(), B=B.float(), error=error, full_rank=full)


def lokr_delta(tensors: Mapping[str, Tensor]) -> Tensor:
    """W1 ⊗ W2, (out, in · kernel), float64: the definition."""
    return torch.kron(_kron_half(tensors, "1"), _kron_half(tensors, "2").flatten(1))


def loha_delta(tensors: Mapping[str, Tensor]) -> Tensor:
    """(W1a W1b) ⊙ (W2a W2b), (out, in · kernel), float64: the definition."""
    (a1, b1), (a2, b2) = (_half(tensors, side) for side in "12")
    return (a1 @ b1) * (a2 @ b2)


def kernel_in(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The kernel where a file's shapes tell it; () where they are flat."""
    for name in ("hada_t1", "lokr_t2", "lokr_w2"):
        if name in tensors and tensors[name].ndim > 2:
            return tuple(tensors[name].shape[2:])
    return ()


def loha_rank(tensors: Mapping[str, Tensor]) -> int:
    """The r of α/r."""
    return len(tensors["hada_w1_b"])


def lokr_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """The r of α/r; None where both factors are whole, which have no scaling."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in tensors:
            return len(tensors[name])
    return None


def check(where: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError where a LoHa's or LoKr's tensors are incomplete or don't fit each other."""
    names = set(tensors) & {*LOHA_KEYS, *LOKR_KEYS}
    if any(key in names for key in LOHA_KEYS):
        wanted = [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *extra} for extra in ((), ("hada_t1", "hada_t2"))]
    else:
        first: list[set[str]] = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}]
        second: list[set[str]] = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}]
        wanted = [a | b for a in first for b in second]
    if names not in wanted:
        missing = sorted(min((whole - names for whole in wanted), key=len))
        lacks = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(sorted(names))}, which don't belong together"
        raise AdapterFileError(f"{where}: layer {name!r} {lacks}: the file is incomplete. Fetch it again.")
    try:
        loha_shape(tensors) if "hada_w1_a" in names else lokr_shape(tensors)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{key} {tuple(tensors[key].shape)}" for key in sorted(names))
        raise AdapterFileError(
            f"{where}: layer {name!r} has tensors that don't fit each other: {shapes}. Fetch it again."
        ) from error


def loha_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in · kernel). Raises RuntimeError or ValueError where there is none."""
    shapes = []
    for side in "12":
        a, b = _half({name: torch.empty_like(value, device="meta") for name, value in tensors.items()}, side)
        shapes.append((a @ b).shape)
    if shapes[0] != shapes[1]:
        raise ValueError("the halves differ")
    return shapes[0][0], shapes[0][1]


def lokr_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in · kernel). Raises RuntimeError or ValueError where there is none."""
    meta = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    first, second = _kron_half(meta, "1"), _kron_half(meta, "2").flatten(1)
    if first.ndim != 2 or second.ndim != 2:
        raise ValueError("no matrices")
    return len(first) * len(second), first.shape[1] * second.shape[1]


def _half(tensors: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """One of LoHa's two products as (out, r) and (r, in · kernel), float64."""
    a, b = tensors[f"hada_w{side}_a"].double(), tensors[f"hada_w{side}_b"].double()
    core = tensors.get(f"hada_t{side}")
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T, torch.einsum("ij...,jn->in...", core.double(), b).flatten(1)  # a is (r, out) beside a core


def _kron_half(tensors: Mapping[str, Tensor], side: str) -> Tensor:
    """One of LoKr's two factors, float64; the second has a kernel where it isn't flat."""
    if f"lokr_w{side}" in tensors:
        return tensors[f"lokr_w{side}"].double()
    a, b = tensors[f"lokr_w{side}_a"].double(), tensors[f"lokr_w{side}_b"].double()
    core = tensors.get(f"lokr_t{side}")
    if core is None:
        return (a @ b.flatten(1)).view(len(a), *b.shape[1:])
    return torch.einsum("ij...,ip,jq->pq...", core.double(), a, b)


def _reduced(B: Tensor, A: Tensor | None, rank: int | None) -> Factors:
    """The best approximation of B A (or of B alone), whose thin factors are decomposed in their stead."""
    if A is None:
        u, s, v = torch.linalg.svd(B, full_matrices=False)
    else:
        qb, rb = torch.linalg.qr(B)
        qa, ra = torch.linalg.qr(A.T)
        u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        u, v = qb @ u, v @ qa.T
    kept, error, full = _kept(s, rank)
    root = s[:kept].sqrt()
    return Factors(A=(root[:, None] * v[:kept]).float(), B=(u[:, :kept] * root).float(), error=error, full_rank=full)


def _kept(values: Tensor, rank: int | None) -> tuple[int, float, int]:
    """(singular values kept, the relative error of that, the rank whose error is rounding)."""
    total = math.sqrt(float(values.square().sum()))
    if not total:
        return 1, 0.0, 1
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / total  # error when only the values before are kept
    full = max(1, int((tails > EXACT).sum()))
    kept = full if rank is None else min(rank, full)
    return kept, float(tails[kept]) if kept < len(values) else 0.0, full
