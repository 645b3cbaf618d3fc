"""What an adapter's own folder says of the pictures that it was trained on, so that it is used alone as its run is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace

from lorabank.config.diffusion import DiffusionConfig
from lorabank.errors import AdapterFileError, ConfigError
from lorabank.formats.adapter import Adapter
from lorabank.formats.task_settings import settled

SECTION = "diffusion"
KEPT = (
    "resolution",
    "buckets",
    "no_caption",
    "bucket_step",
    "max_aspect",
    "trigger",
    "prediction",
    "sample_steps",
    "sample_guidance",
    "sample_height",
    "sample_width",
    "negative",
)
_OPTIONAL = {"prediction": str, "negative": str, "sample_height": int, "sample_width": int}
"""Those that may be None."""


def as_metadata(settings: DiffusionConfig) -> dict[str, str]:
    """For an adapter that was trained with these settings."""
    return {SECTION: json.dumps({name: getattr(settings, name) for name in KEPT})}


def with_kept(settings: DiffusionConfig, adapters: Mapping[str, Adapter]) -> DiffusionConfig:
    """The settings, where they are all defaults with what the adapters say in their place. Warns of what they say differently.

    Raises AdapterFileError for settings that can't be.
    """
    if settings != DiffusionConfig():
        return settings
    alike, differ = settled(adapters, SECTION)
    differ = {name: values for name, values in differ.items() if name in KEPT}
    if differ:
        each = "; ".join(f"{n} ({', '.join(f'{a} {value!r}' for a, value in values.items())})" for n, values in differ.items())
        warnings.warn(
            f"diffusion: the adapters were trained with different settings: {each}. The defaults are used. Name one adapter "
            "(--adapters), or say how pictures are drawn (--size, --steps, --guidance).",
            stacklevel=2,
        )
    found = {name: value for name, value in alike.items() if name in KEPT}
    for name, value in found.items():
        default = getattr(settings, name)
        kind = _OPTIONAL.get(name, type(default))
        if not (isinstance(value, kind) or (kind is float and isinstance(value, int)) or (name in _OPTIONAL and value is None)):
            raise AdapterFileError(f"the adapter's settings of {SECTION} can't be used ({name}: {value!r}). Fetch it again.")
    try:
        return replace(settings, **found)
    except (ConfigError, TypeError) as error:
        raise AdapterFileError(f"the adapter's settings of {SECTION} can't be used ({error}). Fetch it again.") from error
