"""`find_pictures`: pictures with their boxes from a COCO file, a folder with `metadata.jsonl`, a table, a `datasets` object.

Nothing is opened or checked here: boxes are as they were written, [x, y, width, height] in pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from lorabank.config.paths import expanded
from lorabank.data.listing import listed
from lorabank.data.read import Source, read_rows
from lorabank.data.repository import is_saved, splits_of
from lorabank.data.row import NanError, Row, RowError, typical
from lorabank.data.split import group_of
from lorabank.errors import DataError, closest
from lorabank.tasks.detection.coco import read_coco
from lorabank.tasks.detection.entries import Entry, Found, size_said
from lorabank.tasks.detection.objects import CATEGORIES, OBJECTS, objects_in
from lorabank.tasks.detection.pictures import as_picture
from lorabank.tasks.picture_bytes import SUFFIXES

IMAGE_COLUMNS = ("image", "file_name", "image_path", "path", "picture", "img")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SELDOM_READ = (".heic", ".heif", ".avif", ".jxl")
"""Pictures that Pillow reads with an addition: in a folder to predict they are named, not passed over."""
COCO_NAMES = ("_annotations.coco.json", "annotations.json", "instances.json")


def find_pictures(
    source: Source,
    *,
    role: str = "train",
    images: str | None = None,
    boxed: bool = True,
    limit: int | None = None,
    group_by: str | None = None,
) -> Found:
    """Every picture of `source` with its boxes, at most `limit`. `role`: `train`, `val` or `test`, where the source has several.

    `images`: folder of the pictures that a COCO file names. `group_by`: column of a table, or key of a COCO file's images, whose
    value an entry keeps. `boxed` False: pictures alone will do (to predict). Raises DataError
    for what is no such source.
    """
    if isinstance(source, str | Path):
        path = expanded(str(source), place=f"data.{role}", kind=DataError)
        found = _from_path(path, str(source), role, images, boxed, limit, group_by)
        name = str(source)
    else:
        rows = read_rows(source, limit=limit, role=role)
        found = _from_rows(rows, None, boxed, group_by)
        name = f"the {type(source).__name__} given as {role} data"
    if not found.entries:
        raise DataError(f"{name}: expected at least one picture, got none")
    return found


def _from_path(
    path: Path, name: str, role: str, images: str | None, boxed: bool, limit: int | None, group_by: str | None
) -> Found:
    if not path.is_dir():
        return _from_file(path, name, role, images, boxed, limit, group_by)
    splits = splits_of(path)
    if splits is not None and (boxed or splits.in_tables or splits.name(role) is not None):  # to predict, all below will do
        part = splits.part(role)
        if part.tables and part.tables[0].suffix.lower() != ".json":
            return _from_rows(
                [row for table in part.tables for row in read_rows(table, limit=limit)], part.folder, boxed, group_by
            )
        if len(part.tables) > 1:
            names = ", ".join(each.name for each in part.tables[:4])
            raise DataError(f"{path}: expected one COCO file for {role} data, got {names}. Name one of them instead.")
        if part.tables:
            return read_coco(part.tables[0], images=images, limit=limit, group_by=group_by)
        path = part.folder
    if is_saved(path):
        rows = read_rows(str(path), limit=limit, role=role)
        return _from_rows(rows, None, boxed, group_by)
    there = listed(path)
    known = [path / each for each in (*METADATA, *COCO_NAMES) if (path / each).is_file()]
    known = known or [each for each in there if each.suffix == ".json" and not each.name.startswith(".")]
    if known:
        return _from_file(known[0], name, role, images, boxed, limit, group_by)
    if not boxed:
        return Found(entries=_below(path, limit))
    names = ", ".join(each.name for each in there[:4]) or "nothing"
    raise DataError(f"{path}: expected a COCO file ({COCO_NAMES[0]}) or a table ({METADATA[0]}), found {names}")


def _from_file(
    path: Path, name: str, role: str, images: str | None, boxed: bool, limit: int | None, group_by: str | None
) -> Found:
    """What a file holds; a data set of the hub where there is none of that name."""
    if path.is_file() and path.suffix.lower() in SUFFIXES and not boxed:
        return Found(entries=[_plain(1, path)])
    if path.suffix.lower() == ".json" and path.is_file():
        return read_coco(path, images=images, limit=limit, group_by=group_by)
    rows = read_rows(str(path) if path.exists() else name, limit=limit, role=role)
    return _from_rows(rows, path.parent if path.is_file() else None, boxed, group_by)


def _below(folder: Path, limit: int | None) -> list[Entry]:
    """The pictures in a folder and the folders below, sorted, and a bad entry for each folder that may not be read."""
    shut: list[OSError] = []
    files = sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=shut.append)
        for name in names
        if Path(name).suffix.lower() in (*SUFFIXES, *SELDOM_READ)
    )
    unread = [RowError(f"a folder that can't be read: {error.strerror}", str(error.filename)) for error in shut]
    return [
        *(_plain(i, each) for i, each in enumerate(islice(files, limit), 1)),
        *(Entry(origin=error.origin, image_id=error.origin, error=error) for error in unread),
    ]


def _plain(number: int, path: Path) -> Entry:
    return Entry(origin=str(path), image_id=number, picture=path)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _from_rows(rows: Sequence[Row], folder: Path | None, boxed: bool, group_by: str | None) -> Found:
    usual = typical(rows)
    columns = list(usual.values)
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None or (boxed and OBJECTS not in columns):
        want = f"{IMAGE_COLUMNS[0]!r} or {IMAGE_COLUMNS[1]!r}, and {OBJECTS!r}" if boxed else f"one of {', '.join(IMAGE_COLUMNS)}"
        raise DataError(f"{usual.origin}: expected columns {want}{closest(OBJECTS, columns)}, got {', '.join(columns)}")
    return Found(entries=list(_entries(rows, image, folder, boxed, group_by)), names=_declared(rows))


def _entries(rows: Sequence[Row], column: str, folder: Path | None, boxed: bool, group_by: str | None) -> Iterator[Entry]:
    for number, row in enumerate(rows, 1):
        values = row.values
        given = values.get("image_id")
        image_id = given if isinstance(given, int | str) else number
        try:
            for name in (column, OBJECTS) if boxed else (column,):
                if isinstance(value := values.get(name), float) and math.isnan(value):
                    raise NanError(name)
            picture = as_picture(values.get(column), folder)
            yield Entry(
                origin=str(picture) if isinstance(picture, Path) else row.origin,
                image_id=image_id,
                picture=picture,
                size=size_said(values),
                boxes=objects_in(values.get(OBJECTS)) if boxed else (),
                group=group_of(values, group_by, row.origin),
            )
        except RowError as error:
            yield Entry(origin=row.origin, image_id=image_id, error=error.at(row.origin))


def _declared(rows: Sequence[Row]) -> Mapping[int, str]:
    """Names of categories that a `datasets` object or its Parquet file notes; none elsewhere."""
    notes = rows[0].classes
    return dict(enumerate(next((notes[f"{OBJECTS}.{name}"] for name in CATEGORIES if f"{OBJECTS}.{name}" in notes), ())))
