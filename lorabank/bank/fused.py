"""What a compiled block's layers get for one call: tensors only, so that another route or adapter compiles nothing anew.

`LayerCall` is all that the traced code of a `LoRALayer` reads. The capacity buffers enter through one autograd node a block,
outside the compiled code; its backward hands each slot's rows of their gradients to the slot's own leaves (decision 002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabank.errors import RoutingError
from lorabank.kernels.tables import DropTables, RouteTables

SLOTS = 8
"""Tables are made for a multiple of so many slots: few sizes, whatever the bank holds."""


@dataclass(frozen=True)
class LayerTables:
    """Where a layer keeps its slots: by slot number, on its device."""

    ranks_P2: Tensor
    """int32 (first row in the capacity buffers, ranks); (0, 0) for a slot that this layer lacks."""
    scaling_P: Tensor
    """fp32."""
    kept_scaling_P: Tensor
    """fp32: scaling / (1 − the slot's dropout), which is what dropout leaves to be done beside zeroing."""
    odds_P2: Tensor
    """int32 whose bits are unsigned: (seed of slot and layer, `segments.drop_threshold` of the slot's dropout)."""
    width: int
    """The largest rank, rounded up to 16 or to a power of two from 64 on: code is compiled for it."""


def table_width(rank: int) -> int:
    """The width for a largest rank: 16, 64, 128, 256 … so that few are ever compiled for."""
    return 16 if rank <= 16 else max(64, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class TokenTables:
    """The tokens of one input of a block."""

    routes: RouteTables
    drops: DropTables | None
    """None in a pass that drops nothing, which has code of its own."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of both."""
        return self.routes.tensors + (() if self.drops is None else self.drops.tensors)


@dataclass(frozen=True)
class LayerCall:
    """One layer's part in one call of its block."""

    A: Tensor
    B: Tensor
    layer: LayerTables
    tokens: tuple[TokenTables, ...]
    """Of the block's input, and of others with another number of tokens: what cross-attention reads."""
    rows_U: Tensor
    """(U, 0): its length is the number of rows that the route is about."""
    storage: str
    """How the base weight is kept: a name in kernels/gpu/storage.py."""
    more: tuple[Tensor, ...] = ()
    """What that storage has besides the base layer's own tensors."""
    within: tuple[int, int, bool] | None = None
    """(dimension, length, whether it is at the end) of the base weight in the first of `more`, if it is a part of that."""

    @property
    def rows(self) -> int:
        """That the route is about."""
        return self.rows_U.shape[0]

    def base_of(self, stored: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The base layer's own tensors, `stored()`. Traced by torch.compile, which would compile anew for other strides.

        The parameter's are those of the tensor that it lies in, and change when that grows.
        """
        if self.within is None:
            return stored()
        (dim, length, at_end), wide = self.within, self.more[0]
        return [wide.narrow(dim, wide.shape[dim] - length if at_end else 0, length)]

    def suits(self, x: Tensor, base: Sequence[Tensor]) -> bool:
        """Whether the layer's input has the tokens that some tables are about, in their order."""
        return (x.dtype == base[0].dtype or base[0].element_size() == 1) and self._tables_for(x) is not None

    def _tables_for(self, x: Tensor) -> TokenTables | None:
        for found in self.tokens:
            rows, tokens = self.rows_U.shape[0], found.routes.order_N.shape[0]
            ordered = x.shape[0] == rows or x.shape[0] == tokens  # `in` doesn't see sizes that vary
            if ordered and x.numel() == tokens * x.shape[-1]:
                return found
        return None

    def run(self, x: Tensor, base: list[Tensor], bias: Tensor | None) -> Tensor:
        """The layer's output. Traced by torch.compile."""
        part, tokens = self.layer, self._tables_for(x)
        assert tokens is not None  # it suits
        batch, dropped = tokens.routes, tokens.drops
        scaling_P = part.scaling_P if dropped is None else part.kept_scaling_P
        drops = [] if dropped is None else [*dropped.tensors, part.odds_P2]
        y, _ = torch.ops.lorabank.lora_linear(
            x, [*base, *self.more], bias, self.A, self.B, part.ranks_P2, scaling_P,
            batch.order_N, batch.tiles_S4, batch.chunks_C4, batch.spans_P2, self.storage, part.width, drops,
        )  # fmt: skip
        return y


@dataclass(frozen=True)
class LeafRange:
    """Where one leaf lies in the buffers that enter a block."""

    buffer: int
    start: int
    stop: int


class _Entrance(torch.autograd.Function):
    """A block's input and the capacity buffers of its layers, as results that depend on the leaves of the slots in use."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, buffers: Sequence[Tensor], ranges: Sequence[LeafRange], check: Callable[[], None], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.check = ranges, check
        ctx.set_materialize_grads(False)
        return x.detach(), *(buffer.detach() for buffer in buffers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.check()
        leaves = []
        for place in ctx.ranges:
            gradient = grad_outputs[1 + place.buffer]
            leaves.append(None if gradient is None else gradient[place.start : place.stop])
        return grad_outputs[0] if ctx.needs_input_grad[0] else None, None, None, None, *leaves


def entering(
    x: Tensor,
    buffers: Sequence[Tensor],
    leaves: Sequence[nn.Parameter],
    ranges: Sequence[LeafRange],
    structure: int,
    now: Callable[[], int],
) -> tuple[Tensor, ...]:
    """x and the buffers, as results that depend on `leaves`: the first block's input needs a gradient then, as every other's.

    Backward raises RoutingError when the bank has changed since.
    """

    def check() -> None:
        if now() != structure:
            raise RoutingError(
                "adapters were added or removed between a compiled block's forward pass and its backward. "
                "Finish backward() first, then change the bank."
            )

    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
        return x, *buffers
    return _Entrance.apply(x, buffers, ranges, check, *leaves)
