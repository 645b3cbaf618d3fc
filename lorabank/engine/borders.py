"""The frozen weights of a block's gated MLP, moved into tensors with room for A or B at their border (kernels/gpu/bordered.py).

The model's parameters stay where they are in the model and become views of the wide tensors, equal to the last bit; `release`
and `bank.detach` make them tensors of their own again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorabank.bank.fused import LayerTables
from lorabank.bank.layers import LoRALayer, SlotParameters

STORAGES = ("bordered:before", "bordered:behind", "bordered:below")
"""Names in kernels/gpu/storage.py, of gate's, up's and down's."""


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

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie, and what `fill` finds out."""
        return (*(weight.data_ptr() for weight in self._weights), self._poison.data_ptr())  # looked at before each pass

    def prepare(self, tables: Sequence[LayerTables]) -> bool:
        """Move the weights where they aren't in place yet, or the room has become too small; False where borders don't pay.

        `tables`: of the three layers.
        """
        from lorabank.kernels.gpu import bordered  # here, since it imports Triton

        last = max(slot.tensors.stop for layer in self.layers for slot in layer.slots.values())
        pad, ranks = bordered.border_width(last), tables[0].ranks_P2
        few = len(ranks) <= bordered.MOST_SLOTS and max(table.width for table in tables) <= bordered.WIDEST_RANK
        if pad == 0 or not few:
            self.release()
            return False
        if pad > self._pad or not self._in_place():
            self._place(max(pad, self._pad))
        if self._poison.shape[1:2] != ranks.shape[:1] or self._poison.device != ranks.device:
            self._poison = bordered.poison_like(ranks, self._weights[0].shape[0])
        return True

    def fill(self, tables: Sequence[LayerTables]) -> list[tuple[LoRALayer, str, tuple[Tensor, Tensor]]]:
        """Write the adapters into the borders: (layer, its storage, (wide weight, poison)) of each; none where they don't pay."""
        from lorabank.kernels.gpu import bordered

        if not self.prepare(tables):
            return []
        sources = [layer.store.buffers[0 if which == 2 else 1] for which, layer in enumerate(self.layers)]
        gate, up, down = wide = self._wide()
        borders = [gate[:, : self._pad], up[:, -self._pad :], down[-self._pad :]]
        bordered.write(borders, sources, [table.ranks_P2 for table in tables], self._poison)
        more = zip(wide, self._poison.unbind(), strict=True)
        return list(zip(self.layers, STORAGES, more, strict=True))

    def release(self) -> None:
        """Make the weights tensors of their own again."""
        if self._in_place():
            for layer in self.layers:
                layer.bring_home()
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
        on_gpu = self._weights[0].is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("weights of a gated MLP were replaced; they can't be moved while a CUDA graph is captured")
        places: list[int] = []
        for which, layer in enumerate(self.layers):
            weight = _weight(layer)
            rows, columns = weight.size()
            wide = weight.new_zeros((rows + pad, columns) if which == 2 else (rows, columns + pad))
            view = wide[:, pad:] if which == 0 else wide[:, :columns] if which == 1 else wide[:rows]
            with torch.no_grad():
                view.copy_(weight)
            weight.data = view
            layer.__dict__["moved"] = True
            places.append(wide.untyped_storage().data_ptr())
        self._places, self._pad = places, pad
        if on_gpu:
            torch.cuda.empty_cache()  # what the old weights took is a little too small for the next wide ones


def gated_mlps(layers: Sequence[LoRALayer], model: nn.Module) -> list[list[LoRALayer]]:
    """[gate, up, down] of each module of `model` that consists of a gated MLP's adapted layers: two I → F, one F → I, no biases.

    What they compute decides the graph (kernels/gpu/grouping.py); of gate and up either may come first. Weights that another
    module holds as well are left where they are.
    """
    groups: dict[str, list[LoRALayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.path.rpartition(".")[0]].append(layer)
    found: list[list[LoRALayer]] = []
    for path, group in groups.items():
        if len(group) != 3 or not all(map(_is_plain, group)) or not _all_of(path, group, model):
            continue
        shapes = [tuple(_weight(layer).shape) for layer in group]
        for which, (rows, columns) in enumerate(shapes):
            others = [shape for i, shape in enumerate(shapes) if i != which]
            if rows != columns and others == [(columns, rows)] * 2:
                found.append([*(layer for i, layer in enumerate(group) if i != which), group[which]])
    return found


def _all_of(path: str, group: Sequence[LoRALayer], model: nn.Module) -> bool:
    """Whether the module at `path` has the weights of `group` and no others, and nothing else in the model has them."""
    mine = {id(_weight(layer)) for layer in group}
    if {id(p) for p in _parameters(model.get_submodule(path))} != mine:
        return False
    holders = Counter(id(p) for p in _parameters(model))
    return all(holders[number] == 1 for number in mine)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the base, once for each module that holds them: a wrapped layer and its base share one table of theirs."""
    tables = {id(m._parameters): m._parameters for m in module.modules() if not isinstance(m, SlotParameters)}
    return [p for table in tables.values() for p in table.values() if p is not None]


def _weight(layer: LoRALayer) -> nn.Parameter:
    return layer.base._parameters["weight"]  # pyright: ignore[reportReturnType]


def _is_plain(layer: LoRALayer) -> bool:
    base = layer.base
    return type(base) is nn.Linear and base.bias is None and layer.kind.storage == "linear" and not base.weight.requires_grad
