"""`merge`: an adapter's change written into the base weights, and taken back bit for bit from a kept copy.

Subtracting ΔW again would not restore the base: 16-bit floats round the sum. So the handle owns the original weights.
Shape suffixes: O out, I in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorabank.bank.fit import MERGE_ELSEWHERE, misfit, other_weight
from lorabank.bank.kinds import layer_kind
from lorabank.bank.missing import missing_layers, warn_missing
from lorabank.bank.multihead import weight_name
from lorabank.bank.parts import layer_parts
from lorabank.bank.tied import shared_in
from lorabank.bank.wrapping import unwrapped
from lorabank.errors import AdapterFileError, FingerprintError, MergeError, Setting, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter
from lorabank.formats.dense import WHY, dense_layers
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.readers import UNMERGED
from lorabank.formats.slices import without_slices
from lorabank.kernels.fp8 import E4M3
from lorabank.merging.arguments import an_adapter
from lorabank.merging.extras import check_extras, written
from lorabank.merging.layer import base_norms_of, merge_layer, merge_quantized_layer
from lorabank.merging.outputs import Inputs, LogitsCheck, compare, merged_outputs, outputs_beside
from lorabank.merging.quantized import STORAGES, rounded
from lorabank.merging.report import UNRESOLVED, LayerLoss, MergeReport
from lorabank.merging.saved import fitting_modules

FORCE = Setting("force=True")
MERGED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Original:
    held: Tensor
    """The live parameter, or another tensor that a quantised weight is held in."""
    expert: int | None
    """Of a stack of experts: whose part of it; None: all of it."""
    copy: Tensor
    """Its values before the merge, on the CPU."""
    merged_hash: int
    """Of the values that the merge left, to notice who wrote over them."""

    @property
    def weight(self) -> Tensor:
        """What was changed, as it is now."""
        return self.held if self.expert is None else self.held.detach()[self.expert]


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
                    f"unmerge: {path} is {original.weight.dtype} {tuple(original.weight.shape)} now and was "
                    f"{original.copy.dtype} {tuple(original.copy.shape)} when it was merged; convert the model back first"
                )
            if _hash(original.weight) != original.merged_hash:
                raise MergeError(
                    f"unmerge: {path} was written to since this merge. Take later merges back first, the last one first; "
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

    Modules that it trained in full (`modules_to_save`) take its values, rounded to the model's dtype.

    check: compare each merged layer with base plus adapter on random inputs, within the dtype's rounding.
    inputs: a batch of the model (a dict or one tensor); its outputs (logits) merged are then compared with those unmerged, as
    `handle.logits`. An attached model must be routed to `BASE`.
    say: gets one line of what rounding lost, and one of the outputs compared; None for silence.
    force: merge even where the adapter's fingerprint says that it belongs to another base.
    A quantised base (fp8, nf4, fp4) is dequantised layer by layer, changed, and quantised again: most of a small change is lost
    there, and the report says how much. Of an adapter that was trained on one the report says how far the base's own weights are
    from those that it was trained beside.
    An attached model keeps its adapters: route to `BASE` to see the merged weights alone.
    Raises FingerprintError, or MergeError naming the layer; the model is then as it was. Warns when rounding loses most of
    Δ, which is then below what the weights' storage resolves.
    """
    check_strength(an_adapter(adapter, "merge"), strength)
    adapter = without_slices(adapter, base_norms_of(model))
    if not force:
        check_fingerprint(model, adapter)
    whole = fitting_modules(model, adapter)
    layers = _fitting_layers(model, adapter)
    shared = shared_in(adapter, layers)
    layers = {path: layer for path, layer in layers.items() if path not in shared}  # their weight is another's of them
    _refuse_tied(model, layers, adapter, shared)
    check_extras(model, adapter)
    beside = None if inputs is None else outputs_beside(model, adapter, inputs, strength=strength)
    logits, storage = None, storage_in_training(adapter)
    originals: dict[str, _Original] = {}
    losses: dict[str, LayerLoss] = {}
    try:
        for path, base in layers.items():
            kind = layer_kind(base)
            own, expert = _stored(path, base), None
            if adapter.layers[path].stack:
                stack, _, number = path.rpartition(".")
                own, expert = {path: model.get_parameter(stack)}, int(number)
            for stored, value in own.items():
                original = _Original(value, expert, value, 0)
                originals[stored] = replace(original, copy=original.weight.detach().to("cpu", copy=True))
            moved = _moved(base, storage) if storage is not None and kind is not None and kind.linear else 0.0
            write = merge_quantized_layer if kind is not None and kind.quantized else merge_layer
            losses[path] = replace(write(path, base, adapter.layers[path], strength, check), moved=moved)
            originals |= {stored: replace(originals[stored], merged_hash=_hash(originals[stored].weight)) for stored in own}
        for stored, (own, value) in whole.items():
            originals[stored] = _Original(own, None, own.detach().to("cpu", copy=True), 0)
            own.detach().copy_(value)
            originals[stored] = replace(originals[stored], merged_hash=_hash(own))
        extras = written(model, adapter, strength)
        for each in extras:
            original = _Original(each.held, None, each.held.detach().to("cpu", copy=True), 0)
            originals[each.name] = original
            with torch.no_grad():
                each.held.copy_(each.value)
            originals[each.name] = replace(original, merged_hash=_hash(each.held))
        dtypes = sorted({_storage_name(base) for base in layers.values()})
        moved = {each.name: each.loss for each in extras}
        report = MergeReport(layers=losses, dtypes=tuple(dtypes), extras=moved, trained_in=storage)
        if beside is not None and inputs is not None:
            logits = compare(*beside, merged_outputs(model, inputs), report)
    except BaseException:  # an interrupt too: a base that is half merged is nobody's model
        with torch.no_grad():
            for original in originals.values():
                original.weight.copy_(original.copy)
        raise
    warn_unresolved(report)
    handle = MergeHandle(originals, report)
    handle.logits = logits
    if say is not None:
        for line in [report, *([logits] if logits is not None else [])]:
            say(str(line))
    return handle


def warn_unresolved(report: MergeReport) -> None:
    """Warn, on behalf of the caller's caller, where rounding took most of the change."""
    if report.lost_share <= UNRESOLVED:
        return
    share = f"{report.lost_share:.0%}" if report.lost_share < 1 else "all"
    in_bf16 = report.lost_share_in_bf16
    kept = "" if in_bf16 is None else f" In bf16 it would be {in_bf16:.0%}."
    warnings.warn(
        f"merge: {share} of the adapter's change was lost to rounding in {', '.join(report.dtypes)}: it is small beside the "
        f"weights (‖Δ‖/‖W‖ = {report.relative_change:.2g}) and below what they resolve in {len(report.unresolved)} of "
        f"{len(report.layers)} layers.{kept} Merge into a float32 copy of the base, or serve the adapter unmerged.",
        stacklevel=3,
    )


def check_fingerprint(model: nn.Module, adapter: Adapter) -> None:
    """Raise FingerprintError when `adapter` was trained on another base than `model`. Says nothing without a fingerprint."""
    difference = adapter.fingerprint.compare(Fingerprint.of(model, unwrapped=unwrapped)) if adapter.fingerprint else None
    if difference:
        base = f" ({adapter.base_model})" if adapter.base_model else ""
        raise FingerprintError(
            f"the adapter was trained on another base{base}: {difference}. Load that base, or pass ",
            FORCE,
            " if you know that it fits (a base with another adapter merged in also differs).",
        )


def _fitting_layers(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The base layers that `adapter` changes, by path, all checked before any is touched."""
    if not adapter.layers:
        raise MergeError("merge: the adapter has no layers")
    known = layer_parts(model)
    missing = [path for path in adapter.layers if path not in known]
    if missing:
        raise MergeError(_missing(model, missing, known, len(adapter.layers)))
    check_mergeable(adapter)
    for path, layer in adapter.layers.items():
        weight, kind = known[path].get_parameter("weight"), layer_kind(known[path])
        quantized = kind is not None and kind.quantized
        if weight.is_meta or (weight.dtype not in MERGED_DTYPES and not quantized):
            held = "on the meta device" if weight.is_meta else f"stored as {weight.dtype}"
            raise MergeError(
                f"merge: {path}.weight is {held}; expected float32, float64, bfloat16 or float16. Load the base unquantised."
            )
        if wrong := misfit(path, layer, known[path]) or other_weight(path, adapter, known[path]):
            raise MergeError(f"merge: {wrong}; the adapter belongs to another base")
        if not (all(tensor.isfinite().all() for tensor in layer.tensors.values()) and math.isfinite(layer.scaling)):
            raise AdapterFileError(f"merge: layer {path!r} of the adapter holds NaN or infinity; use an earlier checkpoint of it")
    warn_missing("merge", missing_layers(model, adapter))
    return {path: known[path] for path in adapter.layers}


def check_strength(adapter: Adapter, strength: float) -> None:
    """Raise MergeError for what is no number, and for a part of what is merged whole."""
    if not math.isfinite(strength):
        raise MergeError(f"merge: strength should be a number, got {strength}")
    if strength != 1 and any(layer.magnitude is not None for layer in adapter.layers.values()):
        raise MergeError("merge: a decomposed adapter (DoRA) is merged whole; leave strength out")
    if strength != 1 and adapter.modules:
        raise MergeError(f"merge: {next(iter(adapter.modules))!r} was trained in full, and is merged whole; leave strength out")


def check_mergeable(adapter: Adapter) -> None:
    """Raise MergeError where a layer's change isn't one of the base weight."""
    if paths := dense_layers(adapter):
        raise MergeError(f"merge: {paths[0]} is a convolution in groups, and {WHY}. {UNMERGED.capitalize()}, or train it here.")


def _missing(model: nn.Module, missing: list[str], known: Mapping[str, nn.Module], total: int) -> str:
    shown = ", ".join(repr(path) for path in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    present = dict(model.named_modules()).get(missing[0])
    why = (
        f"; it is a {type(present).__name__}, which can't be merged into yet"
        if present is not None
        else closest(missing[0], known)
    )
    way = "Load the model class that the adapter was trained on." if present is None else MERGE_ELSEWHERE
    return f"merge: {len(missing)} of the adapter's {total} layers are not among the model's layers: {shown}{why}. {way}"


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module], adapter: Adapter, shared: Mapping[str, str]) -> None:
    """A weight that two modules share would change both, which the unmerged adapter doesn't, unless it is `shared` too."""
    users: dict[tuple[torch.device, int], list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if value.numel() and not value.is_meta:
            users.setdefault((value.device, value.data_ptr()), []).append(name)
    for path in layers:
        mine = path.rpartition(".")[0] if adapter.layers[path].stack else weight_name(path, layers[path])
        weight = model.get_parameter(mine)
        ends = {mine, *(f"{head}.weight" for head, embedding in shared.items() if embedding == path)}
        others = [name for name in users[weight.device, weight.data_ptr()] if name not in ends]
        if others:
            raise MergeError(
                f"merge: {path}.weight is tied to {', '.join(others)}: merging would change both, the adapter changes one. "
                "Train with ensure_weight_tying, merge the model's folder (lorabank merge), which unties them, or serve the "
                "adapter unmerged."
            )


def storage_in_training(adapter: Adapter) -> str | None:
    """How the base was quantised while `adapter` was trained; None when it wasn't, or the file doesn't say."""
    storage = adapter.metadata.get(BASE_STORAGE)
    return storage if storage in STORAGES else None


def _stored(path: str, base: nn.Module) -> dict[str, Tensor]:
    """The live tensors that hold a layer's weight, by a name for people."""
    kind = layer_kind(base)
    if kind is None or not kind.quantized:
        return {f"{path}.weight": base.get_parameter("weight")}
    tensors = kind.tensors(base._parameters)
    more = (f"{path}.weight (tensor {index} of its {kind.storage} form)" for index in range(2, len(tensors) + 1))
    return dict(zip((f"{path}.weight", *more), tensors, strict=True))


def _storage_name(base: nn.Module) -> str:
    kind = layer_kind(base)
    if kind is not None and kind.quantized:
        return kind.storage
    return str(base.get_parameter("weight").dtype).removeprefix("torch.")


def _moved(base: nn.Module, storage: str) -> float:
    kind = layer_kind(base)
    if kind is None or kind.storage == storage:
        return 0.0
    weight_OI = kind.weight_oi(base._parameters, None).float()
    return float(torch.linalg.vector_norm(weight_OI - rounded(weight_OI, storage)))


def _hash(weight: Tensor) -> int:
    value = weight.detach()
    plain = value.view(torch.uint8) if value.dtype == E4M3 else value
    return int(torch.hash_tensor(plain).view(torch.int64))
