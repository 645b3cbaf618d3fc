"""Warnings that are said once in a process or a run, however often what they are about happens."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(text: str) -> None:
    """A UserWarning, the first time that this text comes."""
    warnings.warn(text, stacklevel=3)


def new_run() -> None:
    """Let every text be said again: what a run tells of itself doesn't depend on what its process did before."""
    warn_once.cache_clear()
