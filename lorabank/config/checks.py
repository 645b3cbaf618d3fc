"""Range and type checks that config values share. A failed check names the setting, the expected and the given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from lorabank.errors import AdapterNameError, ConfigError, Setting, closest

RESERVED_NAMES = ("base", "checkpoints", "last")
"""`base` routes to no adapter, `checkpoints` and `last` are folders of a run."""
MAX_NAME_LENGTH = 100


def check_adapter_name(name: str) -> None:
    """Raise AdapterNameError unless `name` can be a folder's name and isn't reserved."""
    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) and not name.endswith(".")
    if not fits or len(name) > MAX_NAME_LENGTH:
        raise AdapterNameError(
            f"adapter name {name!r}: expected up to {MAX_NAME_LENGTH} letters, digits, '_', '-' or '.', the first no '-' or '.', "
            "the last no '.', since it becomes a folder's name"
        )
    if name.lower() in RESERVED_NAMES:
        raise AdapterNameError(f"adapter name {name!r} is taken by lorabank itself; choose another")


def freeze_sequences(value: Any) -> None:
    """Turn the list fields of a frozen dataclass into tuples, so that equal settings are equal values."""
    for item in fields(value):
        current = getattr(value, item.name)
        if isinstance(current, Sequence) and not isinstance(current, str | tuple):
            object.__setattr__(value, item.name, tuple(current))


def _wrong(name: str, expected: str, value: object, *, part: str = "", hint: str = "") -> ConfigError:
    """`part`: where in the setting the value stands, such as `['q_proj']`."""
    return ConfigError(Setting(name), f"{part}: expected {expected}, got {value!r}{hint}")


def is_finite(value: float) -> bool:
    """Whether a number is one that a float can hold; a whole number in a file may have any number of digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)


def _number(name: str, value: object, part: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "a number", value, part=part)
    if not is_finite(value):
        raise _wrong(name, "a finite number", value, part=part)
    return float(value)


def check_number(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number."""
    _number(name, value)


def check_positive_int(name: str, value: object, *, part: str = "", hint: str = "") -> None:
    """Raise ConfigError unless `value` is an int ≥ 1. `part`: where in the setting it stands, such as `['q_proj']`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(name, "a whole number ≥ 1", value, part=part, hint=f"; {hint}" if hint else "")


def check_non_negative_int(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is an int ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(name, "a whole number ≥ 0", value)


def check_positive(name: str, value: object, *, part: str = "") -> None:
    """Raise ConfigError unless `value` is a finite number > 0. `part`: where in the setting it stands."""
    if _number(name, value, part) <= 0:
        raise _wrong(name, "a number > 0", value, part=part)


def check_non_negative(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number ≥ 0."""
    if _number(name, value) < 0:
        raise _wrong(name, "a number ≥ 0", value)


def check_fraction(name: str, value: object) -> None:
    """Raise ConfigError unless 0 ≤ `value` < 1."""
    if not 0 <= _number(name, value) < 1:
        raise _wrong(name, "a number in [0, 1)", value)


def check_share_or_count(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a share below 1, or a whole number."""
    if _number(name, value) < 0 or (_number(name, value) >= 1 and not isinstance(value, int)):
        raise _wrong(name, "a share in [0, 1) or a whole number of rows", value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    options = list(choices)
    if value not in options:
        raise _wrong(name, f"one of {', '.join(options)}", value, hint=closest(str(value), options))
