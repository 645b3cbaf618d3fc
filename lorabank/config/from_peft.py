"""A `peft.LoraConfig`, or a dict in our or PEFT's words, as an `AdapterConfig`. PEFT itself isn't imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any, Protocol

from lorabank.config import aliases
from lorabank.config.adapter import AdapterConfig
from lorabank.config.coerce import coerce, field_types
from lorabank.config.inits import is_default_section
from lorabank.config.peft_fields import Role, with_role
from lorabank.config.translate import translate
from lorabank.errors import ConfigError, Setting

SILENT = with_role(Role.ABOUT, Role.NOTE)
"""Fields of a LoraConfig that say where it comes from, or tune a feature that is named (and refused) by another field."""
PASSED = with_role(Role.SETTING) | (with_role(Role.REFUSED) & set(field_types(AdapterConfig)))
"""Fields that are translated; `AdapterConfig` itself refuses those that aren't supported and have its name."""


class HasToDict(Protocol):
    """What we need of a `peft.LoraConfig`."""

    def to_dict(self) -> dict[str, Any]: ...


def adapter_config_from_peft(config: HasToDict | Mapping[str, Any]) -> AdapterConfig:
    """The `AdapterConfig` with the mathematics of a `peft.LoraConfig` (or of its dict, as in `adapter_config.json`).

    Raises ConfigError for a field that would change the mathematics and isn't supported, by its name.
    """
    raw = dict(config) if isinstance(config, Mapping) else config.to_dict()
    method = raw.get("peft_type") or "LORA"
    kind = str(method.value if isinstance(method, Enum) else method)
    if kind != "LORA":
        raise ConfigError(f"LoraConfig.peft_type: expected LORA, got {kind}. Other methods of PEFT are not supported.")
    passed: dict[Any, object] = {}
    for name, value in raw.items():
        if name in PASSED:
            if value is not None or name == "target_modules":
                passed[name] = value
        elif is_default_section(name, value):
            continue
        elif name not in SILENT and value not in (None, False, "", 0) and value != {} and value != []:
            reason = aliases.REFUSED.get(name, "changes what is computed and is not supported. Leave it out.")
            raise ConfigError(f"LoraConfig.{name}: {reason}")
    if raw.get("bias", "none") == "none":
        passed.pop("bias", None)
    stacks = [str(name) for name in raw.get("target_parameters") or []]
    passed.pop("target_parameters", None)
    if stacks and not raw.get("target_modules"):
        passed["target_modules"] = stacks
        return _build(passed, "LoraConfig.")
    made = _build(passed, "LoraConfig.")
    return (
        replace(made, targets=[*([made.targets] if isinstance(made.targets, str) else made.targets), *stacks]) if stacks else made
    )


def adapter_config_from_dict(tree: Mapping[str, Any]) -> AdapterConfig:
    """An `AdapterConfig` from a dict of its fields; keys of PEFT, axolotl and kohya are translated.

    Raises ConfigError for an unknown key (with the closest), a wrong type or a value out of range.
    """
    return _build(tree, "")


def _build(tree: Mapping[Any, object], place: str) -> AdapterConfig:
    try:
        settings = translate({"defaults": tree}).values["adapter"]
    except ConfigError as error:  # there is no section here
        parts = (Setting(part.place.removeprefix("defaults.")) if isinstance(part, Setting) else part for part in error.parts)
        raise ConfigError(*parts).under(place) from None
    types = field_types(AdapterConfig)
    foreign = sorted(settings.keys() - {item.name for item in fields(AdapterConfig)})
    if foreign:
        raise ConfigError(
            Setting(place + foreign[0]), ": says how an adapter is trained, not what it is. It belongs into a TrainConfig."
        )
    try:
        return AdapterConfig(**{name: coerce(value, types[name], name) for name, value in settings.items()})  # type: ignore[arg-type]
    except ConfigError as error:
        raise error.under(place) from None
