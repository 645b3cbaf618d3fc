"""Every error that lorabank raises on purpose, in one tree.

    LorabankError
    ├── ConfigError            a setting is unknown, of the wrong type or out of range
    ├── TargetError            a target matches no layer, or a layer that can't be adapted
    ├── AdapterNameError       an adapter name is taken, unknown or no path component
    ├── RoutingError           no route, a route that doesn't fit the batch, a lost route
    ├── UnreachedLayerError    a wrapped layer that the forward never called
    ├── FingerprintError       an adapter that was trained on another base
    ├── AdapterFileError       an adapter file that is truncated, tampered with or unreadable
    ├── MergeError             a merge that can't be done or whose check failed
    ├── ModelError             a base model that can't be had or isn't PyTorch
    ├── DataError              a data set that is missing, empty or malformed
    ├── TooLargeError          a row that doesn't fit into a device's memory
    ├── OutputError            an output folder that exists, or a disk that is full
    ├── CheckpointError        a checkpoint that can't be resumed
    └── MissingExtraError      an optional library that isn't installed

A message names the object, what was expected, what came, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting that a message speaks of, kept apart from its words: a command line names the flag in its stead."""

    place: str
    """Where it stands in a configuration, such as `defaults.rank`; `--learning_rate` for what a flag gave."""

    def __str__(self) -> str:
        return self.place


class LorabankError(Exception):
    """Base of every error that lorabank raises on purpose."""

    def __init__(self, *parts: str | Setting) -> None:
        self.parts = parts
        """The message is these one after the other: words, and the settings between them."""
        super().__init__("".join(map(str, parts)))

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings that the message names; empty where it is words alone."""
        return tuple(part for part in self.parts if isinstance(part, Setting))


class ConfigError(LorabankError, ValueError):
    """A setting is unknown, has the wrong type or is out of range."""

    def under(self, place: str) -> ConfigError:
        """The same error about the settings at `place`: what raised it knew their names, not whose they are."""
        return ConfigError(*(Setting(f"{place}{part}") if isinstance(part, Setting) else part for part in self.parts))


class TargetError(LorabankError, ValueError):
    """A target matches no layer, or names a layer that can't be adapted."""


class AdapterNameError(LorabankError, KeyError):
    """An adapter name is taken, unknown, or can't be a folder's name."""

    def __str__(self) -> str:  # KeyError prints its argument's repr
        return str(self.args[0]) if self.args else ""


class RoutingError(LorabankError, RuntimeError):
    """No route is in force, it doesn't fit the batch, or it was lost before backward."""


class UnreachedLayerError(LorabankError, RuntimeError):
    """A wrapped layer was never called by the forward pass, so its adapter would do nothing."""


class FingerprintError(LorabankError, ValueError):
    """The adapter was trained on another base model."""


class AdapterFileError(LorabankError, ValueError):
    """An adapter file is truncated, tampered with, or in a form that can't be read."""


class MergeError(LorabankError, RuntimeError):
    """A merge can't be done, or merged and unmerged outputs disagree."""


class ModelError(LorabankError, ValueError):
    """A base model can't be had, or isn't a PyTorch model."""


class DataError(LorabankError, ValueError):
    """A data set is missing, empty or malformed."""


class TooLargeError(LorabankError, RuntimeError):
    """A row doesn't fit into the device's memory, even alone, or what training needs besides doesn't."""


class OutputError(LorabankError, OSError):
    """An output folder exists already, or the disk is full."""


class CheckpointError(LorabankError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class MissingExtraError(LorabankError, ImportError):
    """An optional library is needed and not installed."""


def first_line(error: BaseException) -> str:
    """What another library said, cut to what a message of ours has room for."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def closest(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest known name, or '' when none is close."""
    options = list(known)
    lowered = {option.lower(): option for option in options}
    hits = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return f" (did you mean {lowered[hits[0]]!r}?)" if hits else ""
