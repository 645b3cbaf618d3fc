"""Convolutions in groups under adapters whose A sees all channels (formats/dense.py): they run as changes without groups."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lorabank.bank.kinds import LayerKind
from lorabank.kernels.maps import ConvMap, LowRankMap


def dense_kind(kind: LayerKind) -> LayerKind:
    """The kind of a convolution in groups, for adapters that know none. Products of its own weight aren't asked of it."""

    def features(layer: nn.Module) -> tuple[int, int]:
        fan_in, fan_out = kind.features(layer)
        return fan_in * kind.groups(layer), fan_out

    def low_rank_map(layer: nn.Module) -> LowRankMap:
        found = kind.low_rank_map(layer)
        assert isinstance(found, ConvMap)
        return replace(found, groups=1)

    return replace(kind, features=features, low_rank_map=low_rank_map)
