"""LoRA's products in lora.c on torch tensors. The plain twin is in ops.py and even.py; ops.py chooses.

Shapes: S segments, each of N tokens (its units × T) × I inputs, O outputs, R ranks of its own.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabank.kernels.native import library
from lorabank.kernels.native.tensors import plain, takes
from lorabank.kernels.segments import Segment

_THROUGH = struct.Struct("@5P4l2f")
_OUTER = struct.Struct("@3P3l2f")
_FLOAT = 4


def suits(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> bool:
    """Whether these products go through lora.c: fp32 on a CPU, rows in slices that don't overlap, no weights, no dropout."""
    if not (takes(x) and takes(y) and y.is_contiguous() and segments):
        return False
    end = 0
    for segment in segments:
        rows = segment.rows
        if not isinstance(rows, slice) or rows.start < end or segment.weights_U is not None or segment.dropout is not None:
            return False
        if segment.outputs is not None:
            return False
        if not all(takes(leaf) and leaf.is_contiguous() for leaf in (segment.A_RI, segment.B_RO)):
            return False
        end = rows.stop
    return library.loaded() is not None


@dataclass(frozen=True)
class Places:
    """Where each segment's tokens, and its part of a joint (Σ N · R,) vector, lie."""

    first: tuple[int, ...]
    """Each segment's first token."""
    tokens: tuple[int, ...]
    """N of each segment."""
    ranks: tuple[int, ...]
    begin: tuple[int, ...]
    """Each segment's first number in the joint vector."""
    numbers: int
    """Length of the joint vector."""
    scalings: tuple[float, ...]

    @staticmethod
    def of(units: int, segments: Sequence[Segment], x: Tensor) -> Places:
        """Of the segments that `suits` let through, for x (…, I) of `units` units."""
        unit = x.numel() // (units * x.shape[-1]) if x.numel() else 0
        slices = [s.rows for s in segments if isinstance(s.rows, slice)]
        ranks = [s.A_RI.shape[0] for s in segments]
        tokens = [(rows.stop - rows.start) * unit for rows in slices]
        ends = list(itertools.accumulate((n * r for n, r in zip(tokens, ranks, strict=True)), initial=0))
        return Places(
            tuple(rows.start * unit for rows in slices), tuple(tokens), tuple(ranks), tuple(ends[:-1]), ends[-1],
            tuple(s.scaling for s in segments),
        )  # fmt: skip


def expand_into(y: Tensor, x: Tensor, places: Places, segments: Sequence[Segment]) -> Tensor:
    """Adds every segment's change to y (…, O) in place; returns the segments' xA, (Σ N · R,), one behind the other."""
    shrunk = torch.empty(places.numbers, dtype=torch.float32)
    A, B = [s.A_RI for s in segments], [s.B_RO for s in segments]
    _through(places, x.contiguous(), A, B, shrunk, y, out_scales=places.scalings)
    return shrunk


def gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    places: Places,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    shrunk: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Adds the adapters' part to dx in place; returns dA and dB of every segment, in the order A₁ B₁ A₂ B₂ …

    `shrunk`: what `expand_into` gave. `needs`: which of the gradients are wanted, in that order.
    """
    # what was saved may come back in another form, from saved_tensors_hooks
    x, dy, shrunk = plain(x), plain(dy), plain(shrunk)
    A, B = [plain(a) for a in A], [plain(b) for b in B]
    dxa = torch.empty(places.numbers, dtype=torch.float32)
    _through(places, dy, B, A, dxa, dx, mid_scales=places.scalings)
    dA = _outer(places, dxa, x, needs[::2], None)
    dB = _outer(places, shrunk, dy, needs[1::2], places.scalings)
    return [gradient for pair in zip(dA, dB, strict=True) for gradient in pair]


def _through(
    places: Places,
    into: Tensor,
    P: Sequence[Tensor],
    Q: Sequence[Tensor],
    mid: Tensor,
    out: Tensor | None,
    *,
    mid_scales: Sequence[float] | None = None,
    out_scales: Sequence[float] | None = None,
) -> None:
    count, inputs, outputs = len(P), P[0].shape[1], Q[0].shape[1]
    in_at, mid_at, out_at = into.data_ptr(), mid.data_ptr(), 0 if out is None else out.data_ptr()
    ones = (1.0,) * count
    calls = b"".join(
        _THROUGH.pack(
            in_at + first * inputs * _FLOAT, p.data_ptr(), q.data_ptr(), mid_at + begin * _FLOAT,
            out_at and out_at + first * outputs * _FLOAT, tokens, inputs, outputs, ranks, mid_scale, out_scale,
        )
        for first, tokens, ranks, begin, p, q, mid_scale, out_scale in zip(
            places.first, places.tokens, places.ranks, places.begin, P, Q, mid_scales or ones, out_scales or ones, strict=True
        )
    )  # fmt: skip
    functions = library.loaded()
    assert functions is not None  # `suits` asked for it
    if functions.lora_through(calls, count, torch.get_num_threads()):
        raise MemoryError("no memory for the packed copy of a LoRA layer's A and B")


def _outer(
    places: Places, narrow: Tensor, wide: Tensor, needs: Sequence[bool], scales: Sequence[float] | None
) -> list[Tensor | None]:
    """pᵀ x of the segments that need it: (R, features) each, views of one tensor."""
    count, features = len(needs), wide.shape[-1]
    ranks = [rank if need else 0 for rank, need in zip(places.ranks, needs, strict=True)]
    joint = torch.empty(sum(ranks), features, dtype=torch.float32)
    narrow_at, wide_at, joint_at, row = narrow.data_ptr(), wide.data_ptr(), joint.data_ptr(), 0
    calls: list[bytes] = []
    for first, tokens, rank, begin, scale in zip(
        places.first, places.tokens, ranks, places.begin, scales or (1.0,) * count, strict=True
    ):
        if rank:
            calls.append(
                _OUTER.pack(
                    narrow_at + begin * _FLOAT, wide_at + first * features * _FLOAT, joint_at + row * features * _FLOAT,
                    tokens, rank, features, scale, 0.0,
                )
            )  # fmt: skip
            row += rank
    functions = library.loaded()
    assert functions is not None
    functions.lora_outer(b"".join(calls), len(calls), torch.get_num_threads())
    return [part if need else None for part, need in zip(joint.split(ranks), needs, strict=True)]
