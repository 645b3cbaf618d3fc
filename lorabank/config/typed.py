"""Errors name a setting as it was typed: `--rank` where a configuration says `defaults.rank`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lorabank.errors import LorabankError, Setting


@contextmanager
def named_as_typed(flags: Mapping[str, str]) -> Iterator[None]:
    """Within it a LorabankError names the settings of `flags` as they were typed.

    `flags`: a setting's place in messages (`defaults.rank`, `seed`, `--learning_rate`) to its flag as the user wrote it.
    An error that carries its settings is told by them; only one that is words alone has its words searched.
    """
    try:
        yield
    except LorabankError as error:
        parts = _parts_as_typed(error, flags)
        if parts == error.parts:
            raise
        # of the tree's own classes: those of other modules may be made from other things than a message
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == LorabankError.__module__)
        raise kind(*parts) from error


def _parts_as_typed(error: LorabankError, flags: Mapping[str, str]) -> tuple[str | Setting, ...]:
    if not error.settings:
        text = as_typed(str(error), flags)
        return error.parts if text == str(error) else (text,)
    return tuple(Setting(flags.get(part.place, part.place)) if isinstance(part, Setting) else part for part in error.parts)


def as_typed(text: str, flags: Mapping[str, str]) -> str:
    """A message with every place that `flags` has replaced by its flag. For errors of packages that don't carry Settings yet."""
    if not flags:
        return text
    places = "|".join(_pattern(place) for place in sorted(flags, key=len, reverse=True))
    return re.sub(places, lambda found: flags[found[0]], text)


def _pattern(place: str) -> str:
    """Where a message speaks of this setting, and not of a file or a value of that name."""
    name = re.escape(place)
    if place.startswith("--"):
        return rf"(?<![\w-]){name}(?![\w.-])"
    if "." not in place:  # a plain word, such as `model`, is meant only where it heads a clause
        return rf"(?:^|(?<=: )|(?<=; )){name}(?=: |\[| ')"
    inside = "" if place.endswith("_pattern") else r"(?!\.\w)"  # defaults.rank_pattern.q is a part of the setting
    return rf"(?<![\w./`'\"-]){name}(?![\w/-]){inside}"
