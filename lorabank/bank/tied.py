"""Weights that an embedding and another layer have in common: an adapter's change at one end, or at both.

With `ensure_weight_tying` (PEFT's name) the embedding has the adapter's numbers and the other end, most often the output head,
reads the same ones turned: of the change (B A)ᵀ = Aᵀ Bᵀ, where the embedding's A is (R, ids) and its B (R, features) in a slot,
the head's A is the embedding's B and its B the embedding's A.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lorabank.bank.kinds import EMBEDDING, layer_kind
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError
from lorabank.formats.adapter import Adapter


def tied_pairs(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of each linear layer whose weight is an embedding's → the embedding's path."""
    embeddings: dict[int, str] = {}
    for path, layer in layers.items():
        kind = layer_kind(layer)
        if kind is not None and kind.storage == EMBEDDING:
            embeddings.setdefault(id(layer.get_parameter("weight")), path)
    found: dict[str, str] = {}
    for path, layer in layers.items():
        kind, weight = layer_kind(layer), layer._parameters.get("weight")
        if kind is not None and kind.storage == "linear" and id(weight) in embeddings:
            found[path] = embeddings[id(weight)]
    return found


def sharers(layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Path of each linear layer and embedding → paths of the others that have its weight."""
    users: dict[int, list[str]] = {}
    for path, layer in layers.items():
        kind, weight = layer_kind(layer), layer._parameters.get("weight")
        if kind is not None and weight is not None and kind.storage in (EMBEDDING, "linear"):
            users.setdefault(id(weight), []).append(path)
    return {path: [other for other in mine if other != path] for mine in users.values() for path in mine}


def tie(
    name: str, config: AdapterConfig, layers: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(the chosen layers and the other ends of tied ones, head → embedding of those that share an adapter's numbers).

    Without `ensure_weight_tying` nothing is shared, and a warning says which end stays the base's. Raises TargetError where
    nothing that was chosen is tied.
    """
    touched = {head: embedding for head, embedding in tied_pairs(layers).items() if head in chosen or embedding in chosen}
    if config.ensure_weight_tying:
        if not touched:
            raise TargetError(
                "ensure_weight_tying: none of the targeted layers has its weight in common with an embedding. Name the embedding "
                "(targets: all-embedding, or its name), or leave ensure_weight_tying out."
            )
        both = {*chosen, *touched, *touched.values()}
        return {path: layer for path, layer in layers.items() if path in both}, touched
    for head, embedding in touched.items():
        if not (head in chosen and embedding in chosen):
            mine, other = (head, embedding) if head in chosen else (embedding, head)
            warnings.warn(
                f"adapter {name!r}: {mine!r} and {other!r} have one weight, and the adapter changes the first alone. "
                "ensure_weight_tying=True changes both.",
                stacklevel=4,
            )
    for path, others in sharers(layers).items():
        # further embeddings of one weight, such as a decoder's, which nothing ties
        if path in chosen and path not in {*touched, *touched.values()} and (apart := [o for o in others if o not in chosen]):
            warn_apart(name, path, apart)
    return dict(chosen), {}


def warn_apart(name: str, path: str, others: Sequence[str]) -> None:
    """Warn that a weight which other layers have too changes in one of them."""
    warnings.warn(
        f"adapter {name!r}: {path!r} and {', '.join(map(repr, others))} have one weight, and the adapter changes the first "
        "alone. Name the others as well if they are to change.",
        stacklevel=5,
    )


def shared_in(adapter: Adapter, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Head → embedding of those pairs whose numbers in a loaded adapter are the same: trained tied, they stay so."""
    if not adapter.config.ensure_weight_tying:
        return {}
    pairs = {head: embedding for head, embedding in tied_pairs(layers).items() if {head, embedding} <= adapter.layers.keys()}
    return {head: embedding for head, embedding in pairs.items() if mirrored(adapter, head, embedding)}


def mirrored(adapter: Adapter, head: str, embedding: str) -> bool:
    """Whether the head's change is the embedding's, turned."""
    mine, other = adapter.layers[head], adapter.layers[embedding]
    if mine.magnitude is not None or other.magnitude is not None:  # of each output of its own end
        return False
    return mine.scaling == other.scaling and torch.equal(mine.A, other.B.t()) and torch.equal(mine.B, other.A.t())


def in_turn(paths: Collection[str], shared: Mapping[str, str]) -> list[str]:
    """The paths, those that read another's numbers last."""
    return [*(path for path in paths if path not in shared), *(path for path in paths if path in shared)]
