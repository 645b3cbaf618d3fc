"""What adapters that are to be combined say of themselves: their task, their labels. The combination says it where they agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lorabank.config.tasks import SECTION_OF, TASK_SECTIONS
from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.formats.labels import label_names
from lorabank.formats.peft import TENSOR_METADATA
from lorabank.formats.task_settings import PICTURE_SETTINGS, SECTIONS, task_settings
from lorabank.merging.weights import Weights

OWN = (TENSOR_METADATA, "combine.", "peft.")
"""Beginnings of what is of one file, or one combination, alone."""

Weighted = Sequence[tuple[Adapter, Weights]]


def check_labels(parts: Weighted, called: Sequence[str]) -> None:
    """Raise MergeError for heads whose outputs mean other labels: of one size they would add up, to nonsense.

    `called`: what messages call the adapters.
    """
    said = [
        (name, labels)
        for name, (adapter, weight) in zip(called, parts, strict=True)
        if weight != 0 and (labels := label_names(adapter))
    ]
    for name, labels in said[1:]:
        if labels != said[0][1]:
            raise MergeError(
                f"combine: the head of {said[0][0]} has the labels {', '.join(said[0][1])}, that of {name} {', '.join(labels)}: "
                "their outputs mean different things. Combine adapters of the same labels in the same order, or keep them apart."
            )


def warn_of_settings(parts: Weighted, called: Sequence[str]) -> None:
    """Warn of settings that adapters with a weight were trained with differently: the combination has none of them.

    `called`: what messages call the adapters.
    """
    differ, defaults = [], []
    for key in SECTIONS:
        said = {name: _settings(a, key) for name, (a, weight) in zip(called, parts, strict=True) if weight != 0}
        for setting in dict.fromkeys(name for own in said.values() for name in own):
            values = {name: own.get(setting, "unsaid") for name, own in said.items()}
            if len(set(map(json.dumps, values.values()))) > 1:
                each = ", ".join(f"{name} {value or repr(value)}" for name, value in values.items())
                differ.append(f"{key}.{setting} ({each})")
                usual = {item.name: item.default for item in fields(TASK_SECTIONS[key])}
                defaults += [f"{key}.{setting} {usual[setting] or repr(usual[setting])}"] if setting in usual else []
    if differ:
        warnings.warn(
            f"combine: the adapters were trained with different settings: {'; '.join(differ)}. The combination has none of them, "
            f"so it is used with the defaults ({', '.join(defaults)}): combine adapters of the same settings if you want theirs.",
            stacklevel=5,
        )


def _settings(adapter: Adapter, key: str) -> dict[str, Any]:
    """What an adapter says of a section; of one of the section's task that says nothing, as older files do, the defaults."""
    said = task_settings(adapter, key)
    if said or key not in PICTURE_SETTINGS or SECTION_OF.get(adapter.metadata.get("task", "")) != key:
        return said
    return {item.name: item.default for item in fields(TASK_SECTIONS[key]) if item.name in PICTURE_SETTINGS[key]}


def _alike(parts: Sequence[Adapter], key: str) -> dict[str, str]:
    """The settings under a key that all have alike, as JSON; nothing where there are none."""
    first, *others = [_settings(adapter, key) for adapter in parts]
    same = {name: value for name, value in first.items() if all(name in own and own[name] == value for own in others)}
    return {key: json.dumps(same)} if same else {}


def agreed(parts: Weighted) -> dict[str, str]:
    """What all adapters with a weight say alike: the task, the names of labels, a task's settings."""
    weighted = [adapter for adapter, weight in parts if weight != 0]
    first, *others = [adapter.metadata for adapter in weighted] or [{}]
    same = {
        key: value for key, value in first.items() if not key.startswith(OWN) and all(other.get(key) == value for other in others)
    }
    return same | {k: v for key in SECTIONS if weighted and key not in same for k, v in _alike(weighted, key).items()}
