"""What an adapter may have in a place beside A and B: trained biases, a bias of lora_B, its own rows of an embedding.

The base is shared and never written, so each is a leaf of the adapter's that is added to its own rows, times the row's weight:
  - `bias`: the layer's bias as a whole, b; its rows get b − b₀. Decay, clipping and files so mean the bias itself;
  - `lora_bias`: lora_B's (PEFT's name), b; its rows get scaling · b;
  - `rows`: of an embedding, or of the head, for the n ids that are trained; (n, features); lookups get row − row₀, and logits
    h · (row − row₀).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lorabank.bank.routing import SlotRows
from lorabank.formats.adapter import AdapterLayer
from lorabank.kernels.additions import Addition, add_changes

BIAS, LORA_BIAS, ROWS = "bias", "lora_bias", "rows"
"""The roles, as leaves are named by them."""


@dataclass(frozen=True)
class Extras:
    """What an adapter has in one place beside A and B."""

    bias: bool = False
    lora_bias: bool = False
    ids: tuple[int, ...] = ()
    """Whose rows it trains."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """By role, of a trained adapter; a role that isn't in it starts where it changes nothing."""

    def __bool__(self) -> bool:
        return self.bias or self.lora_bias or bool(self.ids)

    def shapes(self, base: nn.Module, outputs: int) -> dict[str, tuple[int, ...]]:
        """Role to its leaf's shape in this layer."""
        found: dict[str, tuple[int, ...]] = {}
        if self.bias:
            found[BIAS] = tuple(base.get_parameter("bias").shape)
        if self.lora_bias:
            found[LORA_BIAS] = (outputs,)
        if self.ids:
            found[ROWS] = (len(self.ids), base.get_parameter("weight").shape[1])
        return found


def lora_bias_of(layer: AdapterLayer) -> Extras:
    """What a trained adapter's layer has of them."""
    low = layer.lora_bias
    return Extras() if low is None else Extras(lora_bias=True, values={LORA_BIAS: low})


class TokenIds:
    """The ids whose rows a slot trains, and how a lookup finds them on a device."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(the ids, the same sorted, where each of those is among the first), int64 (n,) each."""
        if device not in self._on:
            ids_n = torch.tensor(self.ids, dtype=torch.int64)
            sorted_n, order_n = ids_n.sort()
            self._on[device] = ids_n.to(device), sorted_n.to(device), order_n.to(device)
        return self._on[device]


class HasExtras(Protocol):
    """What is read of one adapter's part in a place."""

    @property
    def scaling(self) -> float: ...

    @property
    def extras(self) -> Mapping[str, nn.Parameter]:
        """Its leaves by role."""
        ...

    @property
    def ids(self) -> TokenIds | None: ...


Used = Sequence[tuple[SlotRows, HasExtras]]
"""The slots of one call, with their rows."""


def starting(base: nn.Module, role: str, leaf: Tensor, ids: TokenIds | None) -> Tensor:
    """What a leaf begins with, so that nothing changes yet."""
    if role == BIAS:
        return base.get_parameter("bias").detach()
    if role == ROWS:
        assert ids is not None  # a slot with rows has their ids
        weight = base.get_parameter("weight").detach()
        return weight[ids.on(weight.device)[0]]
    return torch.zeros_like(leaf)


def fill(base: nn.Module, leaves: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], ids: TokenIds | None) -> None:
    """Copy values into a slot's leaves of these roles."""
    with torch.no_grad():
        for role, leaf in leaves.items():
            leaf.copy_(values[role] if role in values else starting(base, role, leaf, ids))


def copied(leaves: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The leaves' present values on the CPU, by role."""
    return {role: leaf.detach().to("cpu", copy=True) for role, leaf in leaves.items()}


def any_extras(used: Iterable[tuple[SlotRows, HasExtras]]) -> bool:
    """Whether a slot of this call has any."""
    return any(slot.extras for _, slot in used)


def add_shifts(y: Tensor, used: Used, bias: Tensor | None, shape: Sequence[int], channels_first: bool) -> Tensor:
    """y with each slot's vector in its rows. `shape`: (U, …) of y, its last dimensions the outputs.

    `channels_first`: (U, N, O, …) instead, as a convolution or a batch norm gives it.
    """
    additions: list[Addition] = []
    for rows, slot in used:
        vector = _shift(slot, bias)
        if vector is not None:
            if channels_first:
                vector = vector.view(-1, *(1,) * (len(shape) - 3))
            additions.append(Addition(rows=rows.rows, change=_weighed(vector, rows, len(shape))))
    return add_changes(y, shape, additions) if additions else y


def add_column_shifts(y: Tensor, used: Iterable[tuple[SlotRows, HasExtras, Tensor]], units: int) -> Tensor:
    """y (…, O) with each slot's bias of lora_B in its rows, at these outputs (int64)."""
    additions = [
        Addition(rows=rows.rows, change=_weighed(slot.extras[LORA_BIAS] * slot.scaling, rows, 3), columns_n=columns_n)
        for rows, slot, columns_n in used
    ]
    return add_changes(y, (units, -1, y.shape[-1]), additions)


def _shift(slot: HasExtras, bias: Tensor | None) -> Tensor | None:
    own, low = slot.extras.get(BIAS), slot.extras.get(LORA_BIAS)
    vector = None
    if own is not None:
        assert bias is not None  # the leaf was made of it
        vector = own - bias.to(own.device, own.dtype)
    if low is not None:
        vector = low * slot.scaling if vector is None else torch.add(vector, low, alpha=slot.scaling)
    return vector


def _weighed(change: Tensor, rows: SlotRows, ndim: int) -> Tensor:
    """The change times each unit's weight."""
    if rows.weights_U is None:
        return change
    return change * rows.weights_U.to(change.device, change.dtype).view(-1, *(1,) * (ndim - 1))


def add_rows(y: Tensor, x: Tensor, used: Used, base: nn.Module, units: int, *, looks_up: bool) -> Tensor:
    """y with what each slot's own rows of the table change: of lookups x (…) by id, or of logits of x (…, features)."""
    weight = base.get_parameter("weight")
    shape = units, -1, y.shape[-1]
    additions: list[Addition] = []
    for rows, slot in used:
        leaf = slot.extras.get(ROWS)
        if leaf is None or slot.ids is None:
            continue
        ids_n, sorted_n, order_n = slot.ids.on(weight.device)
        change_n = leaf - weight[ids_n].to(leaf.dtype)
        if looks_up:
            change = _looked_up(change_n, x.reshape(units, -1)[rows.rows], sorted_n, order_n, base)
            additions.append(Addition(rows=rows.rows, change=_weighed(change, rows, 3)))
            continue
        with torch.autocast(x.device.type, enabled=False):
            change = x.reshape(units, -1, x.shape[-1])[rows.rows].to(leaf.dtype) @ change_n.t()
        additions.append(Addition(rows=rows.rows, change=_weighed(change, rows, 3), columns_n=ids_n))
    return add_changes(y, shape, additions) if additions else y


def _looked_up(change_n: Tensor, ids_UT: Tensor, sorted_n: Tensor, order_n: Tensor, base: nn.Module) -> Tensor:
    """Row by row of the lookup what changes, zero for ids that aren't trained (U, T, features)."""
    ids_UT = ids_UT.to(sorted_n.dtype)
    places = torch.searchsorted(sorted_n, ids_UT).clamp_(max=len(sorted_n) - 1)
    hit_UT = sorted_n[places] == ids_UT
    found = change_n[order_n[places]]
    padding = base.__dict__.get("padding_idx")
    if padding is not None:  # torch gives that row no gradient
        found = torch.where((ids_UT == padding)[..., None], found.detach(), found)
    return torch.where(hit_UT[..., None], found, found.new_zeros(()))
