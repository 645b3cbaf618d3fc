"""Settings of a newer PEFT's adapter_config.json: kept with the adapter, said once, written back when it is saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from lorabank.config.peft_fields import PEFT_FIELDS

METADATA_PREFIX = "peft."
"""Of the adapter's metadata that are PEFT's settings, as JSON texts."""


def written_back(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a file brought and that mean nothing here, by name."""
    named = {key.removeprefix(METADATA_PREFIX): value for key, value in metadata.items() if key.startswith(METADATA_PREFIX)}
    return {key: json.loads(value) for key, value in named.items() if key not in PEFT_FIELDS}


def warn_unknown(where: str, metadata: Mapping[str, str], told: Mapping[str, str]) -> None:
    """Say which settings in `metadata` aren't known. `told`: metadata of when that was said before, in our own file."""
    new = sorted(written_back(metadata).keys() - written_back(told).keys())
    if new:
        warnings.warn(
            f"{where}: unknown settings {', '.join(new)} are kept, and written again when the adapter is saved; they change "
            "nothing here. If one of them changes what the adapter computes, outputs will differ from the tool that wrote it.",
            stacklevel=3,
        )
