"""`merge`: an adapter's change written into the base weights, and taken back bit for bit from a kept copy.

Subtracting ΔW again would not restore the base: 16-bit floats round the sum. So the handle owns the original weights.
Shape suffixes: O out, I in, T test inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorabank.bank.fit import misfit, other_weight
from lorabank.bank.layers import layer_kind
from lorabank.bank.parts import layer_parts
from lorabank.errors import AdapterFileError, FingerprintError, MergeError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint
from lorabank.kernels.maps import LowRankMap
from lorabank.kernels.norms import output_norms
from lorabank.merging.outputs import Inputs, LogitsCheck, compare, decomposed, map_of, merged_outputs, outputs_beside
from lorabank.merging.quantized import STORAGES, refusal, rounded
from lorabank.merging.report import LayerLoss, MergeReport

MERGED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WARN_ABOVE = 0.5
"""Share of Δ lost to rounding above which a merge warns."""
TF32_EPS = 2.0**-10  # a GPU may be set to multiply float32 in this precision


@dataclass(frozen=True)
class _Original:
    weight: Tensor
    """The live parameter."""
    copy: Tensor
    """Its values before the merge, on the CPU."""
    merged_hash: int
    """Of the values that the merge left, to notice who wrote over them."""


class MergeHandle:
    """A merge that was done: its report, and the way back. Holds a copy of every weight that it changed, in CPU memory."""

    def __init__(self, originals: Mapping[str, _Original], report: MergeReport) -> None:
        self._originals: dict[str, _Original] | None = dict(originals)
        self.report = report
        """What was changed and what rounding lost."""
        self.logits: LogitsCheck | None = None
        """Merged against unmerged outputs, where `merge` was given inputs."""

    def unmerge(self) -> None:
        """Restore the base weights bit for bit. Raises MergeError if they were restored before, or written to since the merge."""
        if self._originals is None:
            raise MergeError("unmerge: this merge was already taken back")
        for path, original in self._originals.items():
            if original.weight.dtype != original.copy.dtype or original.weight.shape != original.copy.shape:
                raise MergeError(
                    f"unmerge: {path}.weight is {original.weight.dtype} {tuple(original.weight.shape)} now and was "
                    f"{original.copy.dtype} {tuple(original.copy.shape)} when it was merged; convert the model back first"
                )
            if _hash(original.weight) != original.merged_hash:
                raise MergeError(
                    f"unmerge: {path}.weight was written to since this merge. Take later merges back first, the last one first; "
                    "a base that was trained on can't be restored from here, load it again."
                )
        with torch.no_grad():
            for original in self._originals.values():
                original.weight.copy_(original.copy)
        self._originals = None


def merge(
    model: nn.Module,
    adapter: Adapter,
    *,
    check: bool = True,
    strength: float = 1.0,
    force: bool = False,
    inputs: Inputs | None = None,
    say: Callable[[str], object] | None = print,
) -> MergeHandle:
    """Add `strength` · ΔW of every layer of `adapter` to the weights of `model` (plain or attached), in place.

    check: compare each merged layer with base plus adapter on random inputs, within the dtype's rounding.
    inputs: a batch of the model (a dict or one tensor); its outputs (logits) merged are then compared with those unmerged, as
    `handle.logits`. An attached model must be routed to `BASE`.
    say: gets one line of what rounding lost, and one of the outputs compared; None for silence.
    force: merge even where the adapter's fingerprint says that it belongs to another base.
    A quantised base is refused, with what rounding would lose there. For an adapter that was trained on one (fp8, nf4), the
    report says how far the base's own weights are from those that it was trained beside.
    An attached model keeps its adapters: route to `BASE` to see the merged weights alone.
    Raises FingerprintError, or MergeError naming the layer; the model is then as it was. Warns when rounding loses most of Δ.
    """
    if not math.isfinite(strength):
        raise MergeError(f"merge: strength should be a number, got {strength}")
    if strength != 1 and any(layer.magnitude is not None for layer in adapter.layers.values()):
        raise MergeError("merge: a decomposed adapter (DoRA) is merged whole; leave strength out")
    if not force:
        check_fingerprint(model, adapter)
    layers = _fitting_layers(model, adapter, strength)
    _refuse_tied(model, layers, adapter)
    beside = None if inputs is None else outputs_beside(model, adapter, inputs, strength=strength)
    logits, storage = None, _quantized_in_training(adapter)
    originals: dict[str, _Original] = {}
    losses: dict[str, LayerLoss] = {}
    try:
        for path, base in layers.items():
            weight = base.get_parameter("weight")
            copy = weight.detach().to("cpu", copy=True)
            originals[path] = _Original(weight, copy, merged_hash=0)
            kind = layer_kind(base)
            moved = _moved(base, storage) if storage is not None and kind is not None and kind.linear else 0.0
            losses[path] = replace(_merge_layer(path, base, adapter.layers[path], strength, check), moved=moved)
            originals[path] = replace(originals[path], merged_hash=_hash(weight))
        dtypes = sorted({str(original.copy.dtype).removeprefix("torch.") for original in originals.values()})
        report = MergeReport(layers=losses, dtypes=tuple(dtypes), trained_in=storage)
        if beside is not None and inputs is not None:
            logits = compare(*beside, merged_outputs(model, inputs), report)
    except BaseException:  # an interrupt too: a base that is half merged is nobody's model
        with torch.no_grad():
            for original in originals.values():
                original.weight.copy_(original.copy)
        raise
    if report.lost_share > WARN_ABOVE:
        warnings.warn(
            f"merge: {report.lost_share:.0%} of the adapter's change was lost to rounding in {', '.join(dtypes)}: it is small "
            "beside the weights. Merge into a float32 copy of the base, or serve the adapter unmerged.",
            stacklevel=2,
        )
    handle = MergeHandle(originals, report)
    handle.logits = logits
    if say is not None:
        for line in [report, *([logits] if logits is not None else [])]:
            say(str(line))
    return handle


def check_fingerprint(model: nn.Module, adapter: Adapter) -> None:
    """Raise FingerprintError when `adapter` was trained on another base than `model`. Says nothing without a fingerprint."""
    difference = adapter.fingerprint.compare(Fingerprint.of(model)) if adapter.fingerprint else None
    if difference:
        base = f" ({adapter.base_model})" if adapter.base_model else ""
        raise FingerprintError(
            f"the adapter was trained on another base{base}: {difference}. Load that base, or pass force=True if you know "
            "that it fits (a base with another adapter merged in also differs)."
        )


def _fitting_layers(model: nn.Module, adapter: Adapter, strength: float) -> dict[str, nn.Module]:
    """The base layers that `adapter` changes, by path, all checked before any is touched."""
    if not adapter.layers:
        raise MergeError("merge: the adapter has no layers")
    known = layer_parts(model)
    missing = [path for path in adapter.layers if path not in known]
    if missing:
        raise MergeError(_missing(model, missing, known, len(adapter.layers)))
    for path, layer in adapter.layers.items():
        weight, kind = known[path].get_parameter("weight"), layer_kind(known[path])
        if kind is not None and kind.quantized:
            raise MergeError(refusal(path, kind.weight_oi(known[path]._parameters, torch.float32), layer, kind.storage, strength))
        if weight.is_meta or weight.dtype not in MERGED_DTYPES:
            held = "on the meta device" if weight.is_meta else f"stored as {weight.dtype}"
            raise MergeError(
                f"merge: {path}.weight is {held}; expected float32, float64, bfloat16 or float16. Load the base unquantised."
            )
        if wrong := misfit(path, layer, known[path]) or other_weight(path, adapter, known[path]):
            raise MergeError(f"merge: {wrong}; the adapter belongs to another base")
        if not (all(tensor.isfinite().all() for tensor in layer.tensors.values()) and math.isfinite(layer.scaling)):
            raise AdapterFileError(f"merge: layer {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
    return {path: known[path] for path in adapter.layers}


def _missing(model: nn.Module, missing: list[str], known: Mapping[str, nn.Module], total: int) -> str:
    shown = ", ".join(repr(path) for path in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    present = dict(model.named_modules()).get(missing[0])
    why = (
        f"; it is a {type(present).__name__}, which can't be merged into yet"
        if present is not None
        else closest(missing[0], known)
    )
    return (
        f"merge: {len(missing)} of the adapter's {total} layers are not among the model's layers: {shown}{why}. "
        "Load the model class that the adapter was trained on."
    )


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module], adapter: Adapter) -> None:
    """A weight that two modules share would change both, which the unmerged adapter doesn't."""
    users: dict[tuple[torch.device, int], list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if value.numel() and not value.is_meta:
            users.setdefault((value.device, value.data_ptr()), []).append(name)
    for path in layers:
        mine = path.rpartition(".")[0] if adapter.layers[path].stack else f"{path}.weight".lstrip(".")
        weight = model.get_parameter(mine)
        others = [name for name in users[weight.device, weight.data_ptr()] if name != mine]
        if others:
            raise MergeError(
                f"merge: {path}.weight is tied to {', '.join(others)}: merging would change both, the adapter changes one. "
                "Untie the weights first (a model saved with tie_word_embeddings=false), or serve the adapter unmerged."
            )


def _merge_layer(path: str, base: nn.Module, layer: AdapterLayer, strength: float, check: bool) -> LayerLoss:
    weight, layer_map = base.get_parameter("weight"), map_of(base)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A_RI, B_RO = (value.detach().to(weight.device, wide) for value in (layer.A.flatten(1), layer.B.t()))
    B_RO = B_RO * (strength * layer.scaling)
    with torch.no_grad():
        before = weight.to(wide, copy=True)
        delta = layer_map.shape(B_RO.t() @ A_RI)
        gain_O = _gain(layer, layer_map.flat(before), A_RI, B_RO)
        if gain_O is not None:
            delta = layer_map.shape(gain_O[:, None] * layer_map.flat(before + delta)) - before
        x = _test_inputs(path, layer_map, A_RI.shape[1], weight)
        y_before = base(x).to(wide) if check else None
        weight.copy_(before + delta)
        after = weight.to(wide)
        if not after.isfinite().all() and before.isfinite().all():
            raise MergeError(f"merge: {path}.weight + ΔW is too large for {weight.dtype}. Merge into a float32 copy of the base.")
        if y_before is not None:
            _check_layer(path, base, x, y_before, (before, A_RI, B_RO), gain_O)
        lost = torch.linalg.vector_norm(after - before - delta)
        return LayerLoss(
            weight=float(torch.linalg.vector_norm(before)), delta=float(torch.linalg.vector_norm(delta)), lost=float(lost)
        )


def _gain(layer: AdapterLayer, weight_OI: Tensor, A_RI: Tensor, B_RO: Tensor) -> Tensor | None:
    """What a decomposed layer multiplies each output by; None for one that isn't. `B_RO`: with its scaling in it."""
    if layer.magnitude is None:
        return None
    return layer.magnitude.to(A_RI.device, A_RI.dtype) / output_norms(weight_OI, A_RI, B_RO, 1.0)


def _check_layer(
    path: str, base: nn.Module, x: Tensor, y_before: Tensor, parts: tuple[Tensor, Tensor, Tensor], gain_O: Tensor | None
) -> None:
    """Compare the merged layer's own forward with base plus adapter. The bound is the rounding of the sums that both take."""
    before, A_RI, B_RO = parts
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


def _quantized_in_training(adapter: Adapter) -> str | None:
    """How the base was quantised while `adapter` was trained; None when it wasn't, or the file doesn't say."""
    storage = adapter.metadata.get(BASE_STORAGE)
    return storage if storage in STORAGES else None


def _moved(base: nn.Module, storage: str) -> float:
    weight_OI = _weight_oi(base).float()
    return float(torch.linalg.vector_norm(weight_OI - rounded(weight_OI, storage)))


def _hash(weight: Tensor) -> int:
    return int(torch.hash_tensor(weight.detach()).view(torch.int64))


def _test_inputs(path: str, layer_map: LowRankMap, size: int, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(path))  # its own generator: a merge doesn't move the caller's random numbers
    x = layer_map.sample(size, generator).to(weight.device)
    return x.to(weight.dtype) if x.is_floating_point() else x


def _weight_oi(base: nn.Module) -> Tensor:
    """The weight as a view of shape (out, in), whichever way it is stored."""
    kind = layer_kind(base)
    if kind is None:
        raise MergeError(f"merge: a {type(base).__name__} can't be merged into")
    return kind.weight_oi(base._parameters, None)
