"""What an adapter's own folder says of the settings that it was trained with, so that it is used alone as its run is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorabank.errors import AdapterFileError, ConfigError
from lorabank.formats.adapter import Adapter
from lorabank.formats.task_settings import settled


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Settings of one section that go into an adapter's metadata, as JSON."""

    section: str
    names: tuple[str, ...]
    optional: Mapping[str, type]
    """Those that may be None, to what else they are."""
    way_out: str
    """What a user can say where adapters differ."""

    def as_metadata(self, settings: Any) -> dict[str, str]:
        """For an adapter that was trained with these settings."""
        return {self.section: json.dumps({name: getattr(settings, name) for name in self.names})}

    def merged(self, settings: Any, adapters: Mapping[str, Adapter]) -> Any:
        """The settings; where they are all defaults, what the adapters say in their place. Warns of what these say differently.

        Raises AdapterFileError for settings that can't be.
        """
        if settings != type(settings)():
            return settings
        alike, differ = settled(adapters, self.section)
        differ = {name: values for name, values in differ.items() if name in self.names}
        if differ:
            each = "; ".join(
                f"{n} ({', '.join(f'{a} {value!r}' for a, value in values.items())})" for n, values in differ.items()
            )
            warnings.warn(
                f"{self.section}: the adapters were trained with different settings: {each}. The defaults are used. Name one "
                f"adapter (--adapters){self.way_out}.",
                stacklevel=3,
            )
        found = {name: self._read(name, value, settings) for name, value in alike.items() if name in self.names}
        silent = [name for name, adapter in adapters.items() if self.section not in adapter.metadata]
        if silent and (other := [name for name, value in found.items() if value != getattr(settings, name)]):
            said = ", ".join(f"{name} {found[name]!r}" for name in other)
            warnings.warn(
                f"{self.section}: {', '.join(silent)}: the file doesn't say how it was trained, so it is used as the "
                f"others are ({said}).",
                stacklevel=3,
            )
        try:
            return replace(settings, **found)
        except (ConfigError, TypeError) as error:
            raise self._unusable(str(error)) from error

    def _read(self, name: str, value: Any, settings: Any) -> Any:
        default = getattr(settings, name)
        if isinstance(default, tuple) and isinstance(value, list) and len(value) == len(default):
            if all(isinstance(each, int | float) for each in value):
                return tuple(value)
            raise self._unusable(f"{name}: {value!r}")
        kind = self.optional.get(name, type(default))
        may_be = (
            isinstance(value, kind) or (kind is float and isinstance(value, int)) or (name in self.optional and value is None)
        )
        if not may_be:
            raise self._unusable(f"{name}: {value!r}")
        return value

    def _unusable(self, why: str) -> AdapterFileError:
        return AdapterFileError(f"the adapter's settings of {self.section} can't be used ({why}). Fetch it again.")
