"""What an adapter has beside A, B and magnitudes: named where a form or a tool can't hold it, and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter


def extras_by_path(adapter: Adapter) -> dict[str, str]:
    """Module path → what is trained there that isn't a low-rank change of a weight, as a clause."""
    found: dict[str, str] = {}
    for path, layer in adapter.layers.items():
        if layer.lora_bias is not None:
            found[path] = "its lora_B has a bias (lora_bias)"
    for path in adapter.biases:
        found[path] = "its bias is trained"
    for path, own in adapter.token_rows.items():
        found[path] = f"{len(own.ids)} of its token rows are trained"
    return found


def refuse_extras(adapter: Adapter, who: str) -> None:
    """Raise AdapterFileError where `who` would drop trained biases or token rows."""
    for path, what in extras_by_path(adapter).items():
        raise AdapterFileError(
            f"{who} holds low-rank changes only, and of {path!r} {what}. Merge the adapter into its base (lorabank merge), or "
            "keep PEFT's form."
        )


def refuse_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for PEFT's settings of such parts in a form that holds low-rank changes only."""
    for key in ("bias", "lora_bias", "trainable_token_indices"):
        if settings.get(key) not in (None, False, "none", [], {}):
            raise AdapterFileError(
                f"{where}: {key} = {settings[key]!r}: trained biases and token rows aren't read in this form, and without them "
                "the adapter would compute something else. Merge it with the tool that made it."
            )


def extras_error(old: Adapter, new: Adapter) -> float:
    """‖lost‖ / ‖old‖, the largest of all biases, token rows and tensors of modules in full; infinite where one is missing."""
    before, after = _named(old), _named(new)
    if before.keys() != after.keys():
        return math.inf
    return max((_share(before[name], after[name]) for name in before), default=0.0)


def _named(adapter: Adapter) -> dict[str, Tensor]:
    low = {f"{path}.lora_bias": layer.lora_bias for path, layer in adapter.layers.items() if layer.lora_bias is not None}
    whole = {
        f"{path}.{key} (in full)": value
        for path, module in adapter.modules.items()
        for key, value in module.items()
        if value.is_floating_point()
    }
    return {**low, **whole, **adapter.extras}


def _share(old: Tensor, new: Tensor) -> float:
    if old.shape != new.shape:
        return math.inf
    lost, size = float((old.double() - new.double()).norm()), float(old.double().norm())
    return lost / size if size else math.inf if lost else 0.0
