"""Rows of pictures as a pass takes them; rows of several sizes in passes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorabank.bank.routing import RowRoute
from lorabank.engine.model_batch import ModelBatch, Tensors
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import row_losses
from lorabank.tasks.diffusion.speed import as_it_is


def picture_losses(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """Each row's weighted mean squared error (N,)."""
    if torch.is_grad_enabled() or not isinstance(model, ImageModel):
        return row_losses(inputs, model(inputs))
    with as_it_is(model.denoiser):
        return row_losses(inputs, model(inputs))


@dataclass(frozen=True, kw_only=True)
class PictureBatch(ModelBatch):
    """Pictures of one size or of several. `inputs` holds them where they are of one, and nothing where they aren't."""

    each: tuple[Mapping[str, Tensor], ...] = field(repr=False)
    """Every row's tensors."""

    @property
    def groups(self) -> list[list[int]]:
        """Rows that can be in one pass."""
        return list(_by_size(self.each).values())

    def select(self, rows: Sequence[int]) -> PictureBatch:
        """Some of the rows."""
        each = tuple(self.each[i] for i in rows)
        return replace(
            self,
            inputs=_stacked(each),
            routes=tuple(self.routes[i] for i in rows),
            weights=tuple(self.weights[i] for i in rows),
            sizes=tuple(self.sizes[i] for i in rows),
            examples_E=self.examples_E[torch.tensor(list(rows))],
            each=each,
        )


def picture_batch(
    each: Sequence[Mapping[str, Tensor]], routes: Sequence[RowRoute], *, sizes: Sequence[int], examples: Sequence[int]
) -> PictureBatch:
    """`each`: a row's tensors without the dimension of rows, `clean` (C, H, W) among them."""
    return PictureBatch(
        inputs=_stacked(each),
        targets={},
        loss=picture_losses,
        routes=tuple(routes),
        weights=(1.0,) * len(routes),
        sizes=tuple(sizes),
        examples_E=torch.as_tensor(list(examples)),
        each=tuple(each),
    )


def _stacked(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(_by_size(each)) > 1:
        return {}
    return {name: torch.stack([row[name] for row in each]) for name in each[0]}


def _by_size(each: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(each):
        found.setdefault(tuple(row["clean"].shape), []).append(i)
    return found
