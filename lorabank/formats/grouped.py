"""Convolutions in many groups, depthwise ones above all, whose A would fill gigabytes of zeros in PEFT's form.

PEFT's A of such a layer sees all channels, so ours stands in it once for each group: rank · groups × in numbers instead of
rank × in/groups. Where that would take much, the file has A as it is here, and our own file beside it says in how many groups.
PEFT refuses such a file, whose rank its groups don't divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import AdapterLayer
from lorabank.notices import warn_once

LARGE = 2**26
"""Bytes of all such layers' A in PEFT's form from which on they are saved as they are."""
Layers = Mapping[str, AdapterLayer]


def compact(layers: Layers) -> dict[str, int]:
    """Layer → its number of groups, of those that a file has as they are; none where PEFT's form is small. Says so once."""
    grouped = {path: layer for path, layer in layers.items() if layer.groups > 1 and not layer.dense}
    size = sum(_in_pefts_form(layer) for layer in grouped.values())
    if size <= LARGE:
        return {}
    warn_once(
        f"{len(grouped)} layers ({next(iter(grouped))!r} for one) are convolutions in groups, whose A would take {size >> 20:,} "
        "MiB in PEFT's form, nearly all zeros: they are saved as they are here, which PEFT can't read. exclude=[...] leaves such "
        "layers out of targets."
    )
    return {path: layer.groups for path, layer in grouped.items()}


def _in_pefts_form(layer: AdapterLayer) -> int:
    rank, width, *kernel = layer.A.shape
    return rank * layer.groups * width * layer.groups * prod(kernel) * layer.A.element_size()


def as_saved(layers: Layers, groups: Mapping[str, int]) -> dict[str, AdapterLayer]:
    """The layers of `groups` as if they had one: their A and B as they are."""
    return {path: replace(layer, groups=1) if path in groups else layer for path, layer in layers.items()}


def restored(where: str, layers: Layers, groups: object) -> dict[str, AdapterLayer]:
    """The inverse. Raises AdapterFileError where `groups` isn't these layers'."""
    if groups is None:
        return dict(layers)
    known = isinstance(groups, Mapping) and all(
        path in layers and type(count) is int and count > 0 and len(layers[path].B) % count == 0 and layers[path].A.ndim > 2
        for path, count in groups.items()
    )
    if not known or not isinstance(groups, Mapping):
        raise AdapterFileError(f"{where}: its numbers of groups aren't this adapter's. It was altered; fetch the adapter again.")
    return {path: replace(layer, groups=groups[path]) if path in groups else layer for path, layer in layers.items()}
