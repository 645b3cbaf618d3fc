"""What adapters add to some rows of a layer's output, in one autograd node: a vector, rows of a table, a few columns.

Each change is computed by plain torch, in as small a shape as broadcasts; the node copies the output once, writes only the rows
of the slots, rounds each change once into the output's dtype, and sums the gradient back into the change's shape.
Shapes: U units × whatever a unit is of; O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorabank.kernels.segments import Rows, take_units


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One slot's change of its own rows of an output."""

    rows: Rows
    change: Tensor
    """Broadcasts to these units of the output (units, …), or to their `columns_n`."""
    columns_n: Tensor | None = None
    """int64 indices along the last dimension, each once; None for all of it."""


class _AddChanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, shape: Sequence[int], additions: Sequence[Addition], *changes: Tensor) -> Tensor:
        out = y.clone(memory_format=torch.contiguous_format)
        out_U = out.view(*shape)
        for addition, change in zip(additions, changes, strict=True):
            rows, columns = addition.rows, addition.columns_n
            mine = take_units(out_U, rows)
            part = mine if columns is None else mine.index_select(-1, columns)
            total = (part.to(change.dtype) + change).to(out.dtype)
            if columns is not None:
                total = mine.index_copy_(-1, columns, total)  # of a slice `mine` is the output itself
            if not isinstance(rows, slice):
                out_U.index_copy_(0, rows, total)
            elif columns is None:
                mine.copy_(total)
        ctx.shape, ctx.places = tuple(shape), [(a.rows, a.columns_n) for a in additions]
        ctx.changes = [(change.shape, change.dtype) for change in changes]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        dy_U = dy.reshape(ctx.shape)
        gradients: list[Tensor | None] = []
        for (rows, columns), (shape, dtype), needed in zip(ctx.places, ctx.changes, ctx.needs_input_grad[3:], strict=True):
            if not needed:
                gradients.append(None)
                continue
            mine = take_units(dy_U, rows)
            part = mine if columns is None else mine.index_select(-1, columns)
            gradients.append(part.to(dtype).sum_to_size(shape))
        return dy, None, None, *gradients


def add_changes(y: Tensor, units: Sequence[int], additions: Sequence[Addition]) -> Tensor:
    """y with every addition in its rows; other rows to the last bit. `units`: the shape (U, …) that y is seen in for that."""
    return _AddChanges.apply(y, units, additions, *(addition.change for addition in additions))
