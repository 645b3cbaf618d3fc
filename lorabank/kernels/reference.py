"""The definition of every product in plain differentiable torch. Fast paths are held to it, outputs and gradients.

Shapes: U units × T tokens × I inputs, O outputs, R ranks (see segments.py). A row's slots add up:

    y = W x + Σ_s w_s · scaling_s · B_s (A_s (mask_s ⊙ x))

Each product visits only its segment's rows and ranks: rows without a slot are not written at all, and a value that is
not finite in one slot reaches no other row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.segments import Segment, as_units, dropout_mask, take_units
from lorabank.kernels.stacked import StackedSegment


def lora_delta(x_UTI: Tensor, segment: Segment) -> Tensor:
    """w · scaling · B A x for one segment, (units, T, O), in A's dtype."""
    x = take_units(x_UTI, segment.rows).to(segment.A_RI.dtype)
    if segment.dropout is not None:
        x = x * dropout_mask(segment.dropout, x.shape[1], x.shape[2]).to(x.dtype)
    xa = x @ segment.A_RI.t()
    if segment.weights_U is not None:
        xa = xa * segment.weights_U.to(xa.device, xa.dtype)[:, None, None]
    return (xa @ segment.B_RO) * segment.scaling


def add_lora(y: Tensor, x: Tensor, segments: Sequence[Segment], units: int) -> Tensor:
    """y (…, O) plus every segment's change of it; x (…, I). The sum is rounded once into y's dtype."""
    y_UTO, x_UTI = as_units(y, units), as_units(x, units)
    for segment in segments:
        rows = torch.arange(units, device=y.device)[segment.rows]
        changed = take_units(y_UTO, rows).to(segment.A_RI.dtype) + _in_place(lora_delta(x_UTI, segment), segment, y.shape[-1])
        y_UTO = y_UTO.index_copy(0, rows, changed.to(y.dtype))
    return y_UTO.reshape(y.shape)


def _in_place(change: Tensor, segment: Segment, size: int) -> Tensor:
    """A change of some outputs as one of all `size` of them."""
    if segment.outputs is None:
        return change
    wide = change.new_zeros(*change.shape[:-1], size)
    part = segment.outputs.of(wide)
    part.copy_(change.view(part.shape))
    return wide


def add_mapped(
    y: Tensor, x: Tensor, layer_map: LowRankMap, segments: Sequence[Segment], units: int, bias_O: Tensor | None = None
) -> Tensor:
    """y plus every segment's change of it, for any map; x (U · N, …), N samples a unit. Rounded once, into y's dtype."""
    x_UN, y_UN = (value.reshape(units, -1, *value.shape[1:]) for value in (x, y))
    base_UN = y_UN
    for segment in segments:
        rows = torch.arange(units, device=y.device)[segment.rows]
        mine = x_UN[rows]
        if mine.is_floating_point():
            mine = mine.to(segment.A_RI.dtype)
        mask = None if segment.dropout is None else layer_map.dropout(segment.dropout, mine)
        if mask is not None:
            mine = mine * mask.to(mine.dtype)
        change = layer_map.expand(layer_map.shrink(mine.flatten(0, 1), segment.A_RI), segment.B_RO) * segment.scaling
        if segment.decomposition is not None:
            base = base_UN[rows].flatten(0, 1).to(change.dtype)
            bias = None if bias_O is None else bias_O.to(change.dtype)
            if segment.outputs is not None:
                base, bias = (None if value is None else segment.outputs.of(value).flatten(-2) for value in (base, bias))
                assert base is not None
            gain = layer_map.outputs(segment.decomposition.gain_O, base)
            change = (gain - 1) * (base - (0 if bias is None else layer_map.outputs(bias, base))) + gain * change
        change = _in_place(change, segment, y.shape[-1]).view(y_UN[rows].shape)
        if segment.weights_U is not None:
            weights_U = segment.weights_U.to(change.device, change.dtype)
            change = change * weights_U.view(-1, *(1,) * (change.ndim - 1))
        y_UN = y_UN.index_copy(0, rows, (y_UN[rows].to(change.dtype) + change).to(y.dtype))
    return y_UN.reshape(y.shape)


def add_stacked(y_PO: Tensor, x_PI: Tensor, experts_P: Tensor, segments: Sequence[StackedSegment]) -> Tensor:
    """y plus every segment's change of it, each pair by its own expert's A and B; x (P, I). Rounded once, into y's dtype."""
    for segment in segments:
        for place, pair in enumerate(segment.pairs_M.tolist()):
            expert = int(experts_P[pair])
            x = x_PI[pair].to(segment.A_ERI.dtype)
            if segment.dropout is not None:
                x = x * dropout_mask(segment.dropout, 1, len(x))[place, 0].to(x.dtype)
            change = segment.A_ERI[expert] @ x @ segment.B_ERO[expert] * segment.scaling
            if segment.weights_M is not None:
                change = change * segment.weights_M[place].to(change.dtype)
            changed = (y_PO[pair].to(change.dtype) + change).to(y_PO.dtype)
            y_PO = y_PO.index_copy(0, torch.tensor([pair], device=y_PO.device), changed[None])
    return y_PO


def lora_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment], units: int) -> Tensor:
    """The frozen linear map and the adapters' changes, (…, O)."""
    return add_lora(F.linear(x, weight_OI, bias_O), x, segments, units)


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None = None,
    shape: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """log p(target | hidden) for every token, fp32 (T,), with all logits held at once. `shape`: what is done to them."""
    logits = F.linear(hidden_TH, weight_VH, bias_V).float()
    logits = logits if shape is None else shape(logits)
    return logits.log_softmax(-1).gather(1, targets_T[:, None]).squeeze(1)
