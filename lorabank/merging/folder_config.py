"""What a merged folder's config.json says: the class, the labels and the ties of the model that the folder then holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorabank.bank.task_class import VOCABULARY, TaskModel, label_settings, skeleton_of, vocabulary
from lorabank.errors import MergeError, ModelError
from lorabank.formats.adapter import Adapter
from lorabank.merging.ties import check_partable, parted, untied_settings


def read_config(folder: Path) -> Any:
    """The transformers configuration of a folder. Raises ModelError for a wrong one, MergeError for quantised weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # wrong values surface as whatever the model's config class happens to raise
        raise ModelError(f"model {str(folder)!r}: its config.json can't be used ({str(error)[:200]}).") from error
    if getattr(config, "quantization_config", None):
        raise MergeError(f"merge: {str(folder)!r} holds quantised weights; use the model's bf16 or fp32 release")
    return config


def merged_settings(settings: Mapping[str, Any], config: Any, task: TaskModel, adapter: Adapter) -> dict[str, Any]:
    """The config.json of the merged model. settings: the base's; config: the same as transformers reads it.

    Equal to the base's where the adapter changes nothing that a configuration speaks of. Raises MergeError for ties that it can't
    part.
    """
    made = copy.deepcopy(dict(settings))
    name = task.kind.__name__
    if (settings.get("architectures") or [None])[0] != name:
        made["architectures"] = [name]
    named = label_settings(config, task, adapter)
    if task.labels is not None or named:
        for key in ("num_labels", "_num_labels"):
            made.pop(key, None)
    if task.labels is not None:
        made["id2label"] = {str(index): f"LABEL_{index}" for index in range(task.labels)}
        made["label2id"] = {f"LABEL_{index}": index for index in range(task.labels)}
    made |= named
    if (ids := vocabulary(config, task, adapter)) is not None:
        _set(made, VOCABULARY, ids)
    if apart := parted(skeleton_of(task.kind, as_config(config, made)), adapter):
        made = untied_settings(made)
        check_partable(skeleton_of(task.kind, as_config(config, made)), adapter, apart)
    return made


def as_config(like: Any, settings: Mapping[str, Any]) -> Any:
    """Settings as transformers' own configuration, of the class of `like`."""
    return type(like).from_dict(copy.deepcopy(dict(settings)))


def with_dtype(settings: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The settings with the dtype in which every weight is stored; None leaves what they say."""
    made = dict(settings)
    if dtype is not None:
        made.pop("torch_dtype", None)
        made["dtype"] = str(dtype).removeprefix("torch.")
    return made


def _set(settings: dict[str, Any], key: str, value: int) -> None:
    """Where the settings have the key: at the top, or in the language model's part."""
    inner = settings.get("text_config")
    if isinstance(inner, dict) and key not in settings:
        inner[key] = value
    else:
        settings[key] = value
