"""Values from YAML or the command line as the type that a field asks for. A failure says expected and got."""

from __future__ import annotations

import collections.abc
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache

from lorabank.config.convert import truth
from lorabank.errors import ConfigError, Setting

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of names"}


@cache
def field_types(kind: type) -> dict[str, object]:
    """Field name to annotation, for one of the config dataclasses."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}  # type: ignore[arg-type]


def is_switch(annotation: object) -> bool:
    """Whether the field is a yes or no, so that its flag needs no value."""
    return bool in _options(annotation)


def is_mapping(annotation: object) -> bool:
    """Whether the field holds names with values, so that its flag may end in one of the names."""
    return any(typing.get_origin(option) is collections.abc.Mapping for option in _options(annotation))


def coerce(value: object, annotation: object, place: str, part: str = "") -> object:
    """`value` as `annotation` (scalars, unions of them, sequences and mappings of scalars). Raises ConfigError at `place`.

    `part`: where in that setting the value stands, such as `[0]`.
    """
    options = _options(annotation)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in options:
            return None
        if value is None or str not in options:
            raise _wrong(place, part, _describe(annotation), "nothing")
    sequence = next((option for option in options if typing.get_origin(option) is collections.abc.Sequence), None)
    by_name = is_mapping(annotation) and (isinstance(value, Mapping) or (isinstance(value, str) and value.startswith("{")))
    if sequence is not None and not by_name and (str not in options or _is_list(value)):
        return _sequence(value, typing.get_args(sequence)[0], annotation, place, part)
    mapping = next((option for option in options if typing.get_origin(option) is collections.abc.Mapping), None)
    if mapping is not None:
        return _mapping(value, typing.get_args(mapping)[1], place, part)
    for kind in (bool, int, float, str):  # the narrowest first: '8' is a number before it is text
        if kind in options:
            result = _scalar(value, kind)
            if result is not None:
                return result
    raise _wrong(place, part, _describe(annotation), repr(value))


def _wrong(place: str, part: str, expected: str, got: str) -> ConfigError:
    return ConfigError(Setting(place), f"{part}: expected {expected}, got {got}")


def _options(annotation: object) -> tuple[object, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _scalar(value: object, kind: type) -> object | None:
    if kind is bool:
        try:
            return truth(value) if isinstance(value, bool | str) else None
        except ConfigError:
            return None
    if isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) else None
    if not isinstance(value, int | float | str):
        return None
    try:
        as_float = float(value)  # YAML 1.1 reads 1e-4 as text
        if kind is float:
            return float(value)
        return int(value) if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", str(value)) else _exact_int(value, as_float)
    except (ValueError, OverflowError):
        return None


def _exact_int(value: object, as_float: float) -> int | None:
    """1e3 is a whole number; 1.0 stays what it says, since `val_split: 1.0` isn't one row."""
    return int(as_float) if isinstance(value, str) and "e" in value.lower() and as_float == int(as_float) else None


def _is_list(value: object) -> bool:
    return not isinstance(value, str) or ("," in value and not value.startswith("re:")) or value.startswith("[")


def _sequence(value: object, item: object, annotation: object, place: str, part: str) -> tuple[object, ...]:
    if isinstance(value, str):
        value = [word.strip() for word in value.strip("[]() ").split(",") if word.strip()]
    elif isinstance(value, int | float) and not isinstance(value, bool) and str not in _options(annotation):
        value = [value]
    if not isinstance(value, Sequence):
        raise _wrong(place, part, _describe(annotation), repr(value))
    return tuple(coerce(entry, item, place, f"{part}[{index}]") for index, entry in enumerate(value))


def _mapping(value: object, item: object, place: str, part: str) -> dict[str, object]:
    if isinstance(value, str) and "[" in value:  # on the command line: {embed_tokens: [3, 4], lm_head: [3]}
        value = _flow(value, place, part)
    if isinstance(value, str):  # q_proj:8,v_proj:16
        pairs = [pair.rpartition(":") for pair in value.strip("{} ").split(",") if pair.strip()]
        if any(not key for key, _, _ in pairs):
            raise _wrong(place, part, "name:value pairs", repr(value))
        value = {key.strip(): entry.strip() for key, _, entry in pairs}
    if not isinstance(value, Mapping):
        raise _wrong(place, part, "names with values", repr(value))
    return {str(key): coerce(entry, item, place, f"{part}.{key}") for key, entry in value.items()}


def _flow(value: str, place: str, part: str) -> object:
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise _wrong(place, part, "names with lists, such as {embed_tokens: [3, 4]}", repr(value)) from error


def _describe(annotation: object) -> str:
    words = []
    for option in _options(annotation):
        origin = typing.get_origin(option)
        if origin is collections.abc.Sequence:
            words.append(_LISTS[typing.get_args(option)[0]])
        elif origin is collections.abc.Mapping:
            words.append("names with values")
        else:
            words.append(_WORDS.get(option, str(option)))  # type: ignore[arg-type]
    return " or ".join(words)
