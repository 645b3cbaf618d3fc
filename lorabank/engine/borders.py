"""Frozen weights of a block, moved into tensors with room for A or B at their border (kernels/gpu/bordered.py).

The model's parameters stay where they are in the model and become views of the wide tensors, equal to the last bit; `release`
and `bank.detach` make them tensors of their own again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.fused import LayerTables
from lorabank.bank.layers import LoRALayer
from lorabank.engine.border_groups import gated_mlps, joined_layers, weight_of
from lorabank.notices import warn_once

Bordered = tuple[LoRALayer, str, tuple[Tensor, Tensor, Tensor], tuple[int, int, bool]]
"""A layer, its storage's name in kernels/gpu/storage.py, what that has besides the weight (wide weight, shadow, poison), and
where the weight is in the wide one, as `LayerCall.within` has it."""


@dataclass(frozen=True)
class Wide:
    """A tensor with room for a border beside or below a layer's weight."""

    weight_rows: int
    weight_columns: int
    which: int
    """The layer."""
    rows: int = 0
    """Further ones, below."""
    columns: int = 0
    """Further ones, behind."""
    before: int = 0
    """Further columns before the weight."""

    @property
    def size(self) -> tuple[int, int]:
        """Of all of it."""
        return self.weight_rows + self.rows, self.before + self.weight_columns + self.columns

    @property
    def within(self) -> tuple[int, int, bool]:
        """(dimension that the border is along, the weight's length there, whether the border is before it)."""
        return (0, self.weight_rows, False) if self.rows else (1, self.weight_columns, self.before > 0)

    @property
    def numbers(self) -> int:
        """In it."""
        rows, columns = self.size
        return rows * columns


class Borders(ABC):
    """The borders of layers whose weights are moved together; subclasses say how."""

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        self.layers = tuple(layers)
        self._poison = torch.empty(0)
        self._shadows: list[Tensor] = []
        self._pad = 0
        self._last = 0
        """Rows of capacity buffers up to the last in use."""
        self._places: list[int] = []
        """Where the wide tensors lie. Only the parameters hold them, so that a model that is moved takes them along."""

    @property
    def tensors(self) -> list[Tensor]:
        """What the weights are views of, and what `write` fills besides."""
        return [*self._wide(), *self._shadows, self._poison] if self._in_place() else []

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie, and what `write` fills besides."""
        more = (tensor.data_ptr() for tensor in (*self._shadows, self._poison))
        return (*(weight.data_ptr() for weight in self._weights), *more)  # looked at before each pass

    def prepare(self, tables: Sequence[LayerTables]) -> bool:
        """Move the weights where they aren't in place yet, or the room has become too small; False where borders don't pay.

        `tables`: of the layers.
        """
        from lorabank.kernels.gpu import border_writing  # here, since it imports Triton

        last = max((slot.tensors.stop for layer in self.layers for slot in layer.slots.values()), default=0)
        pad, ranks = border_writing.border_width(last * self._each), tables[0].ranks_P2
        few = len(ranks) <= border_writing.MOST_SLOTS and max(table.width for table in tables) <= self._widest
        if pad == 0 or not few:
            if self._pad:
                count = len(self.layers[0].slots)
                warn_once(
                    f"compile: {count} adapters of {last} ranks together don't fit in the borders of a layer's "
                    f"weight, which have room for {border_writing.WIDEST // self._each} ranks of {border_writing.MOST_SLOTS} "
                    f"adapters, {self._widest} of each. So blocks are compiled once more, and steps are a little slower."
                )
            self.release()
            return False
        if pad > self._pad or not self._in_place():
            self._place(max(pad, self._pad))
        elif last < self._last:
            for border in self._parts():
                border.zero_()  # `write` doesn't come to the places of adapters that are gone
        self._last = last
        if self._poison.shape[1:2] != ranks.shape[:1] or self._poison.device != ranks.device:
            features = max(max(weight.shape) for weight in self._weights)
            self._poison = border_writing.poison_like(ranks, len(self.layers), features)
        return True

    def filled(self, tables: Sequence[LayerTables]) -> tuple[list[Any], list[Bordered]]:
        """(what `border_writing.write` takes, what the layers are called with). Only where `prepare` said so."""
        from lorabank.kernels.gpu.border_writing import Border  # here, since it imports Triton

        entries: list[Any] = []
        given: list[Bordered] = []
        layout = self._layout(self._pad)
        layers = zip(self.layers, tables, layout, self._wide(), self._parts(), self._places_of_shadows(), strict=True)
        for which, (layer, table, place, wide, border, (shadow, begin)) in enumerate(layers):
            A, B = layer.store.buffers
            leaf, other = (B, A) if place.rows == 0 else (A, B)
            mine, poison = shadow[begin : begin + border.shape[1]], self._poison[which]
            entries.append(
                Border(border=border, leaf=leaf, shadow=mine, other=other, ranks=table.ranks_P2, poison=poison, rows=self._last)
            )
            given.append((layer, self._names[which], (wide, shadow, poison), place.within))
        return entries, given

    def release(self) -> None:
        """Make the weights tensors of their own again; each by itself, since somebody may have replaced others."""
        for layer in self.layers:
            layer.bring_home()
        self._places, self._pad, self._last, self._shadows = [], 0, 0, []

    @property
    @abstractmethod
    def _names(self) -> list[str]:
        """Each layer's storage, in kernels/gpu/storage.py."""

    @property
    @abstractmethod
    def _each(self) -> int:
        """Layers that share one border."""

    @property
    @abstractmethod
    def _widest(self) -> int:
        """The largest table width."""

    @abstractmethod
    def _layout(self, pad: int) -> list[Wide]:
        """Of each layer."""

    @abstractmethod
    def _parts(self) -> list[Tensor]:
        """Each layer's border, (F, share)."""

    @abstractmethod
    def _shadow_sizes(self, pad: int) -> list[tuple[int, int]]:
        """Of all shadows."""

    @abstractmethod
    def _places_of_shadows(self) -> list[tuple[Tensor, int]]:
        """Each layer's shadow, and its first row in that."""

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [weight_of(layer) for layer in self.layers]

    def _in_place(self) -> bool:
        """Whether the parameters still are views of the wide tensors: a model may have been moved, cast or merged into."""
        if not self._places:
            return False
        weights = self._weights
        for wide, place in zip(self._layout(self._pad), self._places, strict=True):
            storage, item = weights[wide.which].untyped_storage(), weights[wide.which].element_size()
            if storage.data_ptr() != place or storage.nbytes() != wide.numbers * item:
                return False
        return True

    def _wide(self) -> list[Tensor]:
        """The wide tensors."""
        weights = self._weights
        return [weights[w.which].data.as_strided(w.size, (w.size[1], 1), 0) for w in self._layout(self._pad)]

    def _place(self, pad: int) -> None:
        weights = self._weights
        on_gpu = weights[0].is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("weights of compiled blocks were replaced; they can't be moved while a CUDA graph is captured")
        places: list[int] = []
        for wide in self._layout(pad):
            weight = weights[wide.which]
            room = weight.new_zeros(wide.size)
            view = room[: wide.weight_rows, wide.before : wide.before + wide.weight_columns]
            with torch.no_grad():
                view.copy_(weight)
            weight.data = view
            vars(self.layers[wide.which])["moved"] = True
            places.append(room.untyped_storage().data_ptr())
        self._shadows = [weights[0].new_zeros(size).detach() for size in self._shadow_sizes(pad)]
        self._places, self._pad = places, pad
        if on_gpu:
            torch.cuda.empty_cache()  # what the old weights took is a little too small for the next wide ones


class MlpBorders(Borders):
    """Those of one gated MLP's gate, up and down: before gate's weight, behind up's, below down's."""

    @property
    def _names(self) -> list[str]:
        return ["bordered:before", "bordered:behind", "bordered:below"]

    @property
    def _each(self) -> int:
        return 1

    @property
    def _widest(self) -> int:
        from lorabank.kernels.gpu import gated_mlp  # here, since it imports Triton

        return gated_mlp.WIDEST_RANK

    def _layout(self, pad: int) -> list[Wide]:
        gate, up, down = (weight.size() for weight in self._weights)
        return [Wide(*gate, which=0, before=pad), Wide(*up, which=1, columns=pad), Wide(*down, which=2, rows=pad)]

    def _parts(self) -> list[Tensor]:
        (gate, up, down), pad = self._wide(), self._pad
        return [gate[:, :pad], up[:, -pad:], down[-pad:].t()]

    def _shadow_sizes(self, pad: int) -> list[tuple[int, int]]:
        return [(2 * pad, self._weights[0].shape[1]), (pad, self._weights[2].shape[0])]

    def _places_of_shadows(self) -> list[tuple[Tensor, int]]:
        both, last = self._shadows
        return [(both, 0), (both, self._pad), (last, 0)]


class JoinedBorders(Borders):
    """Those of up to four layers that read one x: borders behind their weights with columns for the ranks of all of them."""

    @property
    def _names(self) -> list[str]:
        return [f"joined:{which}/{len(self.layers)}" for which in range(len(self.layers))]

    @property
    def _each(self) -> int:
        return len(self.layers)

    @property
    def _widest(self) -> int:
        from lorabank.kernels.gpu import siblings  # here, since it imports Triton

        return siblings.WIDEST

    def _layout(self, pad: int) -> list[Wide]:
        return [Wide(*weight.size(), columns=pad, which=which) for which, weight in enumerate(self._weights)]

    def _parts(self) -> list[Tensor]:
        share, inputs = self._pad // len(self.layers), self._weights[0].shape[1]
        starts = [inputs + which * share for which in range(len(self.layers))]
        return [wide[:, start : start + share] for wide, start in zip(self._wide(), starts, strict=True)]

    def _shadow_sizes(self, pad: int) -> list[tuple[int, int]]:
        return [(pad, self._weights[0].shape[1])]

    def _places_of_shadows(self) -> list[tuple[Tensor, int]]:
        share = self._pad // len(self.layers)
        return [(self._shadows[0], which * share) for which in range(len(self.layers))]


class BlockBorders:
    """All borders of one block."""

    def __init__(self) -> None:
        self._all: list[Borders] = []

    @property
    def tensors(self) -> list[Tensor]:
        """What the block's weights are views of, and what goes with it."""
        return [tensor for borders in self._all for tensor in borders.tensors]

    @property
    def addresses(self) -> list[int]:
        """Where they lie."""
        return [address for borders in self._all for address in borders.addresses]

    def find(self, layers: Sequence[LoRALayer], model: nn.Module) -> None:
        """Keep the borders of layers that belong together as they did, release the others."""
        mlps = gated_mlps(layers, model)
        taken = {id(layer) for group in mlps for layer in group}
        others = joined_layers([layer for layer in layers if id(layer) not in taken], model)
        wanted = [(MlpBorders, group) for group in mlps] + [(JoinedBorders, group) for group in others]
        kept = [old for old in self._all if any(type(old) is kind and list(old.layers) == group for kind, group in wanted)]
        for old in self._all:
            if old not in kept:
                old.release()
        fresh = [
            kind(group) for kind, group in wanted if not any(type(old) is kind and list(old.layers) == group for old in kept)
        ]
        self._all = kept + fresh

    def prepare(self, tables: Mapping[int, LayerTables]) -> None:
        """Move weights before anything looks at where they are. `tables`: by the layer's id."""
        for borders in self._all:
            borders.prepare([tables[id(layer)] for layer in borders.layers])

    def fill(self, tables: Mapping[int, LayerTables]) -> list[Bordered]:
        """Write the adapters into the borders, few starts for all of the block; what those layers are called with."""
        from lorabank.kernels.gpu import border_writing, sums  # here, since they import Triton

        entries: list[Any] = []
        given: list[Bordered] = []
        for borders in self._all:
            own = [tables[id(layer)] for layer in borders.layers]
            if borders.prepare(own):
                more, mine = borders.filled(own)
                entries += more
                given += mine
        for start in range(0, len(entries), sums.MOST):
            border_writing.write(entries[start : start + sums.MOST])
        return given

    def release(self) -> None:
        """Leave the block's weights as they were found."""
        for borders in self._all:
            borders.release()
        self._all = []
