"""Trained biases, lora_B's biases and token rows merged into a model: b and rows as they were trained, at strength 1 to the bit.

Adds what `merge` writes beside weights: its checks, the live tensors with their new values, and what rounding lost of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabank.bank.extra.extra_places import extras_misfits, places_in
from lorabank.errors import AdapterFileError, MergeError
from lorabank.formats.adapter import Adapter
from lorabank.merging.report import LayerLoss


@dataclass(frozen=True, kw_only=True)
class Written:
    """One tensor of the model and what it becomes."""

    name: str
    """For people."""
    held: Tensor
    """The live parameter."""
    value: Tensor
    """Its new values, whole, in its dtype."""
    loss: LayerLoss


def has_extras(adapter: Adapter) -> bool:
    """Whether an adapter changes more than weights by low-rank changes."""
    return bool(adapter.extras) or any(layer.lora_bias is not None for layer in adapter.layers.values())


def check_extras(model: nn.Module, adapter: Adapter) -> None:
    """Raise MergeError, naming the place, for what can't be merged into the model."""
    if wrong := extras_misfits(model, adapter):
        raise MergeError(f"merge: {wrong[0]}. Is this the base that the adapter was trained on?")
    for path, layer in adapter.layers.items():
        if layer.lora_bias is not None and _bias(model, path) is None:
            raise MergeError(
                f"merge: {path} has no bias, and the adapter's lora_B has one there (lora_bias), which then has no place in the "
                "base. Give the layer a bias of zeros before merging, or serve the adapter unmerged."
            )
    for name, value in adapter.extras.items():
        if not value.isfinite().all():
            raise AdapterFileError(f"merge: {name} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
    shared = places_in(model, adapter).shared
    for path in adapter.token_rows:
        held = model.get_submodule(path).get_parameter("weight")
        ends = {path, *(head for head, table in shared.items() if table == path)}
        others = _users(model, held) - {f"{end}.weight" for end in ends}
        if others:
            raise MergeError(
                f"merge: {path}.weight is tied to {', '.join(sorted(others))}: merging rows would change both, the adapter "
                "changes one. Merge the model's folder (lorabank merge), which unties them, or serve the adapter unmerged."
            )


def written(model: nn.Module, adapter: Adapter, strength: float) -> list[Written]:
    """The model's tensors that change, with their new values; nothing is written yet."""
    found = [_written_bias(model, adapter, path, strength) for path in biased(adapter)]
    for path in adapter.token_rows:
        held = model.get_submodule(path).get_parameter("weight")
        value, loss = merged_rows(held.detach().clone(), adapter, path, strength)
        found.append(Written(name=f"{path}.weight", held=held, value=value, loss=loss))
    return found


def _written_bias(model: nn.Module, adapter: Adapter, path: str, strength: float) -> Written:
    held = _bias(model, path)
    assert held is not None  # `check_extras` saw it
    value, loss = merged_bias(held.detach(), adapter, path, strength)
    return Written(name=f"{path}.bias", held=held, value=value, loss=loss)


def merged_rows(table: Tensor, adapter: Adapter, path: str, strength: float) -> tuple[Tensor, LayerLoss]:
    """(a table with the adapter's rows written into it, what rounding lost of them)."""
    own = adapter.token_rows[path]
    ids = torch.tensor(own.ids, device=table.device)
    before = table[ids].float()
    wanted = _between(before, own.rows.to(table.device, torch.float32), strength)
    table[ids] = wanted.to(table.dtype)
    return table, _loss(before, wanted, table[ids].float())


def merged_bias(held: Tensor, adapter: Adapter, path: str, strength: float) -> tuple[Tensor, LayerLoss]:
    """(a bias as the adapter makes it, in its dtype, what rounding lost of the change)."""
    before = held.float()
    wanted = before
    if path in adapter.biases:
        wanted = _between(before, adapter.biases[path].to(held.device, torch.float32), strength)
    layer = adapter.layers.get(path)
    if layer is not None and layer.lora_bias is not None:
        wanted = wanted + strength * layer.scaling * layer.lora_bias.to(held.device, torch.float32)
    value = wanted.to(held.dtype)
    return value, _loss(before, wanted, value.float())


def biased(adapter: Adapter) -> list[str]:
    """Paths of the modules whose bias it changes."""
    low = [path for path, layer in adapter.layers.items() if layer.lora_bias is not None]
    return list(dict.fromkeys((*adapter.biases, *low)))


def _between(before: Tensor, trained: Tensor, strength: float) -> Tensor:
    return trained if strength == 1 else before + strength * (trained - before)


def _loss(before: Tensor, wanted: Tensor, after: Tensor) -> LayerLoss:
    norm = torch.linalg.vector_norm
    return LayerLoss(weight=float(norm(before)), delta=float(norm(wanted - before)), lost=float(norm(after - wanted)))


def _bias(model: nn.Module, path: str) -> Tensor | None:
    return model.get_submodule(path)._parameters.get("bias")


def _users(model: nn.Module, held: Tensor) -> set[str]:
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value is held}
