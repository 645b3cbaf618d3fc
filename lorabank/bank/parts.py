"""What an adapter's layers name in a model: whole layers, and parts of what adapts as one, such as each expert of a stack."""

from __future__ import annotations

from torch import nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.stacked.stack_carrier import part_paths
from lorabank.bank.stacked.stacks import ExpertStack


def paths_of(path: str, layer: nn.Module) -> list[str]:
    """The paths in an adapter of what a bank has at `path`."""
    return part_paths(path, layer) if isinstance(layer, ExpertStack) else [path]


def part_names(model: nn.Module) -> list[str]:
    """The paths that an adapter can name."""
    return [part for path, layer in adaptable_layers(model).items() for part in paths_of(path, layer)]


def layer_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that an adapter can name, by path. A part is a layer of its own that shares the model's storage."""
    found: dict[str, nn.Module] = {}
    for path, layer in adaptable_layers(model).items():
        if isinstance(layer, ExpertStack):
            found |= {part: layer.part(i) for i, part in enumerate(part_paths(path, layer))}
        else:
            found[path] = layer
    return found
