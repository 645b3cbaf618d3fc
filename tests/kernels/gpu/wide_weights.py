"""Frozen weights with borders, made and filled as engine/borders.py does it: what ops over them take as `bases`.

Weights (O, I); A, B capacity buffers; `ranks` (first row, rank) of each slot; `rows`: of the buffers, up to the last in use. Rows
of a shadow that nobody writes are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorabank.kernels.gpu import border_writing
from lorabank.kernels.gpu.border_writing import border_width

NAN = float("nan")
Tensors = Sequence[Tensor]


def joined(weights: Tensors, As: Tensors, Bs: Tensors, ranks: Tensors, rows: int) -> list[list[Tensor]]:
    """Of layers that read one x, for each of them."""
    count = len(weights)
    pad = border_width(rows * count)
    assert pad, f"{rows} rows of {count} layers don't fit"
    share, shadow, bases = pad // count, _shadow(weights[0], pad), []
    for which, weight in enumerate(weights):
        wide, mine = _room(weight, columns=pad), slice(which * share, (which + 1) * share)
        view, behind = wide[:, : weight.shape[1]], wide[:, weight.shape[1] :]
        poison = _fill(weight, As[which], Bs[which], ranks[which], rows, view, behind[:, mine], shadow[mine])
        bases.append([view, wide, shadow, poison])
    return bases


def mlp(weights: Tensors, As: Tensors, Bs: Tensors, ranks: Tensors, rows: int) -> list[list[Tensor]]:
    """Of a gated MLP's gate, up and down."""
    gate, up, down = weights
    pad, inputs = border_width(rows), gate.shape[1]
    assert pad, f"{rows} rows don't fit"
    shadow, last = _shadow(gate, 2 * pad), _shadow(gate, pad)
    before, behind, below = _room(gate, columns=pad), _room(up, columns=pad), _room(down, rows=pad)
    views = before[:, pad:], behind[:, :inputs], below[: len(down)]
    borders = before[:, :pad], behind[:, inputs:], below[len(down) :].t()
    shadows = shadow[:pad], shadow[pad:], last
    bases = []
    for which, (wide, whole) in enumerate(((before, shadow), (behind, shadow), (below, last))):
        leaves = (As, Bs) if which < 2 else (Bs, As)
        poison = _fill(
            weights[which], leaves[0][which], leaves[1][which], ranks[which], rows, views[which], borders[which], shadows[which]
        )
        bases.append([views[which], wide, whole, poison])
    return bases


def _room(weight: Tensor, *, rows: int = 0, columns: int = 0) -> Tensor:
    return weight.new_zeros(weight.shape[0] + rows, weight.shape[1] + columns)


def _shadow(weight: Tensor, rows: int) -> Tensor:
    return weight.new_full((rows, weight.shape[1]), NAN)


def _fill(
    weight: Tensor, other: Tensor, leaf: Tensor, ranks: Tensor, rows: int, view: Tensor, border: Tensor, shadow: Tensor
) -> Tensor:
    """Put a weight and its leaves into their places; the layer's poison."""
    view.copy_(weight)
    (poison,) = border_writing.poison_like(ranks, 1, max(weight.shape))
    border_writing.write(
        [
            border_writing.Border(
                border=border, leaf=leaf.detach(), shadow=shadow, other=other.detach(), ranks=ranks, poison=poison, rows=rows
            )
        ]
    )
    return poison
