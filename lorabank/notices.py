"""Warnings that are said once in a process, however often what they are about happens."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(text: str) -> None:
    """A UserWarning, the first time that this text comes."""
    warnings.warn(text, stacklevel=3)
