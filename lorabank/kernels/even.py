"""Runs of segments that are alike (as many units each, one rank, side by side in the batch), as batched products.

Eight small products cost a CPU more than one of their joint size: a call and a thread barrier each. A batched product of the
run costs what one slot of all its rows would. What a segment computes is unchanged: a run of one takes the plain path in ops.py.
Shapes: S segments × N tokens × I inputs, O outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabank.kernels.precision import outer, rounds
from lorabank.kernels.segments import Segment


def even_runs(segments: Sequence[Segment], x: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of the maximal runs of alike segments, in order, covering all of them.

    Runs need x and y (or dy) in the dtype that is computed in: a sum that is rounded on the way takes the plain path.
    """
    runs: list[tuple[int, int]] = []
    for i, segment in enumerate(segments):
        computed = segment.A_RI.dtype == x.dtype or rounds(x)
        if runs and _alike(segments[i - 1], segment) and computed and x.dtype == y.dtype:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _alike(left: Segment, right: Segment) -> bool:
    a, b = left.rows, right.rows
    return (
        isinstance(a, slice)
        and isinstance(b, slice)
        and a.stop == b.start
        and a.stop - a.start == b.stop - b.start
        and left.A_RI.shape == right.A_RI.shape
        and left.A_RI.dtype == right.A_RI.dtype
        and left.scaling == right.scaling
        and left.weights_U is right.weights_U is left.dropout is right.dropout is left.outputs is right.outputs is None
    )


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first dimension: a view where they lie one behind the other in one storage, else a copy."""
    first, size = tensors[0], tensors[0].numel()
    storage = first.untyped_storage().data_ptr()
    for i, tensor in enumerate(tensors):
        beside = tensor.untyped_storage().data_ptr() == storage and tensor.storage_offset() == first.storage_offset() + i * size
        if not beside or not tensor.is_contiguous():
            return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def units_of(x_UTI: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The run's rows, (S, N, I): a view of a contiguous x."""
    first, last = segments[0].rows, segments[-1].rows
    assert isinstance(first, slice) and isinstance(last, slice)  # what `_alike` lets through
    return x_UTI[first.start : last.stop].reshape(len(segments), -1, x_UTI.shape[-1])


def _tensors(segments: Sequence[Segment], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (S, R, I) and B (S, R, O) of a run, in the dtype that is computed in."""
    return stacked([s.A_RI for s in segments]).to(dtype), stacked([s.B_RO for s in segments]).to(dtype)


def expand_run(y_UTO: Tensor, x_UTI: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Adds the run's change to y in place; returns each segment's xA, (N, R)."""
    A_SRI, B_SRO = _tensors(segments, x_UTI.dtype)
    xa_SNR = torch.bmm(units_of(x_UTI, segments), A_SRI.transpose(1, 2))
    units_of(y_UTO, segments).baddbmm_(xa_SNR, B_SRO, alpha=segments[0].scaling)
    return list(xa_SNR.unbind())


def run_gradients(
    dx_UTI: Tensor | None,
    dy_UTO: Tensor,
    x_UTI: Tensor,
    segments: Sequence[Segment],
    shrunk: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Adds the run's part to dx in place; returns dA and dB of each of its segments, in the order A₁ B₁ A₂ B₂ …"""
    scaling, dy_SNO = segments[0].scaling, units_of(dy_UTO, segments)
    A_SRI, B_SRO = _tensors(segments, x_UTI.dtype)
    dxa_SNR = torch.bmm(dy_SNO, B_SRO.transpose(1, 2)).mul_(scaling)
    if dx_UTI is not None:
        units_of(dx_UTI, segments).baddbmm_(dxa_SNR, A_SRI)
    count = len(segments)
    dA = list(outer(dxa_SNR.transpose(1, 2), units_of(x_UTI, segments)).unbind()) if any(needs[::2]) else [None] * count
    dB = list(outer(stacked(shrunk).transpose(1, 2), dy_SNO).mul_(scaling).unbind()) if any(needs[1::2]) else [None] * count
    pairs = [(a, b) for a, b in zip(dA, dB, strict=True)]
    return [g if need else None for g, need in zip([g for pair in pairs for g in pair], needs, strict=True)]
