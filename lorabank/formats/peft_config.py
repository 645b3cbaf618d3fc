"""`adapter_config.json`: PEFT's settings to ours and back. What changes the mathematics is either understood or refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lorabank.config.adapter import AdapterConfig
from lorabank.config.checks import is_finite
from lorabank.config.peft_fields import PEFT_FIELDS, Role, with_role
from lorabank.errors import AdapterFileError, ConfigError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.patterns import pattern_value, to_patterns
from lorabank.formats.peft_extras import has_lora_bias, token_indices, unheld_extras
from lorabank.formats.peft_keys import file_rank
from lorabank.formats.peft_unknown import METADATA_PREFIX, written_back

READ = with_role(Role.SETTING, Role.ABOUT)
"""Keys that become fields of our values."""
REFUSED = {name: field.feature for name, field in PEFT_FIELDS.items() if field.role is Role.REFUSED}
"""Keys that change what the adapter computes, with the name of what isn't supported yet."""
HARMLESS_INITS = ("False", "eva", "orthogonal", "mica")  # other starting values for A and B, the base untouched


def to_peft(adapter: Adapter, layers: Mapping[str, AdapterLayer] | None = None) -> dict[str, Any]:
    """The settings PEFT needs to rebuild exactly `adapter`'s layers. Defaults that older versions don't know are left out.

    `layers`: the adapter's, but one of each stack of experts; without them there is no such stack.
    """
    layers = adapter.layers if layers is None else layers
    rank, rank_pattern = to_patterns({path: file_rank(layer) for path, layer in layers.items()})
    alphas = {path: _alpha(path, layer, adapter.config.use_rslora) for path, layer in layers.items()}
    stacks = sorted(path for path, layer in layers.items() if layer.stack)
    alpha, alpha_pattern = to_patterns(alphas)
    low = has_lora_bias(adapter)
    settings: dict[str, Any] = {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base_model,
        "bias": adapter.config.bias if adapter.biases else "none",
        "fan_in_fan_out": stored_transposed(adapter),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if adapter.config.init == "gaussian" and not low else True,  # PEFT has not both
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if stacks else adapter.config.dropout,  # PEFT has none for stacks, and refuses the file with one
        "modules_to_save": sorted(adapter.modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": json.loads(adapter.metadata.get(f"{METADATA_PREFIX}revision", "null")),
        "target_modules": _target_modules(sorted(layers.keys() - set(stacks))),
        "task_type": adapter.task_type,
    }
    if stacks:
        settings["target_parameters"] = stacks
    if adapter.config.use_rslora:
        settings["use_rslora"] = True
    if adapter.config.ensure_weight_tying:
        settings["ensure_weight_tying"] = True
    if any(layer.magnitude is not None for layer in adapter.layers.values()):
        settings["use_dora"] = True
    if low:
        settings["lora_bias"] = True
    if adapter.token_rows:
        settings["trainable_token_indices"] = token_indices(adapter)
    return {**written_back(adapter.metadata), **settings}


def unheld(adapter: Adapter) -> dict[str, str]:
    """Module path → why PEFT's settings can't say what that layer is; empty where they can."""
    found: dict[str, str] = unheld_extras(adapter)
    found |= undecomposed(adapter)
    for path, layer in adapter.layers.items():
        if not (math.isfinite(layer.scaling) and layer.scaling > 0):
            found[path] = f"its scaling is {layer.scaling:g}, and α is above 0 there. Multiply B by it and use a scaling of 1"
    return found


def undecomposed(adapter: Adapter) -> dict[str, str]:
    """Module path → why it isn't held, of layers without a magnitude beside decomposed ones."""
    plain = [path for path, layer in adapter.layers.items() if layer.magnitude is None]
    why = "other layers are decomposed (DoRA) and it isn't, which PEFT has no setting for"
    return dict.fromkeys(plain, why) if len(plain) < len(adapter.layers) else {}


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What an `adapter_config.json` says, checked."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    raw: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def target_parameters(self) -> list[str]:
        """Parameters of modules that are adapted, such as stacked expert weights, by the end of their paths."""
        return list(self.raw.get("target_parameters") or [])

    def layer_rank(self, path: str) -> int:
        """The rank that PEFT would give the layer."""
        return pattern_value(self.rank_pattern, path, self.rank)

    def layer_scaling(self, path: str) -> float:
        """The factor on B·A that PEFT would give the layer."""
        rank, alpha = self.layer_rank(path), pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def adapter_config(self, where: str, paths: list[str], modules: list[str] | None = None) -> AdapterConfig:
        """Our configuration for these settings. Raises AdapterFileError when a value is out of range.

        `modules`: paths of those that the file has in full.
        """
        raw = self.raw
        layers = raw.get("layers_to_transform")
        try:
            return AdapterConfig(
                rank=self.rank,
                alpha=self.alpha,
                targets=_targets(raw.get("target_modules"), self.target_parameters) or paths,
                exclude=_names(raw.get("exclude_modules")) or (),
                layers=[layers] if isinstance(layers, int) else layers or None,
                rank_pattern=self.rank_pattern,
                alpha_pattern=self.alpha_pattern,
                dropout=raw.get("lora_dropout") or 0.0,
                init="gaussian" if raw.get("init_lora_weights") == "gaussian" else "uniform",
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                ensure_weight_tying=raw.get("ensure_weight_tying") is True,
                modules_to_save=modules or None,
                bias=raw.get("bias") or "none",
                lora_bias=raw.get("lora_bias") is True,
                trainable_token_indices=raw.get("trainable_token_indices") or (),
            )
        except (ConfigError, TypeError) as error:
            raise AdapterFileError(f"{where}: {error}") from error


def read_settings(where: str, raw: object) -> PeftSettings:
    """Check a parsed `adapter_config.json`. Raises AdapterFileError for what isn't plain LoRA or isn't understood."""
    if not isinstance(raw, dict):
        raise AdapterFileError(
            f"{where}: expected a JSON object with PEFT's settings, got {type(raw).__name__}. Fetch or save it again."
        )
    if raw.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(
            f"{where}: peft_type is {raw['peft_type']!r}; only 'LORA' adapters can be read. Merge it with the tool that made it."
        )
    _refuse_unsupported(where, raw)
    rank = raw.get("r")
    alpha = raw.get("lora_alpha", 8)  # PEFT's own default
    if type(rank) is not int or rank < 1:
        raise AdapterFileError(f"{where}: r should be a whole number ≥ 1, got {rank!r}")
    if type(alpha) not in (int, float) or not is_finite(alpha):
        raise AdapterFileError(f"{where}: lora_alpha should be a number, got {str(alpha)[:120]}")
    for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(raw.get(key), bool | None):
            raise AdapterFileError(f"{where}: {key} should be true or false, got {json.dumps(raw[key])[:120]}")
    names = raw.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(f"{where}: target_parameters should be a list of names, got {json.dumps(names)[:120]}")
    kept = {key: value for key, value in raw.items() if key not in READ and not _empty(value)}
    return PeftSettings(
        rank=rank,
        alpha=alpha,
        rank_pattern=_pattern(where, "rank_pattern", raw.get("rank_pattern"), (int,)),
        alpha_pattern=_pattern(where, "alpha_pattern", raw.get("alpha_pattern"), (int, float)),
        use_rslora=raw.get("use_rslora") is True,
        use_dora=raw.get("use_dora") is True,
        raw=raw,
        metadata={f"{METADATA_PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in sorted(kept.items())},
    )


def config_to_dict(config: AdapterConfig) -> dict[str, Any]:
    """A configuration as JSON values, in the order of its fields; patterns keep their order, which they are matched in."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def config_from_dict(where: str, data: object) -> AdapterConfig:
    """Read `config_to_dict`'s form back. Raises AdapterFileError."""
    names = {field.name for field in fields(AdapterConfig)}
    if not isinstance(data, dict) or not data.keys() <= names:
        extra = sorted(set(data) - names) if isinstance(data, dict) else data
        raise AdapterFileError(
            f"{where}: config has what this version doesn't know: {extra}. It was written by a newer lorabank or altered; "
            "delete lorabank.json to load the adapter by adapter_config.json alone."
        )
    default = config_to_dict(AdapterConfig())
    try:
        return AdapterConfig(**{key: value for key, value in data.items() if value != default[key]})
    except (ConfigError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{where}: config: {error}") from error


def _refuse_unsupported(where: str, raw: Mapping[str, Any]) -> None:
    for key, kind in REFUSED.items():
        if not _empty(raw.get(key)):
            raise AdapterFileError(
                f"{where}: {key} = {json.dumps(raw[key])[:80]}: {kind} is not supported yet, and without it the adapter would "
                "compute something else. Merge it with the tool that made it, or train it again without."
            )
    init = raw.get("init_lora_weights", True)
    if init is not None and str(init) not in ("True", "gaussian", *HARMLESS_INITS):
        raise AdapterFileError(
            f"{where}: init_lora_weights = {init!r} rewrites the base weights before training, so the adapter's base "
            "isn't the published one. Save it with PEFT's path_initial_model_for_weight_conversion and load that."
        )


def _pattern(where: str, key: str, value: object, kinds: tuple[type, ...]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(type(number) in kinds and is_finite(number) for number in value.values()):
        raise AdapterFileError(f"{where}: {key} should map module names to numbers, got {json.dumps(value)[:120]}")
    for pattern, number in value.items():
        if key == "rank_pattern" and number < 1:
            raise AdapterFileError(f"{where}: {key}[{pattern!r}] should be ≥ 1, got {number}")
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise AdapterFileError(f"{where}: {key}: {pattern!r} is no regular expression: {error}") from error
    return value


def _names(value: object) -> str | list[str] | None:
    if isinstance(value, str):
        return value if value == "all-linear" else f"re:{value}"
    return [str(item) for item in value] if isinstance(value, list) else None


def _targets(modules: object, parameters: list[str]) -> list[str] | str | None:
    names = _names(modules)
    return [*([names] if isinstance(names, str) else names or []), *parameters] if parameters else names


def _alpha(path: str, layer: AdapterLayer, use_rslora: bool) -> float:
    """The alpha whose scaling is exactly the layer's; whole numbers as int, which some readers insist on."""
    divisor = math.sqrt(file_rank(layer)) if use_rslora else file_rank(layer)
    if not (math.isfinite(layer.scaling) and layer.scaling > 0):
        raise AdapterFileError(
            f"layer {path!r}: PEFT's form needs a scaling > 0, got {layer.scaling}. Multiply B by it and use a scaling of 1."
        )
    near = layer.scaling * divisor
    candidates = [float(round(near)), near, math.nextafter(near, 0.0), math.nextafter(near, math.inf), float(f"{near:.12g}")]
    alpha = min(candidates, key=lambda alpha: (abs(alpha / divisor - layer.scaling), len(repr(alpha))))
    return int(alpha) if alpha.is_integer() else alpha


def _target_modules(paths: list[str]) -> list[str] | str:
    """Whole paths. In PEFT a listed name also matches deeper modules that end with it, so short paths become a pattern."""
    if all(path.count(".") >= 2 for path in paths) and not any(a.endswith(f".{b}") for a in paths for b in _roots(paths)):
        return paths
    return "|".join(re.escape(path) for path in paths)


def _roots(paths: list[str]) -> list[str]:
    # Only a path that is shorter than another can be another's end.
    longest = max((path.count(".") for path in paths), default=0)
    return [path for path in paths if path.count(".") < longest]


def stored_transposed(adapter: Adapter) -> bool:
    """Whether adapted weights are stored (in, out), as GPT-2's are: a PEFT file said so, or the base's fingerprint shows it."""
    if adapter.metadata.get(f"{METADATA_PREFIX}fan_in_fan_out") == "true":
        return True
    sampled = adapter.fingerprint.tensors if adapter.fingerprint else {}
    for path, layer in adapter.layers.items():
        shape = layer.size[::-1]
        if layer.looks_up or layer.A.ndim > 2:
            continue
        found = sampled.get(f"{path}.weight")
        if found is not None and shape[0] != shape[1] and found.shape == shape[::-1]:
            return True
    return False


def _empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value
