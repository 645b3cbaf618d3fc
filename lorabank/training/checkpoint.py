"""Checkpoints: everything that a resumed run needs, written so that a kill at any moment leaves a whole one.

A checkpoint is a folder `step-<pass>` with `state.safetensors` and `state.json`. It is written under another name, flushed, and
renamed; only then are older ones removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorabank.errors import AdapterFileError, CheckpointError
from lorabank.formats.files import read_tensors, tensors_writer, write_files

_NAME = re.compile(r"step-(\d+)")
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's content."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """JSON-able."""


def write_checkpoint(folder: Path, pass_index: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-<pass_index>` atomically, then remove all but the newest `keep`. Raises OutputError on a full disk."""
    final, temporary = folder / f"step-{pass_index}", folder / f".writing-{pass_index}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        values = json.dumps({"format": FORMAT, **checkpoint.values}, indent=1).encode()
        write_files(temporary, {"state.safetensors": tensors_writer(checkpoint.tensors, {}), "state.json": values})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    for _, old in _found(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint. Raises CheckpointError when there is none."""
    found = _found(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint to resume from. Start the run afresh in another output folder.")
    return found[-1][1]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder. Raises CheckpointError, naming the file, when it is damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint. Folders are called step-<number>.")
    try:
        values = json.loads((path / "state.json").read_text())
        tensors, _ = read_tensors(path / "state.safetensors")
    except (OSError, ValueError, AdapterFileError) as error:
        others = ", ".join(p.name for _, p in _found(path.parent) if p != path)
        raise CheckpointError(f"{path}: the checkpoint can't be read: {error}. Others here: {others or 'none'}.") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {values.get('format')!r}; it was written by another version"
        )
    return Checkpoint(tensors=tensors, values=values)


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / "state.json").is_file())
