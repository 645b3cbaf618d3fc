"""What `bank.add` takes for a configuration: ours, a dict of its fields, or PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabank.config.adapter import AdapterConfig
from lorabank.config.from_peft import adapter_config_from_dict, adapter_config_from_peft
from lorabank.errors import ConfigError


def as_adapter_config(value: Any) -> AdapterConfig:
    """`value` as an AdapterConfig. Raises ConfigError for anything that can't be one."""
    if isinstance(value, AdapterConfig):
        return value
    if isinstance(value, Mapping):
        return adapter_config_from_dict(value)
    if any(cls.__module__.startswith("peft.") for cls in type(value).__mro__):
        return adapter_config_from_peft(value)
    raise ConfigError(f"adapter config: expected lorabank.AdapterConfig, a dict or peft.LoraConfig, got {type(value).__name__}")
