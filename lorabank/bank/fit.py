"""Whether an adapter fits a model, and what a model says about an adapter's use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorabank.bank.kinds import EMBEDDING
from lorabank.bank.layers import layer_kind
from lorabank.bank.quantized import storage_of
from lorabank.bank.targets import adaptable_layers, unsupported_linear_maps
from lorabank.errors import AdapterFileError, TargetError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter, AdapterLayer


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a base layer that can be adapted."""
    kind = layer_kind(layer)
    if kind is None:
        raise TargetError(f"{type(layer).__name__} can't be adapted")
    return kind.features(layer)


def check_fits(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Raise AdapterFileError, naming the layers that the model lacks or has in another shape."""
    if not adapter.layers:
        raise AdapterFileError(f"adapter {name!r} has no layers, so there is nothing to load")
    layers = adaptable_layers(model)
    wrong = []
    for path, part in adapter.layers.items():
        if path not in layers:
            wrong.append(_absent(model, path, layers))
            continue
        if why := misfit(path, part, layers[path]):
            wrong.append(why)
    wrong += [why for path, weight in adapter.base_weights.items() if (why := _other_weight(path, weight, layers.get(path)))]
    if wrong:
        more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise AdapterFileError(
            f"adapter {name!r} doesn't fit this model; nothing was loaded. {'; '.join(wrong[:3])}{more}. "
            "Load the model class that it was trained on."
        )


def _other_weight(path: str, weight: Tensor, layer: nn.Module | None) -> str | None:
    """Why a base weight that came with an adapter isn't this layer's, if it isn't: one that was trained, or has other ids."""
    if layer is None:
        return None  # said already
    mine = layer.get_parameter("weight").detach()
    if mine.shape != weight.shape:
        return (
            f"{path}: the file brings the base's own weight, {tuple(weight.shape)}, and this model's is {tuple(mine.shape)}: "
            "resize its token embeddings as they were in training"
        )
    coarser = max((mine.dtype, weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if not torch.equal(mine.to(coarser), weight.to(mine.device, coarser)):
        return f"{path}: the file brings the base's own weight, and this model has another: it was trained, or is another base's"
    return None


def misfit(path: str, part: AdapterLayer, layer: nn.Module) -> str | None:
    """Why an adapter's layer isn't this layer's, if it isn't."""
    kind, (fan_in, fan_out) = layer_kind(layer), features(layer)
    assert kind is not None
    kernel, looks_up = kind.kernel(layer), kind.storage == EMBEDDING
    if (part.A.ndim > 2) != bool(kernel) or part.looks_up != looks_up:
        what = "a convolution" if part.A.ndim > 2 else "an embedding" if part.looks_up else "a linear layer"
        return f"{path}: made for {what}, the model's layer is a {type(layer).__name__}"
    if part.size != (fan_in, fan_out):
        return f"{path}: made for {part.size[0]} → {part.size[1]} features, the model's layer has {fan_in} → {fan_out}"
    if tuple(part.A.shape[2:]) != kernel or part.groups != kind.groups(layer):
        mine, theirs = (
            " × ".join(map(str, sizes)) + (f" in {groups} groups" if groups > 1 else "")
            for sizes, groups in ((part.A.shape[2:], part.groups), (kernel, kind.groups(layer)))
        )
        return f"{path}: made for a kernel of {mine}, the model's layer has {theirs}"
    return None


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


def _absent(model: nn.Module, path: str, layers: Mapping[str, nn.Module]) -> str:
    present = dict(model.named_modules()).get(path)
    if present is None:
        return f"{path}: the model has no such layer{closest(path, layers)}"
    why = unsupported_linear_maps(model).get(path, f"it is a {type(present).__name__}")
    return f"{path}: can't be adapted yet: {why}"


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
    """PEFT's task type by the model class's name, as transformers names its heads."""
    name = type(model).__name__
    for suffix, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ):
        if name.endswith(suffix):
            return task
    return None
