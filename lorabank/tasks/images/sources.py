"""Pictures and their labels from a folder with a folder a class, a table with columns, or a `datasets` object or id."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.data.files import READERS
from lorabank.data.listing import is_file, is_folder, listed
from lorabank.data.objects import pick_split, plain, transformed
from lorabank.data.read import Source, load_hub, load_saved, read_rows
from lorabank.data.repository import is_saved, part_of
from lorabank.data.row import NanError, Row, RowError, typical
from lorabank.data.split import group_of
from lorabank.errors import DataError, Setting, closest
from lorabank.tasks.images.pictures import FromTable, Picture, as_picture
from lorabank.tasks.images.walk import Walk, shown
from lorabank.tasks.picture_bytes import SUFFIXES, UNREAD, unread

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "image_path", "file_name", "filename", "file", "path")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables in an image folder that say its labels, as `datasets` has them."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; None: the first that is called as usual."""

    image: str | None = None
    label: str | None = None
    group: str | None = None
    """`data.group_by`; None: none is looked for."""


@dataclass(frozen=True)
class Found:
    """An entry of a source: a picture and its label, or why there is none."""

    origin: str
    """The file, or `row N of …`."""
    picture: Picture | None = None
    label: str | None = None
    error: RowError | None = None
    group: str | None = None
    """Value of the column `data.group_by`, if one is set."""
    empty: bool = False
    """Whether it is a class folder with nothing in it: no picture, only to be told of."""


def find_pictures(
    source: Source, *, role: str = "train", columns: Columns | None = None, labelled: bool = True, limit: int | None = None
) -> list[Found]:
    """Every picture of `source` with its label, none of them opened yet. `limit`: the first of each class folder, or of a table.

    `role`: `train`, `val` or `test`, where the source holds several. `labelled` False: labels aren't asked for, and pictures may
    lie in a folder without class folders. Raises DataError for what is no such source, has no usable column or no picture.
    """
    columns = columns or Columns()
    if isinstance(source, str | Path):
        path = expanded(str(source), place=f"data.{role}", kind=DataError)
        found = _from_path(path, str(source), role, columns, labelled, limit)
        name = str(source)
    else:
        found = list(islice(_from_object(source, role, None, columns, labelled), limit))
        name = f"the {type(source).__name__} given as {role} data"
    if all(each.empty for each in found):
        raise DataError(f"{name}: expected at least one picture, got none")
    return found


def _from_path(path: Path, name: str, role: str, columns: Columns, labelled: bool, limit: int | None) -> list[Found]:
    kind = path.suffix.lower() if path.is_file() else ""
    if kind in UNREAD:
        raise DataError(f"{path}: {unread(kind)}")
    if kind in SUFFIXES:
        if labelled:
            raise DataError(
                f"{path}: expected pictures with their labels, got one picture. Give a folder with a folder for each class, or a "
                f"table ({' '.join(METADATA)})."
            )
        return [Found(str(path), path)]
    if path.is_file():
        return list(_from_tables([path], columns, labelled, limit))
    if not path.is_dir():
        return list(islice(_from_object(load_hub(name, role), role, name, columns, labelled), limit))
    listed(path)  # said in a sentence where it can't be
    if is_saved(path):
        return list(islice(_from_object(load_saved(path), role, name, columns, labelled), limit))
    return _from_folder(path, role, columns, labelled, limit)


# ---- folders --------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, role: str, columns: Columns, labelled: bool, limit: int | None) -> list[Found]:
    part = part_of(folder, role)
    if part.tables:
        return list(_from_tables(part.tables, columns, labelled, limit))
    folder = part.folder
    table = next((folder / name for name in METADATA if is_file(folder / name)), None)
    if table is not None:
        return _from_path(table, str(table), role, columns, labelled, limit)
    walk = Walk(folder)
    there = shown(folder)
    classes = [entry for entry in there if is_folder(entry) and walk.enters(entry)]
    group_of({}, columns.group if classes else None, str(folder))  # folders of classes have no columns
    if labelled and not classes:
        tables = [entry for entry in there if entry.suffix.lower() in READERS]
        if len(tables) == 1:
            return _from_path(tables[0], str(tables[0]), role, columns, labelled, limit)
        has = ", ".join(entry.name for entry in there[:3]) + (", …" if len(there) > 3 else "") if there else "nothing"
        raise DataError(
            f"{folder}: expected a folder for each class with its pictures, or a table ({' '.join(METADATA)}), found {has}"
        )
    loose = [entry for entry in there if not is_folder(entry)]
    if labelled:
        beside = RowError("lies beside the class folders")
        found = [Found(str(entry), error=beside) for entry in loose if entry.suffix.lower() in SUFFIXES][:limit]
    else:
        found = list(islice(_pictures(loose, None, labelled), limit))
    for entry in classes:
        inside = list(islice(_pictures(walk.files(entry), entry.name, labelled), limit))
        found += inside if inside or not labelled else [Found(str(entry), empty=True)]
    return found


def _pictures(files: Iterable[Path], label: str | None, labelled: bool) -> Iterator[Found]:
    fault = None if label is None else _no_text(label)
    for file in files:
        kind = file.suffix.lower()
        if kind in SUFFIXES and fault is not None and labelled:
            yield Found(str(file), error=fault)
        elif kind in SUFFIXES:
            yield Found(str(file), file, None if fault else label)
        elif kind in UNREAD:
            yield Found(str(file), error=RowError(unread(kind)))
        elif labelled:
            yield Found(str(file), error=RowError(f"no picture by its name ({file.suffix or 'no suffix'})"))


def _no_text(label: str) -> RowError | None:
    """What is wrong with a label that no file could hold: one of bytes that aren't UTF-8, or with half a character."""
    try:
        label.encode()
    except UnicodeEncodeError:
        return RowError(f"the label {label!r} isn't Unicode text")
    return None


# ---- tables ---------------------------------------------------------------------------------------------------------


def _from_tables(paths: Sequence[Path], columns: Columns, labelled: bool, limit: int | None) -> Iterator[Found]:
    """Rows of tables in one folder, at most `limit` of each."""
    rows = [row for path in paths for row in read_rows(path, limit=limit)]
    return _from_rows(rows, paths[0].parent, columns, str(paths[0]), labelled)


def _from_rows(rows: Sequence[Row], folder: Path | None, columns: Columns, where: str, labelled: bool) -> Iterator[Found]:
    image, label = _columns(list(typical(rows).values), columns, where, labelled)
    for row in rows:
        cell, names = (row.values.get(label), row.classes.get(label)) if label else (None, None)
        found = _found(row.values.get(image), cell, row.origin, folder, names, label)
        if image not in row.values:
            found = Found(row.origin, error=RowError(f"no picture: there is no column {image!r}", row.origin))
        yield replace(found, group=group_of(row.values, columns.group, row.origin))


def _from_object(source: Source, role: str, name: str | None, columns: Columns, labelled: bool) -> Iterator[Found]:
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        source, name = pick_split(source, role, name)
    if datasets is not None and isinstance(source, datasets.Dataset) and not transformed(source):
        yield from _from_dataset(datasets, plain(source), name or "the data set", columns, labelled)
        return
    yield from _from_rows(read_rows(source, role=role), None, columns, name or f"the {role} rows given", labelled)


def _from_dataset(datasets: Any, table: Any, name: str, columns: Columns, labelled: bool) -> Iterator[Found]:
    image, label = _columns(table.column_names, columns, name, labelled)
    names = getattr(table.features.get(label), "names", None) if label else None
    labels = table[label] if label else [None] * len(table)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))  # a damaged one is to cost its own row alone
    pictures = table.select_columns([image])
    group_of(dict.fromkeys(table.column_names), columns.group, name)
    groups = [None] * len(table) if columns.group is None else list(map(str, table[columns.group]))
    for index, value in enumerate(labels):
        origin = f"row {index + 1} of {name}"
        found = _found(b"", value, origin, None, names, label)
        yield found if found.error else Found(origin, FromTable(pictures, index, image), found.label, group=groups[index])


def _columns(present: Sequence[str], columns: Columns, where: str, labelled: bool) -> tuple[str, str | None]:
    def pick(wanted: str | None, usual: Sequence[str], what: str) -> str | None:
        if wanted is not None:
            if wanted not in present:
                raise DataError(f"{where}: no column {wanted!r}{closest(wanted, present)}. It has: {', '.join(present)}")
            return wanted
        return next((name for name in usual if name in present), None)

    image, label = pick(columns.image, IMAGE_COLUMNS, "image"), pick(columns.label, LABEL_COLUMNS, "label")
    if image is None or (label is None and labelled):
        what = "a picture" if image is None else "a label"
        setting, usual = ("image_column", IMAGE_COLUMNS) if image is None else ("label_column", LABEL_COLUMNS)
        raise DataError(
            f"{where}: no column for {what} (as {', '.join(usual[:3])}) among {', '.join(present) or 'none'}. Name it with ",
            Setting(f"images.{setting}"),
            ".",
        )
    return image, label if labelled else None


def _found(
    picture: object, label: object, origin: str, folder: Path | None, names: Sequence[str] | None, column: str | None
) -> Found:
    try:
        name = None if column is None else _label(label, names, column)
        return Found(origin, as_picture(picture, folder), name)
    except RowError as error:
        return Found(origin, error=error.at(origin))


def _label(value: object, names: Sequence[str] | None, column: str) -> str:
    """A cell as a label's name. `names`: of numbered classes."""
    if isinstance(value, float) and math.isnan(value):
        raise NanError(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"column {column!r} is empty")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            raise RowError(f"column {column!r} holds {value}, and there are {len(names)} classes")
        return str(names[value])
    if isinstance(value, str):
        fault = _no_text(value)
        if fault is not None:
            raise fault
        return value.strip()
    raise RowError(f"column {column!r} holds a {type(value).__name__} where a label was expected")
