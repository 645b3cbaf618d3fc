"""Combined adapters of a tied weight (`ensure_weight_tying`): the head's change stays the embedding's, turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorabank.bank.tied import mirrored
from lorabank.formats.adapter import Adapter, AdapterLayer


def pairs_of(adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Head → embedding that are one change in each adapter that has any of both, with one weight. weights: by layer."""
    found: dict[str, str] = {}
    for adapter in adapters:
        if adapter.config.ensure_weight_tying:
            found |= _mirrors(adapter)
    return {
        head: embedding
        for head, embedding in found.items()
        if all(
            adapter.config.ensure_weight_tying
            and {head, embedding} <= adapter.layers.keys()
            and mirrored(adapter, head, embedding)
            and own[head] == own[embedding]
            for adapter, own in zip(adapters, weights, strict=True)
            if {head, embedding} & adapter.layers.keys()
        )
    }


def with_tied(layers: Mapping[str, AdapterLayer], pairs: Mapping[str, str]) -> dict[str, AdapterLayer]:
    """The combined layers, each head's read off its embedding's."""
    made = dict(layers)
    for head, embedding in pairs.items():
        of = layers[embedding]
        made[head] = replace(layers[head], A=of.B.t().contiguous(), B=of.A.t().contiguous(), scaling=of.scaling)
    return made


def _mirrors(adapter: Adapter) -> dict[str, str]:
    embeddings = [path for path, layer in adapter.layers.items() if layer.looks_up]
    return {
        head: embedding
        for embedding in embeddings
        for head, layer in adapter.layers.items()
        if not layer.looks_up
        and layer.A.shape == adapter.layers[embedding].B.t().shape
        and layer.B.shape == adapter.layers[embedding].A.t().shape
        and mirrored(adapter, head, embedding)
    }
