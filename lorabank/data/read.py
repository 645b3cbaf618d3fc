"""`read_rows`: rows from a file, a folder, a `datasets` id or an object, each with its origin."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.data.files import READERS
from lorabank.data.listing import is_file, listed
from lorabank.data.row import Row
from lorabank.errors import DataError, MissingExtraError, Setting, closest, first_line

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
        rows = list(islice(_from_object(source, role), limit))
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
    there = listed(folder)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        datasets = import_datasets(str(folder))
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # any reader's own error: the library documents none
            raise DataError(f"{folder}: looks like a saved data set, but can't be loaded: {error}") from error
        yield from islice(_from_object(saved, role, name=str(folder)), limit)
        return
    files = [p for p in there if is_file(p) and p.suffix.lower() in READERS and not p.name.startswith(".")]
    if not files:
        names = ", ".join(p.name for p in there[:5]) or "nothing"
        raise DataError(f"{folder}: expected files ending in {' '.join(READERS)}, found {names}")
    for path in _of_role(files, role, folder):
        yield from _from_file(path, limit)


def _of_role(files: list[Path], role: str, folder: Path) -> list[Path]:
    """Those that a role means where files are called as splits, `train` among them; else all.

    Raises DataError where a file might belong to any of the splits, or none is for that role.
    """
    by_split: dict[str, list[Path]] = {}
    for path in files:
        words = {_SPLIT_WORDS[word] for word in re.split(r"[-_. ]+", path.stem.lower()) if word in _SPLIT_WORDS}
        by_split.setdefault(next(iter(words)) if len(words) == 1 else "", []).append(path)
    named = by_split.keys() - {""}
    if "train" not in named or len(named) < 2:
        return files
    chosen = next((by_split[split] for split in _SPLIT_NAMES.get(role, ()) if split in named), None)
    if chosen is None or "" in by_split:
        listed = ", ".join(path.name for path in files[:_LISTED]) + (", …" if len(files) > _LISTED else "")
        unclear = (
            f"which of the splits {by_split[''][0].name} belongs to isn't clear" if "" in by_split else f"none is for {role}"
        )
        raise DataError(f"{folder}: its files are called as splits ({listed}), and {unclear}. Name one file instead.")
    return chosen


def import_datasets(wanted: str) -> Any:
    """The datasets library, needed for `wanted`. Raises MissingExtraError."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"data set {wanted!r}: needs the datasets library: pip install datasets. {_ACCEPTED}") from error
    return datasets


def _from_hub(name: str, limit: int | None, role: str) -> Iterator[Row]:
    yield from islice(_from_object(load_hub(name, role), role, name=name), limit)


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


_SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev", "eval", "test"),
    "test": ("test",),
}
_SPLIT_WORDS = {name: name for names in _SPLIT_NAMES.values() for name in names} | {"training": "train", "testing": "test"}
"""What a file of a split is called, alone or as a part of its name (`train-00000-of-00002`, `e2e_val`), to the split's name."""
_LISTED = 6


def pick_split(source: Any, role: str, name: str | None) -> tuple[Any, str]:
    """(the split of a DatasetDict that a role means, its name). Raises DataError where several could be meant."""
    split = next((s for s in _SPLIT_NAMES.get(role, ()) if s in source), None)
    if split is None and len(source) == 1:
        split = next(iter(source))
    if split is None:
        wanted = f"{name}:config:split" if name else "dataset['split']"
        raise DataError(f"{name or 'the data set'} has the splits {', '.join(map(str, source))}: say which with {wanted}")
    return source[split], f"{name}[{split}]" if name else f"split {split!r}"


def _from_object(source: Source, role: str, name: str | None = None) -> Iterator[Row]:
    # An object of the datasets library exists only where that library has been imported.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        source, name = pick_split(source, role, name)
    where = name or f"the {role} rows given"
    if isinstance(source, Mapping | str | bytes) or not isinstance(source, Iterable):
        raise DataError(f"{role} data: expected a path, a data set or a list of dicts, got {type(source).__name__}")
    classes = _class_names(source)
    for number, values in enumerate(source, start=1):
        origin = f"row {number} of {where}"
        if not isinstance(values, Mapping):
            raise DataError(f"{origin}: expected a dict of columns, got {type(values).__name__}")
        yield Row(values, origin, classes)


def _class_names(source: Any) -> dict[str, list[str]]:
    """The names that a data set of the datasets library has for the numbers of a column, or of a column's lists."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return {}
    found: dict[str, list[str]] = {}
    for column, feature in (source.features or {}).items():
        inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
        if isinstance(inner, datasets.ClassLabel):
            found[column] = list(inner.names)
    return found
