"""What adapters add to some rows of an output, against plain indexing, and its gradients against finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorabank.kernels.additions import Addition, add_changes
from lorabank.kernels.segments import Rows

ROWS: list[Rows] = [slice(1, 3), torch.tensor([3, 0])]
COLUMNS = torch.tensor([4, 1])


def plain(y_UTO: Tensor, additions: Sequence[Addition]) -> Tensor:
    """The definition, row by row."""
    out = y_UTO.clone()
    for addition in additions:
        rows = torch.arange(len(y_UTO))[addition.rows]
        change = addition.change.expand(len(rows), y_UTO.shape[1], -1)
        for place, row in enumerate(rows.tolist()):
            columns = torch.arange(y_UTO.shape[-1]) if addition.columns_n is None else addition.columns_n
            out[row][:, columns] = (out[row][:, columns].to(change.dtype) + change[place]).to(out.dtype)
    return out


def made(shape: tuple[int, ...], columns: Tensor | None, dtype: torch.dtype) -> list[Addition]:
    generator = torch.Generator().manual_seed(0)
    return [
        Addition(rows=rows, change=torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(), columns_n=columns)
        for rows in ROWS
    ]


@pytest.mark.parametrize("columns", [None, COLUMNS])
@pytest.mark.parametrize("lead", [(), (2, 1), (2, 3)])
def test_it_is_the_definition(lead: tuple[int, ...], columns: Tensor | None) -> None:
    shape = (*lead, 5 if columns is None else 2)
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.randn(4, 3, 5).to(dtype)
        before = y.clone()
        additions = made(shape, columns, torch.float32)
        assert torch.equal(add_changes(y.view(12, 5), (4, 3, 5), additions).view(4, 3, 5), plain(y, additions))
        assert torch.equal(y, before)
    only = made(shape, columns, torch.float32)[:1]
    assert torch.equal(add_changes(y, (4, 3, 5), only)[[0, 3]], y[[0, 3]])


@pytest.mark.parametrize("columns", [None, COLUMNS])
@pytest.mark.parametrize("lead", [(), (2, 1), (2, 3)])
def test_gradients_are_those_of_finite_differences(lead: tuple[int, ...], columns: Tensor | None) -> None:
    additions = made((*lead, 5 if columns is None else 2), columns, torch.float64)
    y = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)

    def run(y: Tensor, *changes: Tensor) -> Tensor:
        given = [Addition(rows=a.rows, change=c, columns_n=a.columns_n) for a, c in zip(additions, changes, strict=True)]
        return add_changes(y, (4, 3, 5), given)

    assert torch.autograd.gradcheck(run, (y, *(addition.change for addition in additions)))
