"""What kohya's and diffusers' files share: checks of their tensors, and metadata that is kept through reading and writing.

A file's own metadata is kept under `safetensors.<key>`, as it is of PEFT's files. What these forms have no place for (the
base's fingerprint, dropout, other metadata) is one JSON text under the key `lorabank`, which other tools pass over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import config_of
from lorabank.formats.files import SAVED_FLOATS, first_non_finite
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.patterns import pattern_value
from lorabank.formats.peft import TENSOR_METADATA
from lorabank.formats.peft_config import config_from_dict, config_to_dict

OWN = "lorabank"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a file says beside its tensors."""

    config: AdapterConfig
    metadata: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)
    """`fingerprint`, `base_model` and `task_type` of the adapter."""


def checked(where: str, tensors: Mapping[str, Tensor], *, allow_non_finite: bool = False) -> Mapping[str, Tensor]:
    """The tensors. Raises AdapterFileError for numbers that aren't floating-point ones, or NaN and infinity unless allowed."""
    for name, value in tensors.items():
        if value.dtype not in SAVED_FLOATS and not (name.endswith(".alpha") and value.numel() == 1):
            raise AdapterFileError(f"{where}: tensor {name!r} is {value.dtype}; expected float32, bfloat16, float16 or float64")
    # without its alpha there is no layer to look at
    fatal = {name: value for name, value in tensors.items() if name.endswith(".alpha")} if allow_non_finite else tensors
    if bad := first_non_finite(fatal):
        raise AdapterFileError(
            f"{where}: tensor {bad!r} holds NaN or infinity: its training diverged, or it overflowed when it was saved in 16 "
            "bits. Use an earlier checkpoint, or one in float32."
        )
    return tensors


def held(problems: Mapping[str, str]) -> str:
    """Layers that a form can't hold, for a message."""
    (first, why), *more = problems.items()
    others = f", nor {len(more)} other layers ({', '.join(repr(path) for path, _ in more[:2])}, …)" if more else ""
    return f"layer {first!r}: {why}{others}. Nothing was written."


def file_metadata(adapter: Adapter, *, own: Collection[str] = ()) -> dict[str, str]:
    """The metadata of a file that holds `adapter`; `own` keys of the adapter's are told by the file itself."""
    theirs = {
        key.removeprefix(TENSOR_METADATA): value for key, value in adapter.metadata.items() if key.startswith(TENSOR_METADATA)
    }
    ours = {key: value for key, value in adapter.metadata.items() if not key.startswith(TENSOR_METADATA) and key not in own}
    config = config_to_dict(adapter.config)
    plain = config_to_dict(config_of(adapter.layers))
    more = {
        "version": 1,
        "config": config if config != plain else None,
        "metadata": dict(sorted(ours.items())),
        "base_model": adapter.base_model,
        "task_type": adapter.task_type,
        "fingerprint": adapter.fingerprint.to_dict() if adapter.fingerprint else None,
    }
    said = {key: value for key, value in more.items() if value}
    return {**theirs, **({OWN: json.dumps(said, separators=(",", ":"))} if len(said) > 1 else {})}


def with_file_metadata(
    where: str,
    metadata: Mapping[str, str],
    layers: Mapping[str, AdapterLayer],
    *,
    without: Collection[str] = (),
    like: AdapterConfig | None = None,
) -> Kept:
    """`file_metadata` back, with a configuration of these layers.

    `without`: keys that don't hold for another file. `like`: how they were trained, where the file says so elsewhere.
    """
    kept = {f"{TENSOR_METADATA}{key}": value for key, value in metadata.items() if key not in (OWN, *without)}
    if OWN not in metadata:
        return Kept(config=config_of(layers, like), metadata=kept)
    try:
        said = json.loads(metadata[OWN])
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where}: metadata {OWN!r}: no valid JSON ({error}). Fetch or save the file again.") from error
    if not isinstance(said, dict) or said.get("version") != 1 or not isinstance(said.get("metadata", {}), dict):
        raise AdapterFileError(f"{where}: metadata {OWN!r}: written by a newer lorabank, or altered. Update lorabank.")
    config = config_from_dict(where, said["config"]) if said.get("config") else None
    if config is None or not _gives(config, layers):  # another tool changed the tensors
        config = config_of(layers, config)
    fingerprint = said.get("fingerprint")
    return Kept(
        config=config,
        metadata={**kept, **{str(key): str(value) for key, value in said.get("metadata", {}).items()}},
        about={
            "base_model": said.get("base_model"),
            "task_type": said.get("task_type"),
            "fingerprint": Fingerprint.from_dict(fingerprint) if fingerprint else None,
        },
    )


def _gives(config: AdapterConfig, layers: Mapping[str, AdapterLayer]) -> bool:
    for path, layer in layers.items():
        rank = pattern_value(config.rank_pattern, path, config.rank)
        alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        if rank != layer.rank or not math.isclose(config.scaling(rank, alpha), layer.scaling, rel_tol=1e-12):
            return False
    return True
