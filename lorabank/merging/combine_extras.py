"""Biases and token rows of combined adapters. lora_B's biases add up as changes do. A trained bias or row is a value as a whole,
b₀ + Σ wᵢ (bᵢ − b₀), which is Σ wᵢ bᵢ where the weights sum to 1: other sums need the base, which `combine` hasn't got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.extras import extras_by_path
from lorabank.formats.token_rows import TokenRows
from lorabank.merging.weights import Weights

Weighted = Sequence[tuple[Adapter, Weights]]


def check_method(method: str, adapters: Sequence[Adapter], called: Sequence[str]) -> None:
    """Raise MergeError for a method that isn't a weighted sum, and adapters that change more than weights.

    called: what messages call the adapters.
    """
    for name, adapter in zip(called, adapters, strict=True):
        for path, what in extras_by_path(adapter).items():
            if method != "exact":
                raise MergeError(
                    f"combine: of {path!r} in {name} {what}, and {method!r} is about changes of weights. Use 'exact'."
                )


def with_lora_biases(
    layers: Mapping[str, AdapterLayer], adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]]
) -> dict[str, AdapterLayer]:
    """The combined layers with Σ wᵢ · scalingᵢ · bᵢ, in all that can have it where any adapter has one."""
    having = any(layer.lora_bias is not None for adapter in adapters for layer in adapter.layers.values())
    made: dict[str, AdapterLayer] = {}
    for path, layer in layers.items():
        total = layer.B.new_zeros(len(layer.B)) if having and not (layer.looks_up or layer.stack or layer.attention) else None
        for adapter, own in zip(adapters, weights, strict=True):
            low = adapter.layers[path].lora_bias if path in adapter.layers else None
            if low is not None and total is not None and own[path] != 0:
                total = total + own[path] * adapter.layers[path].scaling * low.to(total.device, total.dtype)
        made[path] = replace(layer, lora_bias=total)
    return made


def biases_of(parts: Weighted) -> dict[str, Tensor]:
    """Σ wᵢ bᵢ of each trained bias. Raises MergeError where that isn't what the sum of changes gives."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.biases):
        there = [(adapter.biases.get(path), weight) for adapter, weight in parts]
        found[path] = _sum(f"the bias of {path!r}", there)
    return found


def rows_of(parts: Weighted) -> dict[str, TokenRows]:
    """Σ wᵢ rowsᵢ of each table, of the same ids in all. Raises MergeError as `biases_of`."""
    found: dict[str, TokenRows] = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.token_rows):
        owned = [adapter.token_rows.get(path) for adapter, _ in parts]
        ids = next(own.ids for own in owned if own is not None)
        there: list[tuple[Tensor | None, Weights]] = []
        for own, (_, weight) in zip(owned, parts, strict=True):
            there.append((None if own is None or set(own.ids) != set(ids) else _in_order(own, ids), weight))
        found[path] = TokenRows(ids, _sum(f"the token rows of {path!r}", there))
    return found


def _in_order(own: TokenRows, ids: tuple[int, ...]) -> Tensor:
    return own.rows[[own.ids.index(token) for token in ids]]


def _sum(what: str, there: Sequence[tuple[Tensor | None, Weights]]) -> Tensor:
    sizes: list[float] = []
    for index, (_, weight) in enumerate(there):
        if not isinstance(weight, int | float):
            raise MergeError(f"combine: {what} is trained, and adapter {index} has weights by part. Give it one number.")
        sizes.append(float(weight))
    used = [(value, weight) for (value, _), weight in zip(there, sizes, strict=True) if weight != 0]
    if any(value is None for value, _ in used) or not math.isclose(sum(sizes), 1.0, abs_tol=1e-9):
        raise MergeError(
            f"combine: {what} is trained as a whole, so a sum of changes needs the base's own, unless all adapters have it and "
            f"the weights sum to 1; they are {', '.join(f'{size:g}' for size in sizes)}. Choose such weights, or route rows to a "
            "mixture."
        )
    total: Tensor | None = None
    for value, weight in used:
        assert value is not None
        if not value.isfinite().all():
            raise MergeError(f"combine: {what} holds NaN or infinity: its training diverged. Use an earlier checkpoint.")
        part = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * weight
        if total is not None and total.shape != part.shape:
            raise MergeError(f"combine: {what} is {tuple(total.shape)} in one adapter and {tuple(part.shape)} in another")
        total = part if total is None else total + part
    assert total is not None  # weights sum to 1, so one isn't zero
    return total
