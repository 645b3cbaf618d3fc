"""Which adapted layers of a block get borders together, by the sizes of their weights; what they compute decides the graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from torch import nn

from lorabank.bank.carrier import SlotParameters
from lorabank.bank.layers import LoRALayer

MOST = 4
"""Layers that are joined."""
NARROWEST = 2
"""Layers aren't joined whose x has more than so many features for each of y: a border makes a copy of x."""


def gated_mlps(layers: Sequence[LoRALayer], model: nn.Module) -> list[list[LoRALayer]]:
    """[gate, up, down] of each module of `model` that consists of a gated MLP's adapted layers: two I → F, one F → I, no biases.

    Of gate and up either may come first. Weights that another module holds as well are left where they are.
    """
    found: list[list[LoRALayer]] = []
    for path, group in _by_parent(layers).items():
        plain = len(group) == 3 and all(_is_plain(layer) and layer.base.bias is None for layer in group)
        if not plain or not _all_of(path, group, model):
            continue
        shapes = [tuple(weight_of(layer).shape) for layer in group]
        for which, (rows, columns) in enumerate(shapes):
            others = [shape for i, shape in enumerate(shapes) if i != which]
            if rows != columns and others == [(columns, rows)] * 2:
                found.append([*(layer for i, layer in enumerate(group) if i != which), group[which]])
    return found


def joined_layers(layers: Sequence[LoRALayer], model: nn.Module) -> list[list[LoRALayer]]:
    """Up to four layers of one module each that read the same x, as their last plain call had it: queries, keys and values.

    One alone, too: its LoRA is cheaper with a border where x isn't much wider than y.
    """
    holders = Counter(id(p) for p in _parameters(model))
    found: list[list[LoRALayer]] = []
    for group in _by_parent(layers).values():
        alike: dict[tuple[int, int, bool], list[LoRALayer]] = defaultdict(list)
        for layer in group:
            if _is_plain(layer) and holders[id(weight_of(layer))] == 1:
                alike[(weight_of(layer).shape[1], layer.read, layer.base.bias is None)].append(layer)
        for (inputs, *_), some in alike.items():
            outputs = sum(weight_of(layer).shape[0] for layer in some)
            if len(some) <= MOST and inputs < NARROWEST * outputs:
                found.append(some)
    return found


def weight_of(layer: LoRALayer) -> nn.Parameter:
    """The frozen weight (O, I)."""
    return layer.base._parameters["weight"]  # pyright: ignore[reportReturnType]


def _by_parent(layers: Sequence[LoRALayer]) -> dict[str, list[LoRALayer]]:
    groups: dict[str, list[LoRALayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.path.rpartition(".")[0]].append(layer)
    return groups


def _all_of(path: str, group: Sequence[LoRALayer], model: nn.Module) -> bool:
    """Whether the module at `path` has the weights of `group` and no others, and nothing else in the model has them."""
    mine = {id(weight_of(layer)) for layer in group}
    if {id(p) for p in _parameters(model.get_submodule(path))} != mine:
        return False
    holders = Counter(id(p) for p in _parameters(model))
    return all(holders[number] == 1 for number in mine)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the base, once for each module that holds them: a wrapped layer and its base share one table of theirs."""
    tables = {id(m._parameters): m._parameters for m in module.modules() if not isinstance(m, SlotParameters)}
    return [p for table in tables.values() for p in table.values() if p is not None]


def _is_plain(layer: LoRALayer) -> bool:
    base = layer.base
    return type(base) is nn.Linear and layer.kind.storage == "linear" and not base.weight.requires_grad
