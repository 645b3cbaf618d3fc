"""diffusers' `pytorch_lora_weights.safetensors`, both ways: PEFT's tensors by component, and PEFT's settings as metadata.

Keys are `unet.….lora_A.weight`; the metadata `lora_adapter_metadata` is a JSON object of `unet.r`, `unet.lora_alpha` …,
without which every layer's α is its rank. Older spellings (`.lora.down.weight`, `.processor.to_q_lora.up.weight`,
`.lora_linear_layer.down.weight`) are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorabank.config.adapter import AdapterConfig
from lorabank.errors import AdapterFileError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import COMPONENTS, components, in_file_names, in_model_names, of_component, split
from lorabank.formats.extras import refuse_extras, refuse_settings
from lorabank.formats.files import read_tensors, write_tensors
from lorabank.formats.image_files import checked, file_metadata, held, with_file_metadata
from lorabank.formats.norms import warn_norms
from lorabank.formats.peft_config import METADATA_PREFIX, PeftSettings, read_settings, to_peft
from lorabank.formats.peft_config import unheld as unheld_by_peft
from lorabank.formats.peft_keys import PREFIX, from_tensors, pair_tensors, split_magnitudes, to_tensors
from lorabank.formats.peft_unknown import warn_unknown
from lorabank.formats.saved import refuse_modules
from lorabank.formats.slices import without_slices

FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
MAGNITUDE = ".lora_magnitude_vector"
EXTRAS = "diffusers."
"""Prefix of the adapter's metadata under which a component's other settings are kept."""
_OLD_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.to_(q|k|v)_lora\.(down|up)\.weight$"), r".to_\1.lora.\2.weight"),
    (re.compile(r"\.to_out_lora\.(down|up)\.weight$"), r".to_out.0.lora.\1.weight"),
    (re.compile(r"\.lora(_linear_layer)?\.down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora(_linear_layer)?\.up\.weight$"), ".lora_B.weight"),
)
_OLD_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(self_attn)\.to_(q|k|v)\."), r"\1.\2_proj."),
    (re.compile(r"(self_attn)\.to_out\.0\."), r"\1.out_proj."),
)


def load_diffusers(path: str | Path, *, allow_non_finite: bool = False) -> Adapter:
    """Read one of diffusers' files; `allow_non_finite`: NaN and infinity too, to look at them.

    Raises AdapterFileError that names the tensor or setting; nothing is read in part.
    """
    path = Path(path)
    where = str(path)
    tensors, metadata = read_tensors(path)
    named = _by_component(where, checked(where, tensors, allow_non_finite=allow_non_finite))
    settings = _settings(where, metadata.get(SETTINGS), list(named))
    layers: dict[str, AdapterLayer] = {}
    for component, group in named.items():
        found = _layers(where, component, settings.get(component), group)
        layers |= {in_model_names(f"{component}.{inside}"): layer for inside, layer in found.items()}
    layers = dict(sorted(layers.items()))
    warn_norms(where, layers)
    kept = with_file_metadata(where, metadata, layers, without=(SETTINGS, "format"), like=_trained(where, settings, layers))
    adapter = Adapter(config=kept.config, layers=layers, metadata=kept.metadata, **kept.about)
    return replace(adapter, metadata={**kept.metadata, **_extras(adapter, settings)})


def save_diffusers(adapter: Adapter, target: str | Path) -> Path:
    """Write `adapter` as diffusers' file: into a folder under diffusers' name, or to a path that ends in `.safetensors`.

    Equal adapters give equal bytes. Raises AdapterFileError, before anything is written, for what the form can't hold
    (`unheld` lists it); OutputError. Returns the file's path.
    """
    target, adapter = Path(target), without_slices(adapter)
    path = target if target.suffix == ".safetensors" else target / FILE
    refuse_modules(adapter, f"{path}: diffusers' form")
    refuse_extras(adapter, "diffusers' form")
    problems = unheld(adapter)
    if problems:
        raise AdapterFileError(f"{path}: diffusers' form can't hold {held(problems)}")
    tensors, settings = dict[str, Tensor](), dict[str, Any]()
    for module, layer in adapter.layers.items():
        for name, value in to_tensors(in_file_names(module), layer).items():
            # transformers, which loads text encoders, looks for a weight there; PEFT takes both
            end = ".weight" if name.endswith(MAGNITUDE) and module.startswith("text_encoder") else ""
            tensors[name.removeprefix(PREFIX) + end] = value
    for component in components(list(adapter.layers)):
        part = of_component(adapter, component)
        extras = json.loads(adapter.metadata.get(f"{EXTRAS}{component}", "{}"))
        more = {key.removeprefix(METADATA_PREFIX): json.loads(value) for key, value in extras.items()}
        settings |= {f"{component}.{key}": value for key, value in {**more, **to_peft(part)}.items()}
    own = [key for key in adapter.metadata if key.startswith(EXTRAS)]
    more = {**file_metadata(adapter, own=own), "format": "pt", SETTINGS: json.dumps(settings, indent=2, sort_keys=True)}
    write_tensors(path, tensors, more)
    return path


def unheld(adapter: Adapter) -> dict[str, str]:
    """Module path → why diffusers' form can't hold that layer; empty where it can hold all."""
    found: dict[str, str] = {}
    for component in components(list(adapter.layers)):
        prefix = f"{component}." if component else ""
        found |= {f"{prefix}{path}": why for path, why in unheld_by_peft(of_component(adapter, component)).items()}
    for path, layer in adapter.layers.items():
        if not split(path)[0]:
            found[path] = f"it belongs to no component ({', '.join(COMPONENTS[:4])}) of a pipeline"
        elif layer.looks_up:
            found[path] = "it is an embedding"
        elif layer.attention:
            found[path] = "it is nn.MultiheadAttention's, which nobody reads in that form"
    return found


def _by_component(where: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Component → tensors in PEFT's names. Raises AdapterFileError for a tensor of none."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(tensors.items()):
        component, rest = split(key)
        if not component:
            raise AdapterFileError(
                f"{where}: tensor {key!r} belongs to no component; expected {', '.join(COMPONENTS)}. Nothing is dropped in "
                "silence, so the file can't be loaded."
            )
        name = f".{rest}"
        for pattern, new in (*_OLD_NAMES, *(_OLD_TEXT if component.startswith("text_encoder") else ())):
            name = pattern.sub(new, name)
        group = found.setdefault(component, {})
        if PREFIX + name[1:] in group:
            raise AdapterFileError(
                f"{where}: tensor {key!r} is there twice, in an old and a new spelling: two adapters in a file. Save "
                "each by itself."
            )
        group[PREFIX + name[1:]] = value
    if not found:
        raise AdapterFileError(f"{where}: holds no tensors. Fetch or save it again.")
    return found


def _settings(where: str, text: str | None, there: list[str]) -> dict[str, PeftSettings]:
    """Component → its settings; empty where the file has none."""
    if text is None:
        return {}
    place = f"{where}: metadata {SETTINGS!r}"
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{place}: no valid JSON ({error}). Fetch or save the file again.") from error
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{place}: expected a JSON object, got {type(raw).__name__}. Fetch or save the file again.")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        component, name = split(str(key))
        if not component:
            raise AdapterFileError(f"{place}: {key!r} belongs to no component; expected unet.r, unet.lora_alpha and so on.")
        parts.setdefault(component, {})[name] = value
    if lacking := [name for name in parts if name not in there]:
        raise AdapterFileError(
            f"{place}: has settings of {lacking[0]!r} and the file no layers of it: it is incomplete. Fetch it again."
        )
    if lacking := [name for name in there if name not in parts]:
        raise AdapterFileError(
            f"{place}: has no settings of {lacking[0]!r}, whose layers' scaling is unknown: the file is incomplete. Fetch it "
            "again."
        )
    settings = {name: read_settings(f"{place}, {name}", part) for name, part in parts.items()}
    for name, said in settings.items():
        refuse_settings(f"{place}, {name}", said.raw)
        warn_unknown(f"{place}, {name}", said.metadata, {})
    return settings


def _trained(where: str, settings: Mapping[str, PeftSettings], layers: Mapping[str, AdapterLayer]) -> AdapterConfig | None:
    """How the layers were trained, where all components say the same."""
    found = [said.adapter_config(where, sorted(layers)) for said in settings.values()]
    return found[0] if len({(config.dropout, config.init) for config in found}) == 1 else None


def _extras(adapter: Adapter, settings: Mapping[str, PeftSettings]) -> dict[str, str]:
    """The settings of each component that writing it wouldn't give again, as metadata."""
    found: dict[str, str] = {}
    for component, said in settings.items():
        written = to_peft(of_component(adapter, component))
        more = {
            key: value
            for key, value in said.metadata.items()
            if json.loads(value) != written.get(key.removeprefix(METADATA_PREFIX))
        }
        if more:
            found[f"{EXTRAS}{component}"] = json.dumps(more, sort_keys=True)
    return found


def _layers(where: str, component: str, settings: PeftSettings | None, tensors: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    place = f"{where}, {component}"
    magnitudes, rest = split_magnitudes(place, tensors)
    layers: dict[str, AdapterLayer] = {}
    for path, (A, B, looks_up) in pair_tensors(place, rest).items():
        scaling = 1.0
        if settings is not None:
            expected = settings.layer_rank(path)
            if len(A) != expected:
                raise AdapterFileError(
                    f"{place}: layer {path!r} has the rank {len(A)}, {SETTINGS} says {expected}, so its scaling is unknown. "
                    "Fetch or save the file again."
                )
            scaling = settings.layer_scaling(path)
        layers[path] = from_tensors(place, path, (A, B), scaling, looks_up=looks_up)
    if lone := sorted(set(magnitudes) - set(layers)):
        raise AdapterFileError(
            f"{place}: layer {lone[0]!r} has DoRA's magnitudes and no lora_A and lora_B: it is incomplete. Fetch it again."
        )
    use_dora = bool(magnitudes) or (settings is not None and settings.use_dora)
    if use_dora and (lone := sorted(set(layers) - set(magnitudes))):
        raise AdapterFileError(
            f"{place}: layer {lone[0]!r} has no lora_magnitude_vector, and {component}'s adapter is DoRA: it is incomplete. "
            "Fetch it again."
        )
    return {path: replace(layer, magnitude=magnitudes[path]) if path in magnitudes else layer for path, layer in layers.items()}
