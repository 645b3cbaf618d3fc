"""What a LoRA product needs to know about a batch: which rows use which slot, and how strongly.

Shapes: U units (rows of a batch, or tokens of a packed one) × T tokens a unit × I inputs; O outputs; R ranks.
A unit is the first dimension of a layer's input, whatever lies between it and the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor
"""Consecutive units as a slice (no copy), or their indices as an int64 tensor."""


@dataclass(frozen=True, kw_only=True)
class DropoutDraw:
    """Which dropout mask a segment draws. The same numbers give the same mask on every device, alone or in a batch."""

    probability: float
    """Chance that a channel is dropped, in [0, 1)."""
    seed: int
    """Of the slot and the layer."""
    step: int
    """The slot's optimizer step."""
    examples_U: Tensor
    """int64: the identity of each unit's example within the step; (U, T), one a token, where units are packed."""
    places_UT: Tensor | None = None
    """int64: each token's place in its example, where units are packed; None: its place in the unit."""


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The magnitude of each output of a layer, learned apart from its direction (DoRA, arXiv:2402.09353, eq. 5)."""

    magnitude_O: Tensor
    norm_O: Tensor
    """‖W + scaling · B A‖ of each output, fp32, a constant in backward (section 4.3 there)."""

    @property
    def gain_O(self) -> Tensor:
        """What the direction is multiplied by, 1 where nothing has changed."""
        return self.magnitude_O / self.norm_O


class Outputs(NamedTuple):
    """Those outputs of a layer that a slot changes: `width` from `start` on, in each `period` of them."""

    start: int
    width: int
    period: int

    def of(self, y: Tensor) -> Tensor:
        """These numbers of y (…, O) as a view of it, (…, O / period, width)."""
        return y.unflatten(-1, (-1, self.period))[..., self.start : self.start + self.width]

    def rows_of(self, weight_OI: Tensor) -> Tensor:
        """Their rows of a weight, a view where they lie in one piece."""
        return weight_OI.unflatten(0, (-1, self.period))[:, self.start : self.start + self.width].flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The rows of one slot in one layer, and that slot's tensors."""

    rows: Rows
    A_RI: Tensor
    B_RO: Tensor
    scaling: float
    weights_U: Tensor | None = None
    """Weight of this slot for each of its units; None for 1."""
    dropout: DropoutDraw | None = None
    decomposition: Decomposition | None = None
    outputs: Outputs | None = None
    """Which outputs B's columns are; None for all."""


def take_units(x_UTI: Tensor, rows: Rows) -> Tensor:
    """The segment's units, (units, T, I): a view for a slice, a copy for indices."""
    return x_UTI[rows] if isinstance(rows, slice) else x_UTI.index_select(0, rows)


def as_units(x: Tensor, units: int) -> Tensor:
    """View (U, …, I) as (U, T, I)."""
    return x.reshape(units, -1, x.shape[-1])


def segment_counts(segments: Sequence[Segment], units: int) -> list[int]:
    """Units in each segment."""
    return [len(range(*s.rows.indices(units))) if isinstance(s.rows, slice) else len(s.rows) for s in segments]


def _mix32(h: Tensor) -> Tensor:
    """Bijective 32-bit finaliser on int64 values in [0, 2³²): every input bit moves every output bit."""
    mask = 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
    return h ^ (h >> 16)


def drop_threshold(probability: float) -> int:
    """What an element's 32-bit hash must reach for the element to be kept."""
    return int(probability * 2**32)


def dropout_mask(draw: DropoutDraw, tokens: int, channels: int) -> Tensor:
    """Keep-mask divided by the keep probability, fp32 (U, tokens, channels).

    A counter-based draw: mask = hash(seed, step, example, token in example, channel). Recomputation, another batch
    composition or more padding can't change the mask of a real token.
    """
    device = draw.examples_U.device
    start = torch.tensor((draw.seed * 0x9E3779B1 + draw.step * 0x85EBCA77 + 1) & 0xFFFFFFFF, device=device)
    example_UT = _mix32(_mix32(start) ^ (draw.examples_U & 0xFFFFFFFF))
    if example_UT.ndim == 1:
        example_UT = example_UT[:, None]
    places_UT = torch.arange(tokens, device=device) if draw.places_UT is None else draw.places_UT
    token_UT1 = _mix32(example_UT ^ _mix32(places_UT + 0x27D4EB2F)).unsqueeze(2)
    channel_I = _mix32(torch.arange(channels, device=device) + 0x165667B1)
    hashed = _mix32(token_UT1 ^ channel_I)
    keep = hashed >= drop_threshold(draw.probability)
    return keep.to(torch.float32) / (1.0 - draw.probability)
