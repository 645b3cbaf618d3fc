"""A base model that was given as an object: what it has to be, and what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorabank.bank.storages.quantized import storage_of
from lorabank.config.paths import expanded
from lorabank.errors import ConfigError
from lorabank.models.dtypes import dtype_notes
from lorabank.models.load import QUANTIZED, pick_device, pick_dtype
from lorabank.models.names import alias
from lorabank.training.task import TaskBase, TaskKind


def given_base(kind: TaskKind, model: object, processor: Any, *, task: str, dtype: str, device: str, name: str = "") -> TaskBase:
    """The base of a task from objects; `name` is taken where a model of transformers has none of its own.

    The model is only looked at. Raises ConfigError for what is no model, for a processor that `task` can't use, or a device or
    dtype that the model hasn't got.
    """
    kind.processor.check(processor, task)
    module = kind.adopt(model)
    first = next(module.parameters(), None)
    if first is None:
        raise ConfigError(f"model: the {type(model).__name__} given has no parameters, so there is nothing to adapt in it.")
    here, stored = first.device, _dtype_of(module, first)
    if device != "auto" and pick_device(device).type != here.type:
        raise ConfigError(f"device: {device!r} asked for, and the model given is on {here}. Move it with model.to(…) first.")
    _check_storage(module, dtype, stored, here)
    own = str(getattr(module.config, "_name_or_path", "") or "") if isinstance(module, PreTrainedModel) else ""
    told = [kind.processor.without] if processor is None and kind.processor.without else []
    return TaskBase(
        model=module,
        processor=processor,
        name=public_name(own or name, None) if own or name else "",
        folder=None,
        notes=(*dtype_notes(dtype, stored, here), *told),
    )


def public_name(name: str, folder: Path | None) -> str:
    """What other tools can load below the adapter: a hub id stays, a folder is named in full; our alias and a GGUF mean
    nothing to them, so these become the folder of the converted weights."""
    path = expanded(name, place="model")
    if path.is_dir():
        return str(path.resolve())
    if folder is not None and (path.is_file() or alias(name)):
        return str(folder.resolve())
    return name


def _dtype_of(module: nn.Module, first: nn.Parameter) -> torch.dtype:
    return module.dtype if isinstance(module, PreTrainedModel) else first.dtype


def _check_storage(module: nn.Module, dtype: str, stored: torch.dtype, here: torch.device) -> None:
    have = storage_of(module)
    if dtype in QUANTIZED and have != dtype:
        raise ConfigError(
            f"base_dtype: {dtype!r} asked for, and the model given is {have or stored}. Quantise it first: "
            f"lorabank.quantize_base(model, {dtype!r})."
        )
    if dtype not in ("auto", *QUANTIZED) and (have is not None or pick_dtype(dtype, here) != stored):
        way_out = "Convert it first." if have is None else "Load it unquantised."
        raise ConfigError(f"base_dtype: {dtype!r} asked for, and the model given is {have or stored}. {way_out}")
