"""Whether an adapter fits a model, and what a model says about an adapter's use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from lorabank.bank.adaptable import adaptable_layers, unsupported_linear_maps
from lorabank.bank.extra.extra_places import extras_misfits
from lorabank.bank.fused_layers import Slices, slices_of
from lorabank.bank.kinds import EMBEDDING, EXPERTS, layer_kind
from lorabank.bank.multihead import Projection, in_attention
from lorabank.bank.parts import layer_parts, part_names
from lorabank.bank.stacked.stacks import ExpertStack
from lorabank.bank.storages.quantized import storage_of
from lorabank.bank.wrappers import base_path, base_prefix
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError, TargetError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer
from lorabank.formats.components import components, split
from lorabank.formats.files import SAVED_FLOATS
from lorabank.formats.readers import non_finite
from lorabank.formats.slice_vectors import any_norms
from lorabank.formats.slices import sliced, without_slices


def check_finite(name: str, adapter: Adapter) -> None:
    """Raise AdapterFileError for NaN or infinity."""
    if broken := list(non_finite(adapter)):
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise AdapterFileError(
            f"adapter {name!r}: NaN or infinity in {broken[0]}{more}. Use an earlier checkpoint, or pass force=True to load it."
        )


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a base layer that can be adapted."""
    kind = layer_kind(layer)
    if kind is None:
        raise TargetError(f"{type(layer).__name__} can't be adapted")
    return kind.features(layer)


def at_home(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with its layers at the paths that they have in `model`, inside PEFT's wrappers where it has any."""
    prefix = base_prefix(model)
    moved = {base_path(path, prefix): path for path in part_names(model)}
    moved |= {
        f"{parent}.{name}": f"{moved[parent]}.{name}"
        for parent, parts in sliced(adapter.layers).items()
        if parent in moved
        for name in parts
    }
    if adapter.biases or adapter.token_rows:
        modules = {base_path(path, prefix): path for path, _ in model.named_modules()}
        biases = {modules.get(path, path): bias for path, bias in adapter.biases.items()}
        rows = {modules.get(path, path): own for path, own in adapter.token_rows.items()}
        adapter = replace(adapter, biases=biases, token_rows=rows)
    if all(moved.get(path, path) == path for path in adapter.layers):
        return adapter
    weights = {moved.get(path, path): weight for path, weight in adapter.base_weights.items()}
    return replace(adapter, layers={moved.get(path, path): layer for path, layer in adapter.layers.items()}, base_weights=weights)


def check_fits(
    model: nn.Module, name: str, adapter: Adapter, *, force: bool = False, fused: Mapping[str, Slices] | None = None
) -> None:
    """Raise AdapterFileError, naming the layers that the model lacks or has in another shape.

    `force`: weights of the base that came with the adapter may have other values than this model's. `fused`: slices that were
    declared of layers.
    """
    slices = sliced(adapter.layers)
    adapter = without_slices(adapter, any_norms)  # of which only the sizes are looked at
    if not adapter.layers:
        raise AdapterFileError(f"adapter {name!r} has no layers, so there is nothing to load")
    if adapter.config.use_dora and all(layer.magnitude is None for layer in adapter.layers.values()):
        raise AdapterFileError(
            f"adapter {name!r} says use_dora and none of its layers has a magnitude: it would compute something else. Load the "
            "file that it came from again, or set use_dora=False in its config."
        )
    layers = layer_parts(model)
    stacks = {path: layer.count for path, layer in adaptable_layers(model).items() if isinstance(layer, ExpertStack)}
    wrong = []
    for path, part in adapter.layers.items():
        count = stacks.get(path.rpartition(".")[0], 0)
        if path in layers and part.stack != count:
            wrong.append(f"{path}: made for one of {part.stack or 'no'} stacked experts, the model has {count or 'no'} there")
            continue
        if part.dense and part.magnitude is not None:
            wrong.append(f"{path}: DoRA on a convolution in groups whose A reaches from one into another isn't supported")
            continue
        if path not in layers:
            wrong.append(_absent(model, path, layers, several=len(components(list(adapter.layers))) > 1))
            continue
        if why := misfit(path, part, layers[path]) or other_weight(path, adapter, layers[path], force=force):
            wrong.append(why)
    wrong += _other_slices(model, slices, fused or {})
    wrong += extras_misfits(model, adapter)
    if wrong:
        more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        other = any(_UNADAPTABLE not in each for each in wrong)
        way = "Load the model class that it was trained on." if other else MERGE_ELSEWHERE
        raise AdapterFileError(
            f"adapter {name!r} doesn't fit this model; nothing was loaded. {'; '.join(wrong[:3])}{more}. {way}"
        )


def _other_slices(model: nn.Module, slices: Mapping[str, Mapping[str, AdapterLayer]], fused: Mapping[str, Slices]) -> list[str]:
    """What is wrong with slices whose names mean other outputs in this model."""
    layers = {path: layer for path, layer in adaptable_layers(model).items() if path in slices}
    return [
        f"{path}.{name}: made for other outputs of that layer than {name!r} has in this model"
        for path, present in slices_of(model, layers, fused).items()
        for name, part in slices[path].items()
        if name in present and present[name].outputs != part.outputs
    ]


ROUNDED = 4.0
"""Parts in the coarser dtype's last place by which two roundings of one number may differ."""


def other_weight(path: str, adapter: Adapter, layer: nn.Module, *, force: bool = False) -> str | None:
    """Why a base weight that came with an adapter isn't this layer's, if it isn't: one that was trained, or has other ids."""
    weight, kind = adapter.base_weights.get(path), layer_kind(layer)
    if weight is None or kind is None:
        return None
    if kind.quantized:
        return None  # nothing to be compared with
    mine = layer.get_parameter("weight").detach()
    if mine.shape != weight.shape:
        return (
            f"{path}: the file brings the base's own weight, {tuple(weight.shape)}, and this model's is {tuple(mine.shape)}: "
            "resize its token embeddings as they were in training"
        )
    eps = max(torch.finfo(mine.dtype).eps, torch.finfo(weight.dtype).eps)
    a, b = mine.float(), weight.to(mine.device).float()
    if not force and not torch.allclose(a, b, rtol=ROUNDED * eps, atol=ROUNDED * eps * float(a.abs().max()) * 2**-7):
        return (
            f"{path}: the file brings the base's own weight, and this model has another: it was trained, or is another base's. "
            "force=True leaves that out"
        )
    return None


def misfit(path: str, part: AdapterLayer, layer: nn.Module) -> str | None:
    """Why an adapter's layer isn't this layer's, if it isn't."""
    kind, (fan_in, fan_out) = layer_kind(layer), features(layer)
    assert kind is not None
    for tensor in part.tensors.values():
        if tensor.is_meta or tensor.dtype not in SAVED_FLOATS:
            return (
                f"{path}: a tensor is {'on the meta device' if tensor.is_meta else tensor.dtype}; expected floating-point numbers"
            )
    if not math.isfinite(part.scaling):
        return f"{path}: its scaling is {part.scaling}; expected a finite number"
    if part.dense and kind.groups(layer) < 2:
        return f"{path}: made for a convolution in groups, the model's layer has none"
    kernel, looks_up = kind.kernel(layer), kind.storage == EMBEDDING
    if (part.A.ndim > 2) != bool(kernel) or part.looks_up != looks_up:
        what = "a convolution" if part.A.ndim > 2 else "an embedding" if part.looks_up else "a linear layer"
        return f"{path}: made for {what}, the model's layer is a {type(layer).__name__}"
    if isinstance(layer, Projection) and part.magnitude is not None:
        return f"{path}: is decomposed (DoRA), which nn.MultiheadAttention's projections can't be; merge it where it was trained"
    if part.dense:
        fan_in *= kind.groups(layer)
    if part.size != (fan_in, fan_out):
        return f"{path}: made for {part.size[0]} → {part.size[1]} features, the model's layer has {fan_in} → {fan_out}"
    if tuple(part.A.shape[2:]) != kernel or part.groups != kind.groups(layer):
        mine, theirs = (
            (" × ".join(map(str, sizes)) or "none") + (f" in {groups} groups" if groups > 1 else "")
            for sizes, groups in ((part.A.shape[2:], part.groups), (kernel, kind.groups(layer)))
        )
        return f"{path}: made for a kernel of {mine}, the model's layer has {theirs}"
    return None


def check_decomposed(config: AdapterConfig, layers: Mapping[str, nn.Module], shared: Mapping[str, str]) -> None:
    """Raise TargetError where DoRA is asked for on layers that have no direction and magnitude.

    `shared`: paths among them that read another's numbers → whose.
    """
    if not config.use_dora:
        return
    for path, layer in layers.items():
        kind, attends = layer_kind(layer), in_attention(layer)
        if kind is not None and (attends or kind.storage == EXPERTS):
            what = "nn.MultiheadAttention's" if attends else "a stack of experts"
            raise TargetError(f"use_dora: {path!r} is {what}, which DoRA isn't for. Leave it out of targets, or use_dora.")
    if shared:
        head, embedding = next(iter(shared.items()))
        raise TargetError(
            f"use_dora: {head!r} would read the numbers of {embedding!r} (ensure_weight_tying), and a magnitude of each feature "
            "there is none of each output here. Leave out ensure_weight_tying, or use_dora."
        )


def warn_storage(name: str, adapter: Adapter, model: nn.Module) -> None:
    """Warn where the base was stored in 8 or 4 bits while the adapter was trained, and is stored another way now."""
    trained, now = adapter.metadata.get(BASE_STORAGE), storage_of(model)
    if trained is not None and trained != now:
        warnings.warn(
            f"adapter {name!r}: it was trained over a base in {trained}, and this one isn't in that ({now or 'unquantised'}), so "
            f"its results may be somewhat worse. base_dtype: {trained}, or lorabank.quantize_base(model, {trained!r}), gives the "
            "same base.",
            stacklevel=3,
        )


def warn_empty_experts(name: str, adapter: Adapter, model: nn.Module) -> None:
    """Warn where an adapter has nothing for some experts of a stack that it adapts: they are zeros, without a gradient.

    PEFT's form has zeros for them too. An adapter has what its file has, so they aren't started afresh.
    """
    stacks = {path: layer.count for path, layer in adaptable_layers(model).items() if isinstance(layer, ExpertStack)}
    for path, count in stacks.items():
        layers = {i: part for i in range(count) if (part := adapter.layers.get(f"{path}.{i}")) is not None}
        empty = [i for i in range(count) if i not in layers or not (layers[i].A.any() or layers[i].B.any())]
        if layers and empty:
            shown = ", ".join(map(str, empty[:5])) + (" …" if len(empty) > 5 else "")
            warnings.warn(
                f"adapter {name!r}: it has nothing for {len(empty)} of the {count} experts of {path!r} ({shown}). They stay the "
                "base's, in further training too. A new adapter trains them.",
                stacklevel=3,
            )
            return


def _absent(model: nn.Module, path: str, layers: Mapping[str, nn.Module], *, several: bool) -> str:
    """`several`: whether the adapter has layers of several models of a pipeline."""
    present = dict(model.named_modules()).get(path)
    if present is None:
        component, within = split(path)
        a_part = several or component != "transformer" or within in layers  # GPT-2 and others have a module of that name
        if component and a_part and not any(name.startswith(f"{component}.") for name in layers):
            return f"{path}: the model has no {component} (lorabank.formats.components.of_component takes one model's part)"
        return f"{path}: the model has no such layer{closest(path, layers)}"
    if inside := [name.rpartition(".")[2] for name, layer in layers.items() if _is_projection_in(path, name, layer)]:
        return f"{path}: is an nn.MultiheadAttention, whose layers are {', '.join(inside)}"
    why = unsupported_linear_maps(model).get(path, f"it is a {type(present).__name__}")
    return f"{path}: {_UNADAPTABLE}: {why}"


_UNADAPTABLE = "can't be adapted yet"
MERGE_ELSEWHERE = "Merge it with the tool that made it (PEFT's merge_and_unload), and load the merged model."
"""The way out where a model's module can't have what an adapter has of it."""


def _is_projection_in(path: str, name: str, layer: nn.Module) -> bool:
    return isinstance(layer, Projection) and name.rpartition(".")[0] == path


def warn_ranks(name: str, ranks: Mapping[str, int], layers: Mapping[str, nn.Module]) -> None:
    """Warn once when a rank is above what its layer can use."""
    for path, rank in ranks.items():
        fan_in, fan_out = features(layers[path])
        if rank > min(fan_in, fan_out):
            warnings.warn(
                f"adapter {name!r}: rank {rank} is above what layer {path!r} ({fan_in} → {fan_out}) can use; "
                "it costs memory and adds nothing",
                stacklevel=3,
            )
            return


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type by the model class's name, as transformers names its heads.

    None for classifiers: with their task types PEFT expects the head's own weights in the file, and doesn't load one without.
    """
    name = type(model).__name__
    for suffix, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ):
        if name.endswith(suffix):
            return task
    return None
