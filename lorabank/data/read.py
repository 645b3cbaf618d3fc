"""`read_rows`: rows from a file, a folder, a `datasets` id or an object, each with its origin."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.data.files import READERS
from lorabank.data.listing import listed
from lorabank.data.objects import import_datasets, rows_of
from lorabank.data.objects import pick_split as pick_split
from lorabank.data.repository import is_saved, part_of, tables_in
from lorabank.data.row import Row
from lorabank.errors import DataError, Setting, closest, first_line

Source = Any
"""A path, a `datasets` id (`name` or `name:config:split`), a `datasets.Dataset`, or an iterable of dicts."""


def read_rows(source: Source, *, limit: int | None = None, role: str = "train") -> list[Row]:
    """Every row of `source`, at most `limit` of each file.

    `role` (`train`, `val`, `test`) picks that split where the source holds several, and names the source in errors.
    Raises DataError for a missing, unreadable, malformed or empty source.
    """
    if isinstance(source, str | Path):
        rows = list(_from_name(str(source), limit, role))
        name = str(source)
    else:
        rows = list(islice(rows_of(source, role), limit))
        name = f"the {type(source).__name__} given as {role} data"
    if not rows:
        raise DataError(f"{name}: expected at least one row, got an empty data set")
    return rows


def _from_name(name: str, limit: int | None, role: str) -> Iterator[Row]:
    path = expanded(name, place=f"data.{role}", kind=DataError)
    if path.is_dir():
        yield from _from_folder(path, limit, role)
    elif path.exists():
        yield from _from_file(path, limit)
    else:
        yield from _from_hub(name, limit, role)


def check_source(name: str, *, place: str) -> None:
    """Raise DataError, in the name of `place`, where `name` is no file or folder here and can't be meant as a data set id."""
    if not name:  # as a path it would be the working folder
        raise DataError(Setting(place), ": is empty. Expected a path, or a data set id.")
    path = expanded(name, place=place, kind=DataError)
    if path.exists():
        return
    if _looks_like_a_path(name):
        raise DataError(Setting(place), f": no file or folder {name!r}{_closest_file(path)}. {_ACCEPTED}")
    near = _near_sibling(path)
    if near:
        raise DataError(
            Setting(place),
            f": no file or folder {name!r} (did you mean {near!r}?). For the data set of that id write '{name}::'. {_ACCEPTED}",
        )


_ACCEPTED = "Expected a file (" + " ".join(READERS) + "), a folder of them, or a data set id (name or name:config:split)."


_OTHER_FILES = (
    ".txt .md .xls .xlsx .ods .xml .html .yaml .yml .toml .arrow .feather .pkl .pickle .npy .npz .h5 .hdf5 .db .sqlite "
    ".zip .gz .tgz .bz2 .xz .zst .tar .pdf .docx .log"
).split()
"""Suffixes of files that we don't read, and that no data set's id ends in."""
_NEAR = 0.8
"""Likeness from which a name is a slip for a file here; below it an id may well resemble one."""


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        return True
    path = Path(name.partition(":")[0])
    suffix = path.suffix.lower()
    if len(path.parts) > 2 or suffix in READERS or suffix in _OTHER_FILES:
        return True
    lettered = re.fullmatch(r"\.[a-z]{2,}\d?", suffix) is not None  # ids end in versions, such as .0 or .v2
    return lettered and (len(path.parts) == 1 or path.parent.is_dir() or bool(closest(suffix, READERS)))


def _near_sibling(path: Path) -> str | None:
    """The file or folder beside it whose name, or stem, is almost the same."""
    if ":" in path.name or not path.parent.is_dir():
        return None
    names = _names_in(path.parent)
    spelt = {Path(name).stem.lower(): name for name in names if Path(name).suffix.lower() in READERS}
    spelt |= {name.lower(): name for name in names}
    hits = difflib.get_close_matches(path.name.lower(), list(spelt), n=1, cutoff=_NEAR)
    return spelt[hits[0]] if hits else None


def _closest_file(path: Path) -> str:
    """A hint at what does exist: the closest name in the folder, or the folder that isn't there."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} doesn't exist either"
    names = _names_in(folder)
    data_files = [name for name in names if Path(name).suffix.lower() in READERS]
    hint = closest(path.name, names)
    if hint or not data_files:
        return hint
    shown = ", ".join(sorted(data_files)[:5])
    return f" (data files there: {shown}{', …' if len(data_files) > 5 else ''})"


def _names_in(folder: Path) -> list[str]:
    """What a hint may name: nothing where the folder may not be listed."""
    try:
        return [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _from_file(path: Path, limit: int | None) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected one of {' '.join(READERS)}, got the suffix {path.suffix!r}. Convert the file.")
    yield from islice(reader(path), limit)


def _from_folder(folder: Path, limit: int | None, role: str) -> Iterator[Row]:
    if is_saved(folder):
        yield from islice(rows_of(load_saved(folder), role, name=str(folder)), limit)
        return
    part = part_of(folder, role)
    tables = part.tables or tables_in(part.folder)
    if not tables and part.folder != folder:
        yield from _from_folder(part.folder, limit, role)
        return
    if not tables:
        names = ", ".join(p.name for p in listed(folder)[:5]) or "nothing"
        raise DataError(f"{folder}: expected files ending in {' '.join(READERS)}, found {names}")
    for path in tables:
        yield from _from_file(path, limit)


def load_saved(folder: Path) -> Any:
    """What `save_to_disk` of the datasets library wrote into a folder. Raises DataError."""
    datasets = import_datasets(str(folder))
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # any reader's own error: the library documents none
        raise DataError(f"{folder}: looks like a saved data set, but can't be loaded: {error}") from error


def _from_hub(name: str, limit: int | None, role: str) -> Iterator[Row]:
    yield from islice(rows_of(load_hub(name, role), role, name=name), limit)


def load_hub(name: str, role: str) -> Any:
    """What the datasets library loads for an id, `name` or `name:config:split`. Raises DataError."""
    check_source(name, place=f"data.{role}")
    parts = name.split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(Setting(f"data.{role}"), f": expected `name` or `name:config:split`, got {name!r}")
    dataset_id, config, split = parts[0], *[*parts[1:], "", ""][:2]
    datasets = import_datasets(name)
    try:
        return datasets.load_dataset(dataset_id, config or None, split=split or None)
    except Exception as error:  # network, hub, builder: the library raises many kinds
        reason = first_line(error)
        hint = _closest_file(expanded(name, place=f"data.{role}", kind=DataError))
        failed = f"{name!r} is no file here{hint}, and no data set that can be loaded: {reason}"
        raise DataError(Setting(f"data.{role}"), f": {failed}. {_ACCEPTED}") from error
