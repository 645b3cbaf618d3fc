"""Trained biases, lora_B's biases and token rows in PEFT's files, both ways.

PEFT keeps a trained bias as a whole, under `.base_layer.bias` of a layer that has A and B and `.bias` of any other module;
lora_B's under `.lora_B.bias`; rows under `.token_adapter.trainable_tokens_delta`, which are the rows themselves in spite of the
name, in the order of the ids in `trainable_token_indices`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lorabank.config.extras import BIAS_MODES, frozen_indices
from lorabank.errors import AdapterFileError, ConfigError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.peft_keys import PREFIX, bare_path, check_dtype
from lorabank.formats.token_rows import TokenRows

_LOW = re.compile(r"(?P<path>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias")
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_ADAPTED = re.compile(r"(?P<path>.+)\.base_layer\.bias")
_OTHER = re.compile(r"(?P<path>.+)\.bias")


@dataclass(frozen=True, kw_only=True)
class FileExtras:
    """What a file holds beside A, B and magnitudes."""

    biases: Mapping[str, Tensor]
    lora_biases: Mapping[str, Tensor]
    token_rows: Mapping[str, TokenRows]

    def in_layers(self, where: str, layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
        """The layers with lora_B's biases. Raises AdapterFileError for one that no layer has."""
        if lone := sorted(self.lora_biases.keys() - layers.keys()):
            raise AdapterFileError(
                f"{where}: layer {lone[0]!r} has a bias of lora_B and no lora_A and lora_B: it is incomplete. Fetch it again."
            )
        if self.lora_biases and (bare := sorted(layers.keys() - self.lora_biases.keys())):
            raise AdapterFileError(
                f"{where}: layer {bare[0]!r} has no '.lora_B.bias' and others have: it is incomplete. Fetch it again."
            )
        made = dict(layers)
        for path, bias in self.lora_biases.items():
            if bias.shape != (layers[path].size[1],):
                raise AdapterFileError(
                    f"{where}: layer {path!r} has a bias of lora_B {tuple(bias.shape)} for {layers[path].size[1]} outputs; "
                    "fetch it again."
                )
            made[path] = replace(layers[path], lora_bias=bias)
        return made


def has_lora_bias(adapter: Adapter) -> bool:
    """Whether lora_B of a layer has a bias."""
    return any(layer.lora_bias is not None for layer in adapter.layers.values())


def unheld_extras(adapter: Adapter) -> dict[str, str]:
    """Module path → why PEFT's settings can't say what an adapter has there beside A and B."""
    found: dict[str, str] = {}
    if has_lora_bias(adapter):
        lacking = [path for path, layer in adapter.layers.items() if layer.lora_bias is None]
        found |= dict.fromkeys(lacking, "lora_B of other layers has a bias and its has none, which PEFT has no setting for")
    if adapter.biases and adapter.config.bias == "none":
        found |= dict.fromkeys(adapter.biases, "its bias was trained, and the configuration says bias: none")
    if adapter.config.bias == "lora_only":
        adapted = {path if layer.outputs is None else path.rpartition(".")[0] for path, layer in adapter.layers.items()}
        beyond = sorted(adapter.biases.keys() - adapted)
        found |= dict.fromkeys(beyond, "its bias was trained, and the configuration says so of adapted layers only")
    return found


def token_indices(adapter: Adapter) -> dict[str, list[int]]:
    """PEFT's setting, by path: for a list it finds the table only where the model has `get_input_embeddings`."""
    return {path: list(own.ids) for path, own in sorted(adapter.token_rows.items())}


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's extras as PEFT's file has them. Raises AdapterFileError where its settings can't say that they are there."""
    for path, why in unheld_extras(adapter).items():
        raise AdapterFileError(f"module {path!r}: PEFT's form can't hold it: {why}. Merge the adapter into its base instead.")
    found: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        if layer.lora_bias is not None:
            found[f"{PREFIX}{path}.lora_B.bias"] = layer.lora_bias
    for path, bias in adapter.biases.items():
        found[f"{PREFIX}{path}{'.base_layer' if path in adapter.layers else ''}.bias"] = bias
    for path, own in adapter.token_rows.items():
        found[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = own.rows
    return found


def split_extras(where: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[FileExtras, dict[str, Tensor]]:
    """(what the file has beside A and B, the other tensors). `settings`: those of `adapter_config.json`.

    Raises AdapterFileError where settings and tensors don't belong together.
    """
    left: dict[str, Tensor] = {}
    low: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    mode, with_low = settings.get("bias") or "none", settings.get("lora_bias") is True
    if mode not in BIAS_MODES:
        raise AdapterFileError(f"{where}: bias in adapter_config.json should be one of {', '.join(BIAS_MODES)}, got {mode!r}")
    for name, value in tensors.items():
        _check_said(where, name, settings)
        if (match := _LOW.fullmatch(name)) and with_low:
            home = low
        elif (match := _ROWS.fullmatch(name)) and settings.get("trainable_token_indices"):
            home = rows
        elif (mode != "none" and (match := _ADAPTED.fullmatch(name))) or (
            mode == "all" and not _LOW.fullmatch(name) and (match := _OTHER.fullmatch(name))
        ):
            home = biases
        else:
            left[name] = value
            continue
        path = bare_path(match["path"])
        if path in home:
            raise AdapterFileError(f"{where}: {name!r} stands there a second time: two adapters in a file. Save each by itself.")
        check_dtype(where, name, value)
        home[path] = value
    if with_low and not low:
        raise AdapterFileError(f"{where}: lora_bias is set and there is no '.lora_B.bias': it is incomplete. Fetch it again.")
    extras = FileExtras(biases=biases, lora_biases=low, token_rows=_token_rows(where, settings, rows))
    return extras, left


def _check_said(where: str, name: str, settings: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for a tensor that the settings know nothing of."""
    for pattern, setting, what in (
        (_LOW, "lora_bias", "a bias of lora_B"),
        (_ROWS, "trainable_token_indices", "trained token embeddings"),
        (_ADAPTED, "bias", "a trained bias"),
    ):
        if pattern.fullmatch(name) and (settings.get(setting) or "none") == "none":
            raise AdapterFileError(
                f"{where}: tensor {name!r} is {what}, and adapter_config.json says {setting}: {settings.get(setting)!r}. The two "
                "files don't belong together; fetch both again."
            )


def _token_rows(where: str, settings: Mapping[str, Any], rows: Mapping[str, Tensor]) -> dict[str, TokenRows]:
    asked = settings.get("trainable_token_indices")
    if not asked:
        return {}
    try:
        asked = frozen_indices(asked)
    except ConfigError as error:
        raise AdapterFileError(f"{where}: {error}") from error
    if not rows:
        raise AdapterFileError(
            f"{where}: trainable_token_indices names ids and there is no '.trainable_tokens_delta': it is incomplete. Fetch it "
            "again."
        )
    found: dict[str, TokenRows] = {}
    for path, value in rows.items():
        ids = _ids_of(path, asked) if isinstance(asked, Mapping) else tuple(asked)
        if ids is None or value.ndim != 2 or len(value) != len(ids):
            told = "names no ids for it" if ids is None else f"names {len(ids)} ids"
            raise AdapterFileError(
                f"{where}: {path!r} has token rows {tuple(value.shape)}, and trainable_token_indices {told}. The two files don't "
                "belong together; fetch both again."
            )
        found[path] = TokenRows(ids, value)
    for name, ids in asked.items() if isinstance(asked, Mapping) else ():
        # of tied tables with the same ids PEFT saves one: whether these are tied the model knows
        if not any(_named(path, name) for path in found) and not any(own.ids == tuple(ids) for own in found.values()):
            raise AdapterFileError(
                f"{where}: trainable_token_indices names {name!r} and there are no rows of it: it is incomplete. Fetch it again."
            )
    return found


def _ids_of(path: str, asked: Mapping[str, Any]) -> tuple[int, ...] | None:
    return next((tuple(ids) for name, ids in asked.items() if _named(path, name)), None)


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
