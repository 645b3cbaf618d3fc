"""LoHa, LoKr and Tucker layers of a kohya file as LoRA layers: their scaling, kernel and checks, around `lycoris`' formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats import lycoris
from lorabank.formats.adapter import AdapterLayer

KEYS = (*lycoris.LOHA_KEYS, *lycoris.LOKR_KEYS)


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """How a layer became LoRA."""

    kind: str
    """`LoHa` or `LoKr`."""
    rank: int
    full_rank: int
    """The rank that would lose nothing but rounding."""
    error: float
    """‖lost‖ / ‖ΔW‖, Frobenius."""


def decomposed(
    where: str, name: str, tensors: Mapping[str, Tensor], alpha: float | None, *, rank: int | None, kernel: tuple[int, ...]
) -> tuple[AdapterLayer, Decomposed]:
    """A LoHa or LoKr layer as LoRA of at most `rank`, float32. Raises AdapterFileError where its tensors don't fit.

    `kernel`: the base layer's, () of a linear one, where the file's shapes are flat and don't tell.
    """
    lycoris.check(where, name, tensors)
    if "hada_w1_a" in tensors:
        kind, found, divisor = "LoHa", lycoris.loha(tensors, rank), lycoris.loha_rank(tensors)
    else:
        kind, found, divisor = "LoKr", lycoris.lokr(tensors, rank), lycoris.lokr_rank(tensors)
    scaling = 1.0 if alpha is None or divisor is None else alpha / divisor
    kernel = lycoris.kernel_in(tensors) or kernel
    size = math.prod(kernel)
    if found.A.shape[1] % size:
        raise AdapterFileError(
            f"{where}: layer {name!r} is a convolution of {' × '.join(map(str, kernel))}, and its {found.A.shape[1]} numbers an "
            "output aren't a multiple of that. Fetch the file again."
        )
    A = found.A.view(len(found.A), -1, *kernel)
    how = Decomposed(kind=kind, rank=len(A), full_rank=found.full_rank, error=found.error)
    return AdapterLayer(A.contiguous(), found.B.contiguous(), scaling), how


def tucker_pair(where: str, name: str, up: Tensor, mid: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of a Tucker convolution. Raises AdapterFileError where its three tensors don't fit each other."""
    rank = mid.shape[0]
    ones = all(size == 1 for size in (*up.shape[2:], *down.shape[2:]))
    if mid.ndim < 3 or down.ndim < 2 or up.ndim < 2 or not ones or (up.shape[1], down.shape[0]) != (rank, mid.shape[1]):
        raise AdapterFileError(
            f"{where}: layer {name!r} has tensors that don't fit each other: lora_up {tuple(up.shape)}, lora_mid "
            f"{tuple(mid.shape)}, lora_down {tuple(down.shape)}. Fetch it again."
        )
    return lycoris.tucker(up, mid, down)
