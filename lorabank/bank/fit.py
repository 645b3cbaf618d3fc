"""Whether an adapter fits a model, and what a model says about an adapter's use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from lorabank.bank.layers import layer_kind
from lorabank.bank.quantized import storage_of
from lorabank.bank.targets import linear_layers, unsupported_linear_maps
from lorabank.errors import AdapterFileError, TargetError, closest
from lorabank.formats.adapter import BASE_STORAGE, Adapter


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
    layers = linear_layers(model)
    wrong = []
    for path, part in adapter.layers.items():
        if path not in layers:
            wrong.append(_absent(model, path, layers))
            continue
        fan_in, fan_out = features(layers[path])
        if part.A.shape[1] != fan_in or part.B.shape[0] != fan_out:
            got = f"{part.A.shape[1]} → {part.B.shape[0]}"
            wrong.append(f"{path}: made for {got} features, the model's layer has {fan_in} → {fan_out}")
    if wrong:
        more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise AdapterFileError(
            f"adapter {name!r} doesn't fit this model; nothing was loaded. {'; '.join(wrong[:3])}{more}. "
            "Load the model class that it was trained on."
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
