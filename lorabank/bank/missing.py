"""Layers that an adapter's configuration means and that it has nothing for: a file that is incomplete, or another model's."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import nn

from lorabank.bank.adaptable import adaptable_layers, output_head_paths
from lorabank.bank.fused_layers import Slices, slices_of, with_slices
from lorabank.bank.keep import kept_modules
from lorabank.bank.multihead import Projection
from lorabank.bank.slices import FusedSlice
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.targets import meant_by, trains_beside
from lorabank.bank.wrappers import base_path, base_prefix
from lorabank.formats.adapter import Adapter


def missing_layers(
    model: nn.Module, adapter: Adapter, kept: Collection[str] = (), fused: Mapping[str, Slices] | None = None
) -> list[str]:
    """Their paths, in the model's order. `kept`: names of parameters that train beside the base; `fused`: declared slices.

    An adapter of a bank, which a fingerprint tells, is whole: what it lacks went on training beside the base.
    """
    if adapter.fingerprint is not None:
        return []
    apart = kept_modules(kept)
    whole = {path: layer for path, layer in adaptable_layers(model).items() if not trains_beside(path, layer, apart)}
    layers = with_slices(whole, slices_of(model, whole, fused or {}))
    in_full = tuple(f"{path}." for path in adapter.modules)
    present = {*adapter.layers, *adapter.adapted, *adapter.token_rows}
    above = {path.rpartition(".")[0] for path in adapter.layers}

    def has(path: str, layer: nn.Module) -> bool:
        parent = path.rpartition(".")[0]
        if isinstance(layer, ExpertStack):
            return path in above  # of single experts that it lacks another warning tells
        if isinstance(layer, FusedSlice) and parent in adapter.layers:
            return True
        if isinstance(layer, Projection):  # of the module's two, one whose ranks are all zero isn't kept
            return parent in above or parent in {other.rpartition(".")[0] for other in above}
        return path in present

    meant, prefix = meant_by(adapter.config, layers, output_head_paths(model)), base_prefix(model)
    lacking = [path for path, layer in layers.items() if path in meant and not has(path, layer)]
    return [path for path in lacking if not f"{base_path(path, prefix)}.".startswith(in_full)]


def warn_missing(what: str, missing: list[str]) -> None:
    """Say which layers an adapter, called `what`, has nothing for, where there are any."""
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (" …" if len(missing) > 3 else "")
        warnings.warn(
            f"{what}: its targets mean {len(missing)} more layers of this model than it has A and B for ({shown}). They stay the "
            "base's, in further training too. If it is incomplete, fetch it again; if it was trained on a part of this model, "
            "say so in its config (exclude_modules).",
            stacklevel=3,
        )
