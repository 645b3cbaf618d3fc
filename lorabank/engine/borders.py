"""The frozen weights of a block's gated MLP, moved into tensors with room for A or B at their border (kernels/gpu/bordered.py).

The model's parameters stay where they are in the model and become views of the wide tensors, equal to the last bit; `release`
makes them tensors of their own again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorabank.bank.fused import LayerTables
from lorabank.bank.layers import LoRALayer

STORAGE = "bordered"
"""Its name in kernels/gpu/storage.py."""


class Borders:
    """The borders of one gated MLP's gate, up and down."""

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        """`layers`: gate, up and down, as `gated_mlps` finds them."""
        self.layers = tuple(layers)
        self._poison = torch.empty(0)
        self._pad = 0
        self._places: list[int] = []
        """Where the wide tensors lie. Only the parameters hold them, so that a model that is moved takes them along."""

    @property
    def tensors(self) -> list[Tensor]:
        """What the weights are views of, and what `fill` finds out."""
        return [*self._wide(), self._poison] if self._in_place() else []

    def prepare(self, tables: Sequence[LayerTables]) -> bool:
        """Move the weights where they aren't in place yet, or the room has become too small; False where borders don't pay.

        `tables`: of the three layers.
        """
        from lorabank.kernels.gpu import bordered  # here, since it imports Triton

        pad = bordered.border_width(max(layer.store.capacity for layer in self.layers))
        if pad == 0 or max(table.width for table in tables) > bordered.WIDEST_RANK:
            self.release()
            return False
        if pad != self._pad or not self._in_place():
            self._place(pad)
        ranks = tables[0].ranks_P2
        if self._poison.shape[1:2] != ranks.shape[:1] or self._poison.device != ranks.device:
            self._poison = bordered.poison_like(ranks, self._weights[0].shape[0])
        return True

    def fill(self, tables: Sequence[LayerTables]) -> dict[int, tuple[Tensor, Tensor]]:
        """Write the adapters into the borders: id of each layer to (wide weight, poison); none where borders don't pay."""
        from lorabank.kernels.gpu import bordered

        if not self.prepare(tables):
            return {}
        sources = [layer.store.buffers[0 if which == 2 else 1] for which, layer in enumerate(self.layers)]
        gate, up, down = wide = self._wide()
        borders = [gate[:, : self._pad], up[:, -self._pad :], down[-self._pad :]]
        bordered.write(borders, sources, [table.ranks_P2 for table in tables], self._poison)
        each = zip(self.layers, wide, self._poison.unbind(), strict=True)
        return {id(layer): (weight, poison) for layer, weight, poison in each}

    def release(self) -> None:
        """Make the weights tensors of their own again."""
        if self._in_place():
            for weight in self._weights:
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._places, self._pad = [], 0

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [_weight(layer) for layer in self.layers]

    def _in_place(self) -> bool:
        """Whether the parameters still are views of the wide tensors: a model may have been moved, cast or merged into."""
        return bool(self._places) and all(
            weight.untyped_storage().data_ptr() == place
            and weight.untyped_storage().nbytes() == self._numbers(which, weight) * weight.element_size()
            for which, (weight, place) in enumerate(zip(self._weights, self._places, strict=True))
        )

    def _numbers(self, which: int, weight: Tensor) -> int:
        rows, columns = weight.size()
        return (rows + self._pad) * columns if which == 2 else rows * (columns + self._pad)

    def _wide(self) -> list[Tensor]:
        """The wide tensors."""
        found: list[Tensor] = []
        for which, weight in enumerate(self._weights):
            rows, columns = weight.size()
            size = (rows + self._pad, columns) if which == 2 else (rows, columns + self._pad)
            found.append(weight.data.as_strided(size, (size[1], 1), 0))
        return found

    def _place(self, pad: int) -> None:
        self._places, self._pad = [], pad
        for which, weight in enumerate(self._weights):
            rows, columns = weight.size()
            wide = weight.new_zeros((rows + pad, columns) if which == 2 else (rows, columns + pad))
            view = wide[:, pad:] if which == 0 else wide[:, :columns] if which == 1 else wide[:rows]
            with torch.no_grad():
                view.copy_(weight)
            weight.data = view
            self._places.append(wide.untyped_storage().data_ptr())
        if self._weights[0].is_cuda:
            torch.cuda.empty_cache()  # what the old weights took is a little too small for the next wide ones


def gated_mlps(layers: Sequence[LoRALayer]) -> list[list[LoRALayer]]:
    """[gate, up, down] of each module whose adapted layers look like a gated MLP's: two I → F, one F → I, without biases.

    What they compute decides the graph (kernels/gpu/grouping.py); of gate and up either may come first.
    """
    groups: dict[str, list[LoRALayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.path.rpartition(".")[0]].append(layer)
    found: list[list[LoRALayer]] = []
    for group in groups.values():
        shapes = [tuple(_weight(layer).shape) for layer in group if _is_plain(layer)]
        if len(group) != 3 or len(shapes) != 3:
            continue
        for which, (rows, columns) in enumerate(shapes):
            others = [shape for i, shape in enumerate(shapes) if i != which]
            if rows != columns and others == [(columns, rows)] * 2:
                found.append([*(layer for i, layer in enumerate(group) if i != which), group[which]])
    return found


def _weight(layer: LoRALayer) -> nn.Parameter:
    return layer.base.get_parameter("weight")


def _is_plain(layer: LoRALayer) -> bool:
    base = layer.base
    return type(base) is nn.Linear and base.bias is None and layer.kind.storage == "linear" and not base.weight.requires_grad
