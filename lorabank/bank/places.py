"""Where a base layer stands in its model, put into words that wrapping needs: every path of it, and whether rows come first."""

from __future__ import annotations

import re

from torch import nn

_DISTANCES = re.compile(r"rel(ative)?_(att|pos|bias)", re.IGNORECASE)
"""Names of embeddings of pairs of tokens, such as T5's `relative_attention_bias`: their input is (tokens, tokens)."""
_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)


def numbers_tokens(path: str) -> bool:
    """Whether an embedding's ids are places in a row, as its name says: given once, they are those of all rows."""
    return _POSITIONS.search(path.rpartition(".")[2]) is not None


def places_of(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) of every place that `layer` stands at: a model may use one layer under several names."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children() would list a shared child once
        if child is layer
    ]


def rows_lost(model: nn.Module, path: str) -> str | None:
    """Why a layer's input doesn't have the batch's rows first, or None when it does as far as its place tells.

    Such a layer can only take one route for all rows: an input that happens to be as long as the batch would be misread.
    """
    parts = path.split(".")
    if "experts" in parts:
        return "an expert gets the tokens of all rows in an order of its own"
    if _DISTANCES.match(parts[-1]):
        return "its ids are distances between tokens, the same for all rows"
    for end in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:end]))
        if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and not owner.self_attn.batch_first:
            return "its input is (tokens, rows, features); build the layer with batch_first=True"
    return None
