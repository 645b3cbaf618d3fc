"""One layer's merge: ΔW added to a weight in fp32 or wider, rounded once, and the layer's own forward checked against it.

`merge_tensor` knows tensors alone: a model in memory and a checkpoint read shard by shard get the same numbers from it.
Shape suffixes: O out, I in, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.kinds import layer_kind
from lorabank.errors import MergeError, Setting
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.slice_vectors import Norms, joined_vectors
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import base_norms, output_norms
from lorabank.merging.outputs import decomposed, map_of
from lorabank.merging.quantized import requantized
from lorabank.merging.report import LayerLoss

TF32_EPS = 2.0**-10  # a GPU may be set to multiply float32 in this precision
INPUT_ROUNDED = 0.1
"""Share of a change of outputs that fp8 units may round away, which round the inputs row by row; of random inputs about 0.03."""
OUTPUT_ROUNDED = 2.0**-6
"""Share of an output that rounding it to bf16 twice explains, generously."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a layer of an adapter does to a weight, in fp32 or wider."""

    before: Tensor
    """The weight, in its own shape."""
    delta: Tensor
    """ΔW in the same shape, strength included."""
    A_RI: Tensor
    B_RO: Tensor
    """With scaling and strength in it."""
    gain_O: Tensor | None
    """What a decomposed layer multiplies each output by; None for one that isn't."""


def change_of(before: Tensor, layer: AdapterLayer, layer_map: LowRankMap, strength: float) -> Change:
    """`before`: the weight in fp32 or fp64, which isn't written to."""
    A_RI, B_RO = (value.detach().to(before.device, before.dtype) for value in (layer.A.flatten(1), layer.B.t()))
    B_RO = B_RO * (strength * layer.scaling)
    delta = layer_map.shape(B_RO.t() @ A_RI)
    gain_O = None
    if layer.magnitude is not None:
        gain_O = layer.magnitude.to(A_RI.device, A_RI.dtype) / output_norms(layer_map.flat(before), A_RI, B_RO, 1.0)
        delta = layer_map.shape(gain_O[:, None] * layer_map.flat(before + delta)) - before
    return Change(before=before, delta=delta, A_RI=A_RI, B_RO=B_RO, gain_O=gain_O)


def base_norms_of(model: nn.Module) -> Norms:
    """The norms of a model's weights, output by output, to the bit those that `change_of` finds where B is zero."""
    layers = adaptable_layers(model)

    def norms(path: str, outputs: int) -> Tensor | None:
        if path not in layers or (kind := layer_kind(layers[path])) is None or kind.features(layers[path])[1] != outputs:
            return None
        weight_OI = kind.weight_oi(layers[path]._parameters, torch.float32)
        return base_norms(weight_OI, _wide(weight_OI))

    return norms


def with_norms(path: str, layer: AdapterLayer, parts: Mapping[str, AdapterLayer], weight_OI: Tensor) -> AdapterLayer:
    """A layer that its slices `parts` are, where they are decomposed with the norms of this weight for its other outputs."""
    norms = base_norms(weight_OI, _wide(weight_OI))
    return replace(layer, **joined_vectors(path, parts, layer.scaling, None, lambda path, outputs: norms))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def merge_tensor(
    path: str, weight: Tensor, layer: AdapterLayer, layer_map: LowRankMap, strength: float
) -> tuple[Tensor, LayerLoss, Change]:
    """(weight + ΔW in the weight's dtype, what rounding lost, the change). Raises MergeError where the dtype can't hold it."""
    wide = _wide(weight)
    change = change_of(weight.detach().to(wide, copy=True), layer, layer_map, strength)
    merged = (change.before + change.delta).to(weight.dtype)
    after = merged.to(wide)
    if not after.isfinite().all() and change.before.isfinite().all():
        too_large = f"merge: {path}.weight + ΔW is too large for {weight.dtype}. "
        if weight.dtype in (torch.float32, torch.float64):
            raise MergeError(f"{too_large}Merge it with a smaller ", Setting("strength"), ".")
        raise MergeError(f"{too_large}Merge into a float32 copy of the base.")
    return merged, _loss(change, after), change


def merge_layer(path: str, base: nn.Module, layer: AdapterLayer, strength: float, check: bool) -> LayerLoss:
    """Write ΔW into the layer's weight, in place."""
    weight, layer_map = base.get_parameter("weight"), map_of(base)
    with torch.no_grad():
        x = _test_inputs(path, layer_map, layer.A.flatten(1).shape[1], weight)
        y_before = base(x) if check else None
        merged, loss, change = merge_tensor(path, weight, layer, layer_map, strength)
        weight.copy_(merged)
        if y_before is not None:
            _check_layer(path, base, x, y_before.to(change.before.dtype), change)
    return loss


def merge_quantized_layer(path: str, base: nn.Module, layer: AdapterLayer, strength: float, check: bool) -> LayerLoss:
    """Dequantise, add ΔW, quantise again into the same tensors, in place. A layer without a change isn't touched."""
    kind, layer_map = layer_kind(base), map_of(base)
    assert kind is not None  # only layers of a kind are merged into
    stored = kind.tensors(base._parameters)
    with torch.no_grad():
        change = change_of(kind.weight_oi(base._parameters, torch.float32), layer, layer_map, strength)
        if not change.delta.any():
            return _loss(change, change.before)
        x = torch.randn(8, change.before.shape[1], generator=_generator(path)).to(change.before.device)
        y_before = base(x) if check else None
        wanted = change.before + change.delta
        for old, new in zip(stored, requantized(kind.storage, stored, wanted), strict=True):
            old.copy_(new)
        after = kind.weight_oi(base._parameters, torch.float32)
        if not after.isfinite().all() and change.before.isfinite().all():
            raise MergeError(f"merge: {path}.weight + ΔW is too large for {kind.storage}. Merge into a float32 copy of the base.")
        if y_before is not None:
            _check_quantized(path, x, y_before, base(x), after - change.before)
    in_bf16 = float(torch.linalg.vector_norm(wanted.bfloat16().float() - wanted))
    return _loss(change, after, lost_in_bf16=in_bf16)


def _loss(change: Change, after: Tensor, lost_in_bf16: float | None = None) -> LayerLoss:
    return LayerLoss(
        weight=float(torch.linalg.vector_norm(change.before)),
        delta=float(torch.linalg.vector_norm(change.delta)),
        lost=float(torch.linalg.vector_norm(after - change.before - change.delta)),
        lost_in_bf16=lost_in_bf16,
    )


def _check_quantized(path: str, x: Tensor, y_before: Tensor, y_after: Tensor, moved_OI: Tensor) -> None:
    """The layer's own outputs must move by x times what its weight moved by; fp8 units round x, and may round y to bf16."""
    expected, found = x @ moved_OI.t(), (y_after - y_before).float()
    off = float((found - expected).norm())
    bound = INPUT_ROUNDED * float(expected.norm()) + OUTPUT_ROUNDED * float(y_before.float().norm())
    if not off <= bound:
        raise MergeError(
            f"merge: the check of {path!r} failed: its outputs moved by {off:.3g} (norm) other than its stored weight did, where "
            f"rounding explains {bound:.3g}. The layer computes more than x·Wᵀ; serve the adapter unmerged."
        )


def _check_layer(path: str, base: nn.Module, x: Tensor, y_before: Tensor, change: Change) -> None:
    """Compare the merged layer's own forward with base plus adapter. The bound is the rounding of the sums that both take."""
    before, A_RI, B_RO, gain_O = change.before, change.A_RI, change.B_RO, change.gain_O
    weight, layer_map = base.get_parameter("weight"), map_of(base)
    wide_x = x.to(before.dtype) if x.is_floating_point() else x
    expected = layer_map.expand(layer_map.shrink(wide_x, A_RI), B_RO)
    expected = y_before + expected if gain_O is None else decomposed(expected, y_before, gain_O, base, layer_map)
    found = base(x).to(y_before.dtype)
    eps = torch.finfo(weight.dtype).eps
    if weight.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        eps = max(eps, TF32_EPS)
    size = wide_x.abs() if x.is_floating_point() else x
    terms = layer_map.whole(size, layer_map.flat(before).abs())
    terms = terms + layer_map.expand(layer_map.shrink(size, A_RI.abs()), B_RO.abs())
    terms = terms + y_before.abs()
    if gain_O is not None:
        terms = terms * layer_map.outputs(gain_O.abs().clamp_min(1), terms)
    bound = 8 * eps * terms
    excess = (found - expected).abs() - bound
    if not bool((excess <= 0).all()):
        worst = float((found - expected).abs().max())
        raise MergeError(
            f"merge: the check of {path!r} failed: merged and unmerged outputs differ by {worst:.3g} where rounding in "
            f"{weight.dtype} explains {float(bound.max()):.3g}. The layer computes more than x·Wᵀ; serve the adapter unmerged."
        )


def _generator(path: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(path))  # its own generator: a merge doesn't move the caller's random numbers


def _test_inputs(path: str, layer_map: LowRankMap, size: int, weight: Tensor) -> Tensor:
    x = layer_map.sample(size, _generator(path)).to(weight.device)
    return x.to(weight.dtype) if x.is_floating_point() else x
