"""Folders that hold a folder for each split (`train`, `validation`, `test`), as data sets of pictures and sounds are shared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lorabank.config.paths import expanded
from lorabank.data.listing import is_file, is_folder, listed
from lorabank.data.read import Source
from lorabank.errors import DataError

SPLITS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Part of a data set → names that folders have for it."""


def hidden(entry: Path) -> bool:
    """Whether a file or folder is a system's own, no part of the data."""
    return entry.name.startswith((".", "__MACOSX", "Thumbs.db"))


def split_folder(folder: Path, role: str) -> Path | None:
    """The part of a folder that holds one a split; None for another.

    Raises DataError where it holds others, not this one, and where it may not be read.
    """
    below = _below(folder)
    known = {name for names in SPLITS.values() for name in names}
    if not below or not set(below) <= known:
        return None
    hit = next((below[name] for name in SPLITS[role] if name in below), None)
    if hit is None:
        raise DataError(f"{folder}: holds {', '.join(sorted(below))}, and no folder {SPLITS[role][0]!r} for {role} data")
    return hit


def held_out_beside(source: Source, role: str) -> Path | None:
    """The `val` or `test` folder beside the `train` folder that a source holds; None where it has none."""
    if not isinstance(source, str | Path):
        return None
    path = expanded(str(source), place="data.train", kind=DataError)
    if not path.is_dir():
        return None
    below = _below(path)
    if not any(name in below for name in SPLITS["train"]) or split_folder(path, "train") is None:
        return None
    return next((below[name] for name in SPLITS[role] if name in below), None)


def own_part(folder: Path, role: str, *, names: Sequence[str], suffixes: Collection[str]) -> Path:
    """The folder in `folder` that holds a split; `folder` itself where it holds none, or rows of its own.

    Those are a file that is called one of `names`, or ends in one of `suffixes`.
    """
    return folder if _has_rows(folder, names, suffixes) else split_folder(folder, role) or folder


def with_held_out(sources: Mapping[str, Source], *, names: Sequence[str], suffixes: Collection[str]) -> dict[str, Source]:
    """`sources`, and the held-out folders beside the `train` folder of the training source. The rest as for `own_part`."""
    found, train = dict(sources), sources.get("train")
    if not isinstance(train, str | Path) or _has_rows(expanded(str(train), place="data.train", kind=DataError), names, suffixes):
        return found
    for role in ("val", "test"):
        beside = None if role in found else held_out_beside(train, role)
        found |= {} if beside is None else {role: beside}
    return found


def _has_rows(folder: Path, names: Sequence[str], suffixes: Collection[str]) -> bool:
    return folder.is_dir() and any(
        entry.name in names or (is_file(entry) and entry.suffix.lower() in suffixes)
        for entry in listed(folder)
        if not hidden(entry)
    )


def _below(folder: Path) -> dict[str, Path]:
    return {entry.name.lower(): entry for entry in listed(folder) if is_folder(entry) and not hidden(entry)}
