"""Checkpoints: everything that a resumed run needs, written so that a kill at any moment leaves a whole one.

A checkpoint is a folder `step-<pass>` with `state.safetensors` and `state.json`. It is written under another name, flushed, and
renamed; only then are older ones removed. Names with a leading dot are work under way, which `_tidy` puts right after a kill.
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

from lorabank.errors import AdapterFileError, CheckpointError, OutputError, closest
from lorabank.formats.files import read_tensors, tensors_writer, write_files

_NAME = re.compile(r"step-(\d+)")
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's content."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """JSON-able."""


def write_checkpoint(folder: Path, pass_index: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-<pass_index>` atomically, then remove all but the newest `keep`. Raises OutputError on a full disk."""
    _tidy(folder)
    final, temporary = folder / f"step-{pass_index}", folder / f"{_WRITING}{pass_index}"
    values = json.dumps({"format": FORMAT, **checkpoint.values}, indent=1).encode()
    try:
        write_files(temporary, {"state.safetensors": tensors_writer(checkpoint.tensors, {}), "state.json": values})
        if final.exists():  # a folder can't be replaced in one step: the old one steps aside, and _tidy would bring it back
            final.replace(folder / f"{_REPLACED}{pass_index}")
        temporary.replace(final)
    except OSError as error:
        _tidy(folder)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{final}: can't be written ({error.strerror or error})") from error
    for _, old in _found(folder)[:-keep]:
        remove_checkpoint(old)
    _tidy(folder)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None."""
    _tidy(folder)
    found = _found(folder)
    return found[-1][1] if found else None


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint called `wanted` (`step-20`, `20`, or a path). Raises CheckpointError with the ones that there are."""
    _tidy(folder)
    for path in (folder / wanted, folder / f"step-{wanted}", Path(wanted)):
        if (path / "state.json").is_file():
            if path.resolve().parent != folder.resolve():  # going on from it removes what is newer beside it
                raise CheckpointError(
                    f"{path}: the checkpoint lies in another run's folder than {folder.parent}. "
                    "Resume that run, or copy its folder first."
                )
            return path
    names = [path.name for _, path in _found(folder)]
    raise CheckpointError(f"{folder}: no checkpoint {wanted!r}{closest(wanted, names)}. There are: {', '.join(names) or 'none'}.")


def remove_newer(path: Path) -> None:
    """Remove the checkpoints after `path`: the run goes on from there, and they would belong to another course of it."""
    match = _NAME.fullmatch(path.name)
    for index, other in _found(path.parent):
        if match and index > int(match[1]):
            remove_checkpoint(other)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, never leaving half of one under its name."""
    going = path.with_name(f"{_REMOVING}{path.name}")
    path.replace(going)
    shutil.rmtree(going, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder. Raises CheckpointError, naming the file, when it is damaged."""
    try:
        values = json.loads((path / "state.json").read_text())
        tensors, _ = read_tensors(path / "state.safetensors")
    except (OSError, ValueError, AdapterFileError) as error:
        others = ", ".join(p.name for _, p in _found(path.parent) if p != path)
        way = f"Go on from another with --resume NAME: {others}." if others else "There is no other here."
        raise CheckpointError(f"{path}: the checkpoint can't be read: {error}. {way}") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {values.get('format')!r}; it was written by another version"
        )
    return Checkpoint(tensors=tensors, values=values)


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / "state.json").is_file())


def _tidy(folder: Path) -> None:
    """Put right what a kill left: a replaced checkpoint comes back where its successor never came, the rest goes."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if path.name.startswith(_REPLACED):
            successor = folder / f"step-{path.name.removeprefix(_REPLACED)}"
            if successor.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.replace(successor)
        elif path.name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(path, ignore_errors=True)
