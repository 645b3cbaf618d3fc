"""The settings that an adapter was trained with and is used with again, which its metadata has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter

SECTIONS = ("speech", "diffusion", "images", "detection", "seq2seq", "synthesis")
"""Keys of the metadata whose value is a JSON object of settings, named as the section of the configuration."""

PICTURE_SETTINGS: Mapping[str, tuple[str, ...]] = {"images": ("image_size", "fit", "mean", "std"), "detection": ("image_size",)}
"""Section to what adapters say of the pictures that they see. Older files say nothing there: they mean the defaults."""


def task_settings(adapter: Adapter, section: str) -> dict[str, Any]:
    """What an adapter says of a section; nothing where it says nothing. Raises AdapterFileError for what is no JSON object."""
    said = adapter.metadata.get(section)
    if said is None:
        return {}
    try:
        found = json.loads(said)
    except ValueError as error:
        raise AdapterFileError(f"the adapter's settings of {section} can't be read ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise AdapterFileError(
            f"the adapter's settings of {section} are a {type(found).__name__}, not an object. Fetch it again."
        )
    return found


def settled(adapters: Mapping[str, Adapter], section: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings that all adapters say alike, setting → what each says where they differ). One that says nothing isn't asked."""
    said = {name: own for name, adapter in adapters.items() if (own := task_settings(adapter, section))}
    alike: dict[str, Any] = {}
    differ: dict[str, dict[str, Any]] = {}
    for setting in dict.fromkeys(setting for own in said.values() for setting in own):
        values = {name: own[setting] for name, own in said.items() if setting in own}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            alike[setting] = first
        else:
            differ[setting] = values
    return alike, differ
