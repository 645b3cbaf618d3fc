"""Where converted base models are kept, and how a folder is put there whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lorabank.errors import OutputError

CACHE_VARIABLE = "LORABANK_CACHE"

Say = Callable[[str], None]
"""Receives progress lines."""


def default_cache() -> Path:
    """The cache folder when nobody names one: `~/.cache/lorabank`."""
    return Path.home() / ".cache" / "lorabank"


def cache_from_environment(environ: Mapping[str, str]) -> Path:
    """`LORABANK_CACHE` of `environ`, or the default. For command lines only: below them the cache is an argument."""
    value = environ.get(CACHE_VARIABLE, "")
    return Path(value).expanduser() if value else default_cache()


def build_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, filled by `build(folder)` unless it exists already; a reader never sees a half-written folder.

    `build` writes into a temporary sibling that is renamed at the end; of two processes that race, the first one wins.
    Raises OutputError when the disk is full or the folder can't be written; nothing is left behind then.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"cache folder {str(target.parent)!r} can't be written ({error.strerror}). Name another one with {CACHE_VARIABLE}."
        ) from error
    try:
        build(work)
        try:
            work.rename(target)
        except OSError as error:
            if not (error.errno in (errno.EEXIST, errno.ENOTEMPTY) and target.is_dir()):
                raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OutputError(
            f"disk full while writing {str(target)!r}. Free some space, or name another cache folder with {CACHE_VARIABLE}."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
