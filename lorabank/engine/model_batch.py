"""`ModelBatch`: rows of any number of adapters for a model of any kind: pictures, sounds, texts with labels. N rows.

Where `Batch` knows tokens, this knows tensors by name, one entry a row each, and a loss that gives a number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorabank.bank.routing import RowRoute
from lorabank.errors import DataError
from lorabank.kernels.tables import send

Tensors = Mapping[str, Tensor]
RowLoss = Callable[[nn.Module, Tensors, Tensors], Tensor]
"""(model, inputs, targets) → (N,) sums, differentiable. A row's number must depend on that row alone, or adapters in one batch
would disturb one another; a sum over its parts (tokens, pictures), since `optim_step` divides by the adapter's own weights.

One function for all batches of a run: captured passes are kept by it, and what it closes over is frozen in them."""


@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """What one forward pass sees."""

    inputs: Tensors
    """What the model is called with, by argument; dimension 0 of each is the rows."""
    targets: Tensors
    """What the loss compares with; dimension 0 of each is the rows."""
    loss: RowLoss
    routes: tuple[RowRoute, ...]
    """One a row."""
    weights: tuple[float, ...]
    """How much each row counts: what its loss is a sum over (1 a picture, the tokens of a transcript)."""
    sizes: tuple[int, ...]
    """Each row's share of the work, padding aside, in any unit; see `cost`."""
    examples_E: Tensor
    """int64 identity of each row within its adapter's optimizer step: what its dropout is drawn from."""

    def __post_init__(self) -> None:
        rows = len(self.routes)
        if not rows:
            raise DataError("ModelBatch: no rows")
        for what, count in (("weights", len(self.weights)), ("sizes", len(self.sizes)), ("examples", len(self.examples_E))):
            if count != rows:
                raise DataError(f"ModelBatch: {rows} routes but {count} {what}")
        for name, tensor in (*self.inputs.items(), *self.targets.items()):
            if tensor.ndim == 0 or tensor.shape[0] != rows:
                raise DataError(f"ModelBatch: {name!r} has shape {tuple(tensor.shape)}, expected {rows} rows in dimension 0")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.routes)

    @property
    def groups(self) -> list[list[int]]:
        """Rows that can be in one pass: all, but for a task whose rows are of shapes that can't be padded to one another."""
        return [list(range(self.rows))]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The rows' sizes, by the name that `Batch` has for them."""
        return self.sizes

    @property
    def cost(self) -> int:
        """Work of a pass: rows × the largest size, since rows are padded to one another."""
        return self.rows * max(self.sizes)

    @property
    def references(self) -> None:
        """No row is another's reference here."""
        return

    @property
    def example_routes(self) -> tuple[RowRoute, ...]:
        """A row is an example."""
        return self.routes

    def examples_of(self, rows: Sequence[int]) -> list[int]:
        """A row is an example."""
        return list(rows)

    def example_weights(self) -> list[float]:
        """How much each row counts."""
        return list(self.weights)

    def to(self, device: torch.device) -> ModelBatch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: send(tensor, device) for name, tensor in self.inputs.items()},
            targets={name: send(tensor, device) for name, tensor in self.targets.items()},
        )

    def select(self, rows: Sequence[int]) -> ModelBatch:
        """Some of the rows. Parts of a batch give, added up, the gradients of the whole."""
        if not rows:
            raise DataError("ModelBatch.select: no rows")
        index = torch.tensor(list(rows))
        return replace(
            self,
            inputs={name: tensor[index.to(tensor.device)] for name, tensor in self.inputs.items()},
            targets={name: tensor[index.to(tensor.device)] for name, tensor in self.targets.items()},
            routes=tuple(self.routes[i] for i in rows),
            weights=tuple(self.weights[i] for i in rows),
            sizes=tuple(self.sizes[i] for i in rows),
            examples_E=self.examples_E[index],
        )
