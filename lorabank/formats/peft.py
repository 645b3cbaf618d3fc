"""PEFT's adapter folder, both ways: `adapter_config.json`, `adapter_model.safetensors`, and our own `lorabank.json` beside them.

`lorabank.json` holds what PEFT's settings can't say: the exact configuration, the base's fingerprint, other metadata, and the
checksum of the tensors it was written with. It is never needed: a folder without it is a folder that PEFT wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError
from lorabank.formats import grouped, multihead, peft_extras, saved, slices, stacks
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.differences import FROZEN, marked, restored
from lorabank.formats.files import Writer, first_non_finite, read_tensors, refuse_pickle, tensors_writer, write_files
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.norms import warn_norms
from lorabank.formats.peft_config import PeftSettings, config_from_dict, config_to_dict, read_settings, to_peft, undecomposed
from lorabank.formats.peft_keys import (
    base_name,
    from_tensors,
    magnitude_name,
    pair_tensors,
    split_base_weights,
    split_magnitudes,
    tensor_name,
    to_tensors,
)
from lorabank.formats.peft_unknown import warn_unknown
from lorabank.formats.saved import check_modules, split_modules

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
OWN_FILE = "lorabank.json"
TENSOR_METADATA = "safetensors."
SHARED_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "ensure_weight_tying",
    "lora_dropout",
    "init_lora_weights",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "lora_bias",
    "trainable_token_indices",
)
"""Copied into `lorabank.json`, to notice when they were changed in PEFT's file, which other tools go by."""


def save_peft(adapter: Adapter, folder: str | Path) -> Path:
    """Write `adapter` into `folder` (made if missing) and return it. All files are replaced or none.

    Equal adapters give equal bytes. Raises AdapterFileError when PEFT's form can't express the adapter, OutputError when the
    disk is full.
    """
    folder = Path(folder)
    if not adapter.layers:
        raise AdapterFileError("the adapter has no layers, so there is nothing to save")
    recorded, adapter = slices.record(adapter), slices.without_slices(adapter)
    for path, why in undecomposed(adapter).items():
        raise AdapterFileError(f"layer {path!r}: PEFT's form can't hold it: {why}. Merge the adapter into its base instead.")
    tensors: dict[str, Tensor] = {}
    layers = multihead.as_peft_has_them(adapter.layers)
    groups = grouped.compact(layers)
    layers = grouped.as_saved(layers, groups)
    for path, layer in layers.items():
        if not layer.stack:
            tensors |= to_tensors(path, layer)
    tensors |= stacks.to_tensors(stacks.stacks(layers))
    check_modules(adapter.modules, adapter.layers)
    tensors |= saved.to_tensors(adapter.modules)
    tensors |= {base_name(path): weight for path, weight in adapter.base_weights.items()}
    tensors |= peft_extras.to_tensors(adapter)
    more = {
        key.removeprefix(TENSOR_METADATA): value for key, value in adapter.metadata.items() if key.startswith(TENSOR_METADATA)
    }
    writer = tensors_writer(tensors, {**more, "format": "pt"})
    settings = to_peft(adapter, stacks.one_of_each(multihead.one_of_each(layers)))
    own = {
        "version": 1,
        "peft": {key: settings.get(key) for key in SHARED_SETTINGS},
        "config": config_to_dict(adapter.config),
        "metadata": dict(sorted(marked(adapter).items())),
        "tensors_sha256": _sha256(writer),
        "fingerprint": adapter.fingerprint.to_dict() if adapter.fingerprint else None,
    }
    if recorded:
        own["slices"] = recorded
    if groups:
        own["groups"] = groups
    files: dict[str, bytes | Writer] = {
        TENSORS_FILE: writer,
        CONFIG_FILE: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
        OWN_FILE: _readable(own).encode(),
    }
    write_files(folder, files)
    return folder


def load_peft(folder: str | Path, *, allow_non_finite: bool = False) -> Adapter:
    """Read an adapter that PEFT or `save_peft` wrote; tensors on the CPU in the dtype they were saved in.

    Raises AdapterFileError for a missing, truncated or altered file, for a tensor or a setting that isn't supported, and for
    NaN or infinity unless `allow_non_finite`.
    """
    folder = Path(folder)
    where = str(folder / CONFIG_FILE)
    settings = read_settings(where, _read_json(folder / CONFIG_FILE))
    tensors_path = folder / TENSORS_FILE
    if not tensors_path.is_file():
        if (folder / PICKLE_FILE).is_file():
            refuse_pickle(folder / PICKLE_FILE)
        raise AdapterFileError(
            f"{folder}: has {CONFIG_FILE} and no {TENSORS_FILE}; the adapter is incomplete. Fetch or save it again."
        )
    own = _read_own(folder)
    warn_unknown(where, settings.metadata, own.metadata if own else {})
    tensors, tensor_metadata = read_tensors(tensors_path)
    bad = None if allow_non_finite else first_non_finite(tensors)
    if bad:
        raise AdapterFileError(
            f"{tensors_path}: tensor {bad!r} holds NaN or infinity: its training diverged. Use an earlier checkpoint. To look at "
            "it: `lorabank inspect`, or load_peft(folder, allow_non_finite=True)."
        )
    modules, tensors = split_modules(str(tensors_path), settings.raw.get("modules_to_save"), tensors)
    experts, tensors = stacks.split_stacks(str(tensors_path), settings, tensors)
    extras, tensors = peft_extras.split_extras(str(tensors_path), settings.raw, tensors)
    attention, tensors = multihead.split_attention(str(tensors_path), settings, tensors)
    experts |= attention
    magnitudes, tensors = split_magnitudes(str(tensors_path), tensors)
    base_weights, tensors = split_base_weights(str(tensors_path), tensors)
    plain = _layers(str(tensors_path), settings, tensors) if tensors or not experts else {}
    plain = grouped.restored(str(folder / OWN_FILE), plain, own.groups) if own else plain
    layers = _decomposed(str(tensors_path), settings, plain, magnitudes) | experts
    check_modules(modules, layers)
    layers = extras.in_layers(str(tensors_path), layers)
    if not allow_non_finite:  # else it is being looked at
        warn_norms(str(tensors_path), layers)
    metadata = dict(settings.metadata)
    metadata.update(
        {f"{TENSOR_METADATA}{key}": value for key, value in tensor_metadata.items() if (key, value) != ("format", "pt")}
    )
    adapter = Adapter(
        config=settings.adapter_config(where, sorted(layers), list(modules)),
        layers=layers,
        modules=modules,
        base_weights=base_weights,
        biases=extras.biases,
        token_rows=extras.token_rows,
        base_model=_text(settings.raw.get("base_model_name_or_path")),
        task_type=_text(settings.raw.get("task_type")),
        metadata=metadata,
    )
    return _with_own(folder, adapter, settings, own) if own else adapter


@dataclass(frozen=True, kw_only=True)
class _Own:
    config: AdapterConfig
    metadata: Mapping[str, str]
    fingerprint: Fingerprint | None
    peft: Mapping[str, Any]
    slices: object
    groups: object
    """Layer to its number of groups, of those that stand in the file as they are here."""


def _layers(where: str, settings: PeftSettings, tensors: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    layers: dict[str, AdapterLayer] = {}
    for path, (A, B, looks_up) in pair_tensors(where, tensors).items():
        expected = settings.layer_rank(path)
        if A.shape[0] != expected:
            name = tensor_name(path, "A", looks_up=looks_up)
            raise AdapterFileError(
                f"{where}: {name!r} has the rank {A.shape[0]}, {CONFIG_FILE} says {expected} (r or "
                "rank_pattern), so its scaling is unknown. The two files don't belong together; fetch both again."
            )
        layers[path] = from_tensors(where, path, (A, B), settings.layer_scaling(path), looks_up=looks_up)
    return layers


def _decomposed(
    where: str, settings: PeftSettings, layers: Mapping[str, AdapterLayer], magnitudes: Mapping[str, Tensor]
) -> dict[str, AdapterLayer]:
    """The layers with DoRA's magnitudes. Raises AdapterFileError where these aren't as the settings say."""
    expected = list(layers) if settings.use_dora else []
    if wrong := sorted(set(expected) ^ set(magnitudes)):
        has = "no lora_magnitude_vector" if wrong[0] in expected else "a lora_magnitude_vector"
        raise AdapterFileError(
            f"{where}: layer {wrong[0]!r} has {has} ({magnitude_name(wrong[0])!r}), and {CONFIG_FILE} says use_dora: "
            f"{str(settings.use_dora).lower()}. The two files don't belong together; fetch both again."
        )
    for path, magnitude in magnitudes.items():
        if len(magnitude) != layers[path].size[1]:
            raise AdapterFileError(
                f"{where}: layer {path!r} has {len(magnitude)} magnitudes for {layers[path].size[1]} outputs; fetch it again."
            )
    return {path: replace(layer, magnitude=magnitudes[path]) if path in magnitudes else layer for path, layer in layers.items()}


def _read_own(folder: Path) -> _Own | None:
    path = folder / OWN_FILE
    if not path.is_file():
        return None
    data = _read_json(path)
    if (
        not isinstance(data, dict)
        or data.get("version") != 1
        or not all(isinstance(data.get(key), dict) for key in ("metadata", "peft"))
    ):
        raise AdapterFileError(
            f"{path}: not what this version of lorabank writes. Update lorabank, or delete the file: PEFT's two are enough."
        )
    with open(folder / TENSORS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != data.get("tensors_sha256"):
        raise AdapterFileError(
            f"{folder / TENSORS_FILE}: not the file that {OWN_FILE} was written with: altered or damaged (sha256 {digest[:12]}…, "
            f"expected {str(data.get('tensors_sha256'))[:12]}…). If another tool rewrote it on purpose, delete {path}."
        )
    fingerprint = data.get("fingerprint")
    return _Own(
        config=config_from_dict(str(path), data.get("config")),
        metadata={str(key): str(value) for key, value in data["metadata"].items()},
        fingerprint=Fingerprint.from_dict(fingerprint) if fingerprint is not None else None,
        peft=data["peft"],
        slices=data.get("slices"),
        groups=data.get("groups"),
    )


def _with_own(folder: Path, adapter: Adapter, settings: PeftSettings, own: _Own) -> Adapter:
    """Add what `lorabank.json` knows, unless PEFT's settings were changed since: those are what other tools go by."""
    changed = [key for key in SHARED_SETTINGS if key in own.peft and settings.raw.get(key) != own.peft[key]]
    if not changed:
        for path, why in peft_extras.unheld_extras(replace(adapter, config=own.config)).items():  # as files have layers
            raise AdapterFileError(
                f"{folder / OWN_FILE}: its config isn't this adapter's: of {path!r} {why}. It was altered; delete it to load the "
                f"adapter by {CONFIG_FILE} alone."
            )
        adapter = slices.split(str(folder / OWN_FILE), adapter, own.slices)
        adapter = replace(adapter, config=own.config, fingerprint=own.fingerprint, metadata=own.metadata)
        return restored(str(folder / OWN_FILE), adapter) if FROZEN in own.metadata else adapter
    warnings.warn(
        f"{folder / CONFIG_FILE}: {', '.join(changed)} changed since {OWN_FILE} was written; what {CONFIG_FILE} says is taken.",
        stacklevel=3,
    )
    return replace(adapter, fingerprint=own.fingerprint)


def _text(value: object) -> str | None:
    return str(value) if value else None


def _readable(data: object) -> str:
    """JSON with a line for each name, but a list of numbers in one line."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"{path.parent}: has no {path.name}, so the adapter's rank and scaling are unknown. Fetch or save it again."
        ) from error
    except OSError as error:
        raise AdapterFileError(f"{path}: can't be read ({error.strerror or error}). Fetch or save the adapter again.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: no valid JSON ({error}). Fetch or save the adapter again.") from error


class _HashSink(io.BytesIO):
    """A file that keeps only the hash of what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return len(data)


def _sha256(writer: Writer) -> str:
    sink = _HashSink()
    writer(sink)
    return sink.sha256.hexdigest()
