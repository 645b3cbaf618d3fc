"""`splits_of`: the splits of a folder, as a data set that was downloaded from the Hugging Face hub has them.

Tables (`train.csv`, `train-00000-of-00002.parquet`) or folders (`train`, `validation`) are called as splits: in the folder
itself, in its `data`, or in the one of a configuration (`default`, `en`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabank.data.files import READERS
from lorabank.data.listing import HIDDEN, is_file, is_folder, scanned
from lorabank.errors import DataError

SPLITS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Part of a data set → names that its files and folders have, the likeliest first."""
_KNOWN = {name: role for role, names in SPLITS.items() for name in names}
_SAVED = ("state.json", "dataset_dict.json")
"""Of a data set that `save_to_disk` wrote."""
_ABOUT = ("dataset_infos.json", "dataset_info.json")
"""Files of a repository that describe it."""
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
"""What the hub calls a split's files."""
_DEEP = 3
"""Folders below which a configuration may be, such as `data/en`."""
_LISTED = 6


@dataclass(frozen=True)
class Part:
    """One split."""

    folder: Path
    """Where its pictures or recordings lie, and what its tables name files relative to."""
    tables: tuple[Path, ...] = ()
    """Files with its rows, in order; none where it is what lies in `folder`."""


@dataclass(frozen=True)
class FolderSplits:
    """The splits of a folder."""

    folder: Path
    """What holds them: the folder that was named, or one in it."""
    parts: Mapping[str, Part]
    """By their names, as files or folders have them."""
    unclear: Path | None = None
    """A table among those of splits that is called as none."""

    @property
    def in_files(self) -> bool:
        """Whether they are files, rather than folders."""
        return any(part.folder == self.folder for part in self.parts.values())

    @property
    def in_tables(self) -> bool:
        """Whether rows lie in tables, rather than pictures or recordings in folders."""
        return any(part.tables for part in self.parts.values())

    def name(self, role: str) -> str | None:
        """The split that is a role's; None where there is none, or several might be.

        One alone is no choice: it is any role's, but a test split is never trained on.
        """
        exact = next((name for name in SPLITS[role] if name in self.parts), None)
        alike = [name for name in self.parts if _role_of(name) == role]
        alone = [name for name in self.parts if len(self.parts) == 1 and self.in_files and _role_of(name) != "test"]
        return exact or next(iter(alike if len(alike) == 1 else alone), None)

    def part(self, role: str) -> Part:
        """That split. Raises DataError where there is none."""
        if self.unclear is not None:
            raise self._no(f"which of the splits {self.unclear.name} belongs to isn't clear")
        name = self.name(role)
        if name is None and not self.in_files:
            raise DataError(
                f"{self.folder}: holds {', '.join(sorted(self.parts))}, and no folder {SPLITS[role][0]!r} for {role} data. "
                "Name one of them instead."
            )
        if name is None:
            several = [name for name in self.parts if _role_of(name) == role]
            raise self._no(f"{', '.join(several)} might be for {role}" if several else f"none is for {role}")
        return self.parts[name]

    def lying_at(self, path: Path) -> str | None:
        """The split whose folder, or one of whose files, a path is; None for another path."""
        places = {name: part.tables if self.in_files else (part.folder, *part.tables) for name, part in self.parts.items()}
        return next((name for name, own in places.items() if path in own), None)

    def _no(self, why: str) -> DataError:
        names = [table.name for part in self.parts.values() for table in part.tables]
        names += [] if self.unclear is None else [self.unclear.name]
        shown = ", ".join(sorted(names)[:_LISTED]) + (", …" if len(names) > _LISTED else "")
        return DataError(f"{self.folder}: its files are called as splits ({shown}), and {why}. Name one file instead.")


def splits_of(folder: Path, *, loose: Collection[str] = ()) -> FolderSplits | None:
    """How a folder is split; None where it isn't.

    `loose`: suffixes of files that are rows of the folder itself where they lie in it: one split alone beside them is none.
    Raises DataError for a folder that may not be read, and where several folders in it are split, as configurations are.
    """
    there = _look(folder, loose)
    own = _own(there)
    if own is not None or there.saved or there.tables:
        return own
    found = [each for each in _inside(there, _DEEP) if each.in_tables or not there.has_rows]
    if len(found) > 1:
        names = [str(each.folder.relative_to(folder)) for each in found]
        shown = ", ".join(names[:_LISTED]) + (f", … ({len(names)} in all)" if len(names) > _LISTED else "")
        raise DataError(
            f"{folder}: expected one data set, got splits in several folders, as configurations are: {shown}. "
            f"Name one of them, such as {found[0].folder}."
        )
    return found[0] if found else None


def part_of(folder: Path, role: str, *, loose: Collection[str] = ()) -> Part:
    """The split of a folder that is a role's; the folder itself where it isn't split. `loose` and errors as `splits_of`."""
    splits = splits_of(folder, loose=loose)
    return Part(folder) if splits is None else splits.part(role)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote a folder."""
    return any(is_file(folder / name) for name in _SAVED)


def is_metadata(entry: Path) -> bool:
    """Whether it is the table of what lies beside it, as the datasets library calls it."""
    return entry.stem == "metadata" and entry.suffix.lower() in READERS


def tables_in(folder: Path) -> list[Path]:
    """Files in a folder that hold rows, sorted. Raises DataError for one that may not be read."""
    return list(_look(folder).tables)


# ---- what is called as a split -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _There:
    """What lies in a folder, as far as it says something of splits."""

    folder: Path
    folders: Sequence[Path]
    tables: Sequence[Path]
    saved: bool
    others: bool
    """Whether there are files beside tables, and beside pages that tell of them."""
    has_rows: bool
    """Whether some of those are rows of the folder itself."""


def _look(folder: Path, loose: Collection[str] = ()) -> _There:
    """One pass over its entries, of which there may be very many. Raises DataError for a folder that may not be read."""
    folders: list[Path] = []
    tables: list[Path] = []
    names: set[str] = set()
    kinds: set[str] = set()
    for entry in scanned(folder):
        if entry.name.startswith(HIDDEN):
            continue
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_folder(folder / entry.name)):
            folders.append(folder / entry.name)
            continue
        kind = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  (a path for each would take many times as long)
        if kind in READERS and entry.name not in (*_ABOUT, *_SAVED) and is_file(folder / entry.name):
            tables.append(folder / entry.name)
        elif kind in READERS:
            names.add(entry.name)
        else:
            kinds.add(kind)
    return _There(
        folder=folder,
        folders=sorted(folders),
        tables=sorted(tables),
        saved=not names.isdisjoint(_SAVED),
        others=bool(kinds - {".md"}),
        has_rows=not kinds.isdisjoint(loose),
    )


def _own(there: _There) -> FolderSplits | None:
    """The splits that lie in a folder itself."""
    if there.saved or any(is_metadata(table) for table in there.tables):
        return None
    tables = _tables(there)
    if tables is not None and not (there.has_rows and len(tables.parts) == 1):
        return tables
    splits = {entry.name.lower(): entry for entry in there.folders if entry.name.lower() in _KNOWN}
    roles = {_KNOWN[name] for name in splits}
    others = len(splits) < len(there.folders)
    if not splits or (there.has_rows and len(splits) == 1) or (others and not {"train"} < roles):
        return None
    return FolderSplits(there.folder, {name: _part(entry) for name, entry in splits.items()})


def _tables(there: _There) -> FolderSplits | None:
    """The splits that its tables are called as; None where they may be of any, or there is none."""
    by_split: dict[str, list[Path]] = {}
    unclear: list[Path] = []
    for table in there.tables:
        shard = _SHARD.fullmatch(table.stem)
        words = _words(table.stem)
        if shard is not None:
            by_split.setdefault(shard["split"].lower(), []).append(table)
        elif len({_KNOWN[word] for word in words}) == 1:
            by_split.setdefault(next(iter(words)), []).append(table)
        else:
            unclear.append(table)
    roles = {_role_of(name) for name in by_split}
    if not by_split or (unclear and not {"train"} < roles):
        return None
    parts = {name: Part(there.folder, tuple(tables)) for name, tables in by_split.items()}
    return FolderSplits(there.folder, parts, unclear[0] if unclear else None)


def _words(name: str) -> list[str]:
    """The words of a name that splits are called by, the first first."""
    return [word for word in re.split(r"[-_. 0-9]+", name.lower()) if word in _KNOWN]


def _role_of(name: str) -> str | None:
    """What a split is for, by its name; None for another, such as `unsupervised`, and for one of two names."""
    roles = {_KNOWN[word] for word in _words(name)}
    return next(iter(roles)) if len(roles) == 1 else None


def _part(folder: Path) -> Part:
    """A split's folder: its tables, where it holds nothing else."""
    there = _look_if_open(folder)
    if there is None or there.others or there.folders or there.saved or any(map(is_metadata, there.tables)):
        return Part(folder)
    return Part(folder, tuple(there.tables))


def _inside(there: _There, depth: int) -> list[FolderSplits]:
    """Those of the folders in a folder that are split, or hold such.

    Folders of splits are no classes' or speakers' only where they lie in `data`, or in all folders there are.
    """
    found: dict[Path, list[FolderSplits]] = {}
    for entry in there.folders:
        below = _look_if_open(entry)
        own = None if below is None else _own(below)
        if own is not None:
            found[entry] = [own]
        else:
            found[entry] = [] if below is None or depth == 1 else _inside(below, depth - 1)
    every = all(found.values())
    return [each for entry, own in found.items() for each in own if each.in_tables or every or entry.name.lower() == "data"]


def _look_if_open(folder: Path) -> _There | None:
    """None for a folder that may not be read: that is for who reads it to say."""
    try:
        return _look(folder)
    except DataError:
        return None
