"""How our own file says that the last half of each layer's ranks is where the adapter started, and doesn't train.

Such an adapter, scaling · (B A − B₀ A₀), is in files a plain one of twice the rank, [A; A₀] and [B, −B₀], which any tool reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter

FROZEN = "frozen_ranks"
"""Key of the metadata in `lorabank.json`."""
HALF = "half"


def marked(adapter: Adapter) -> Mapping[str, str]:
    """The adapter's metadata, with the mark where every layer's last half is frozen."""
    plain = {key: value for key, value in adapter.metadata.items() if key != FROZEN}
    halves = all(layer.frozen_rank for layer in adapter.layers.values())
    return {**plain, FROZEN: HALF} if adapter.layers and halves else plain


def restored(where: str, adapter: Adapter) -> Adapter:
    """The adapter with its layers as the mark says. Raises AdapterFileError where they can't be."""
    metadata = dict(adapter.metadata)
    said = metadata.pop(FROZEN)
    odd = next((path for path, layer in adapter.layers.items() if layer.rank % 2), None)
    if said != HALF or odd is not None:
        found = f"layer {odd!r} has the odd rank {adapter.layers[odd].rank}" if odd is not None else f"it says {said!r}"
        raise AdapterFileError(
            f"{where}: {FROZEN} should be {HALF!r}, the last half of every layer's ranks, and {found}. Delete that line to load "
            "a plain adapter of the whole rank, which computes the same."
        )
    layers = {path: replace(layer, frozen_rank=layer.rank // 2) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers, metadata=metadata)
