"""Where a base layer stands in its model, put into words that wrapping needs: every path of it, and whether rows come first."""

from __future__ import annotations

import re

from torch import Tensor, nn

from lorabank.bank.owners import elsewhere, owners_of
from lorabank.bank.wrapping import unwrapped
from lorabank.errors import RoutingError

_DISTANCES = re.compile(r"rel(ative)?_(att|pos|bias|emb)|distance|^pe_k$", re.IGNORECASE)
"""Names of embeddings of pairs of tokens, such as T5's `relative_attention_bias`: their input is (tokens, tokens)."""
_POSITIONS = re.compile(r"(^|_)pos(ition|itions|itional)?(_|$)|^wpe$", re.IGNORECASE)
_LABELS = re.compile(r"label|class", re.IGNORECASE)


def ids_of_rows(path: str, ids: Tensor, rows: int | None) -> Tensor:
    """An embedding's ids with the batch's rows first, where each row has a route of its own. Raises RoutingError where unknown.

    What a model gives once for all rows, (1, …), or (tokens,) of positions, is repeated for each: rows may have changes of
    their own. `rows`: how many there are, None where they may come multiplied.
    """
    if ids.ndim > 1 and ids.shape[0] != 1:
        return ids
    if rows is None:
        raise RoutingError(
            f"layer {path!r} is given ids {tuple(ids.shape)} once for all rows, and the route says that rows may come "
            "multiplied, so how many there are isn't known. Leave the layer out of targets, or give one entry for each row that "
            "there will be."
        )
    if ids.ndim > 1:
        return ids.expand(rows, *ids.shape[1:])
    name = path.rpartition(".")[2]
    if len(ids) == rows and (rows == 1 or _LABELS.search(name)):
        return ids
    if len(ids) != rows and _POSITIONS.search(name):
        return ids[None].expand(rows, len(ids))
    raise RoutingError(
        f"layer {path!r} is given {len(ids)} ids in one dimension, which may be one a row or one a token, and the route has one "
        f"entry for each of {rows} rows. Route all rows alike (bank.use(name), or bank.route(name)), or leave the layer out of "
        "targets."
    )


def places_of(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) of every place that `layer` stands at: a model may use one layer under several names."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children() would list a shared child once
        if child is layer
    ]


def beside_turned(model: nn.Module, path: str) -> bool:
    """Whether a layer stands in a module with an `nn.MultiheadAttention` whose rows are its second dimension.

    The layer's own input may be turned like that one's, or not; where there are as many rows as tokens that can't be seen.
    """
    inside = (unwrapped(child) for owner, _ in owners_of(model, path) for child in owner._modules.values() if child is not None)
    return any(isinstance(child, nn.MultiheadAttention) and not child.batch_first for child in inside)


def rows_lost(model: nn.Module, path: str) -> str | None:
    """Why a layer's input doesn't have the batch's rows first, or None when it does as far as its place tells.

    Such a layer can only take one route for all rows: an input that happens to be as long as the batch would be misread.
    """
    parts = path.split(".")
    if "experts" in parts:
        return "an expert gets the tokens of all rows in an order of its own"
    if _DISTANCES.search(parts[-1]) and isinstance(model.get_submodule(path), nn.Embedding):
        return "its ids are distances between tokens, the same for all rows"
    attends = isinstance(unwrapped(model.get_submodule(path)), nn.MultiheadAttention)  # which says where its rows are
    for owner, _ in owners_of(model, path):
        if attends:
            break
        if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and not owner.self_attn.batch_first:
            return "its input is (tokens, rows, features); build the layer with batch_first=True"
    return elsewhere(model, path)
