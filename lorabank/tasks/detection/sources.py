"""`find_pictures`: pictures with their boxes from a COCO file, a folder with `metadata.jsonl`, a table, a `datasets` object.

Nothing is opened or checked here: boxes are as they were written, [x, y, width, height] in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.data.read import Source, read_rows
from lorabank.data.row import Row, RowError
from lorabank.data.split import group_of
from lorabank.errors import DataError, Setting, closest
from lorabank.tasks.detection.pictures import SUFFIXES, Picture, as_picture

IMAGE_COLUMNS = ("image", "file_name", "image_path", "path", "picture", "img")
OBJECTS = "objects"
BOXES = ("bbox", "bboxes", "boxes")
CATEGORIES = ("category", "categories", "category_id", "label", "labels")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COCO_NAMES = ("_annotations.coco.json", "annotations.json", "instances.json")
SPLITS: Mapping[str, Sequence[str]] = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
"""Part of a data set → names that folders have for it."""


@dataclass(frozen=True, kw_only=True)
class RawBox:
    """A box as it was written."""

    box: Any
    category: Any
    """A name, or a number whose name may be in `Found.names`."""
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture of a source and its boxes, or why there is none."""

    origin: str
    image_id: int | str
    picture: Picture | None = None
    size: tuple[int, int] | None = None
    """(width, height) that its annotations say."""
    boxes: Sequence[RawBox] = ()
    error: RowError | None = None
    group: str | None = None
    """Value of the column `data.group_by`, if one is set."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A source's pictures."""

    entries: Sequence[Entry]
    names: Mapping[int, str] = field(default_factory=dict)
    """Number of a category to its name, where the source declares them."""
    stray: Sequence[str] = ()
    """Annotations of pictures that the file doesn't list."""


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
        found = _from_rows(rows, None, boxed, _declared(source), group_by)
        name = f"the {type(source).__name__} given as {role} data"
    if not found.entries:
        raise DataError(f"{name}: expected at least one picture, got none")
    return found


def _from_path(
    path: Path, name: str, role: str, images: str | None, boxed: bool, limit: int | None, group_by: str | None
) -> Found:
    if path.is_dir():
        below = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
        path = next((below[each] for each in SPLITS[role] if each in below), path)
        known = [path / each for each in (*METADATA, *COCO_NAMES) if (path / each).is_file()]
        known = known or [each for each in sorted(path.glob("*.json")) if not each.name.startswith(".")]
        if known:
            path = known[0]
        elif not boxed:
            files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
            return Found(entries=[_plain(i, each) for i, each in enumerate(islice(files, limit), 1)])
        elif not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
            there = ", ".join(sorted(each.name for each in path.iterdir())[:4]) or "nothing"
            raise DataError(f"{path}: expected a COCO file ({COCO_NAMES[0]}) or a table ({METADATA[0]}), found {there}")
    if path.is_file() and path.suffix.lower() in SUFFIXES and not boxed:
        return Found(entries=[_plain(1, path)])
    if path.suffix.lower() == ".json" and path.is_file():
        return read_coco(path, images=images, limit=limit, group_by=group_by)
    rows = read_rows(str(path) if path.exists() else name, limit=limit, role=role)
    return _from_rows(rows, path.parent if path.is_file() else None, boxed, {}, group_by)


def _plain(number: int, path: Path) -> Entry:
    return Entry(origin=str(path), image_id=number, picture=path)


# ---- COCO -----------------------------------------------------------------------------------------------------------


def read_coco(path: Path, *, images: str | None = None, limit: int | None = None, group_by: str | None = None) -> Found:
    """A file in COCO's form: `images` {id, file_name, width, height}, `annotations` {image_id, bbox, category_id}, `categories`.

    `annotations` may be missing: then there is nothing to learn from, only pictures. Raises DataError for another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable COCO file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: expected COCO's form, an object with `images`, `annotations` and `categories`")
    names = {}
    for category in content.get("categories") or ():
        if not isinstance(category, dict) or type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise DataError(f"{path}: expected categories of {{id, name}}, got {category!r}")
        names[category["id"]] = category["name"]
    folder = _folder_of(path, images)
    by_image: dict[Any, list[RawBox]] = {}
    for note in content.get("annotations") or ():
        if not isinstance(note, dict) or "image_id" not in note:
            raise DataError(f"{path}: expected annotations of {{image_id, bbox, category_id}}, got {str(note)[:80]}")
        box = RawBox(box=note.get("bbox"), category=note.get("category_id"), crowd=bool(note.get("iscrowd")))
        by_image.setdefault(note["image_id"], []).append(box)
    listed: dict[Any, Entry] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
            raise DataError(f"{path}: expected images of {{id, file_name}}, got {str(image)[:80]}")
        if image["id"] in listed:
            raise DataError(f"{path}: two images have the id {image['id']!r} ({listed[image['id']].origin} is one of them)")
        file = _located(folder, image["file_name"])
        listed[image["id"]] = Entry(
            origin=str(file),
            image_id=image["id"],
            picture=file,
            size=_size(image),
            boxes=by_image.get(image["id"], ()),
            group=group_of(image, group_by, f"{path}: image {image['id']}"),
        )
    stray = [f"{path}: image_id {key}" for key in by_image if key not in listed]
    return Found(entries=list(islice(listed.values(), limit)), names=names, stray=stray)


def _size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) where they are said."""
    width, height = values.get("width"), values.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None


def _folder_of(path: Path, images: str | None) -> Path:
    if images is None:
        return path.parent
    folder = expanded(images, place="detection.images", kind=DataError)
    if not folder.is_dir():
        raise DataError(Setting("detection.images"), f": no folder {images!r}")
    return folder


def _located(folder: Path, name: str) -> Path:
    """Where a file is: in the folder, or in `images` of it or beside it; as a message names it where it is in none of them."""
    places = (folder / name, folder / "images" / name, folder.parent / "images" / name)
    return next((place for place in places if place.is_file()), places[0])


# ---- tables ---------------------------------------------------------------------------------------------------------


def _from_rows(rows: Sequence[Row], folder: Path | None, boxed: bool, names: Mapping[int, str], group_by: str | None) -> Found:
    columns = list(rows[0].values)
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None or (boxed and OBJECTS not in columns):
        want = f"{IMAGE_COLUMNS[0]!r} or {IMAGE_COLUMNS[1]!r}, and {OBJECTS!r}" if boxed else f"one of {', '.join(IMAGE_COLUMNS)}"
        raise DataError(f"{rows[0].origin}: expected columns {want}{closest(OBJECTS, columns)}, got {', '.join(columns)}")
    return Found(entries=list(_entries(rows, image, folder, boxed, group_by)), names=names)


def _entries(rows: Sequence[Row], column: str, folder: Path | None, boxed: bool, group_by: str | None) -> Iterator[Entry]:
    for number, row in enumerate(rows, 1):
        values = row.values
        given = values.get("image_id")
        image_id = given if isinstance(given, int | str) else number
        try:
            picture = as_picture(values.get(column), folder)
            yield Entry(
                origin=str(picture) if isinstance(picture, Path) else row.origin,
                image_id=image_id,
                picture=picture,
                size=_size(values),
                boxes=_objects(values.get(OBJECTS)) if boxed else (),
                group=group_of(values, group_by, row.origin),
            )
        except RowError as error:
            yield Entry(origin=row.origin, image_id=image_id, error=error.at(row.origin))


def _objects(value: Any) -> list[RawBox]:
    """{bbox: […], category: […]}, as `datasets` has it, or a list of {bbox, category}. Raises RowError."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        boxes = next((value[name] for name in BOXES if name in value), None)
        categories = next((value[name] for name in CATEGORIES if name in value), None)
        crowds = value.get("iscrowd")
        if boxes is None or categories is None:
            raise RowError(f"column {OBJECTS!r}: expected {{bbox, category}}, got {', '.join(map(str, value))}")
        if len(boxes) != len(categories):
            raise RowError(f"column {OBJECTS!r}: {len(boxes)} boxes and {len(categories)} categories")
        flags = [bool(each) for each in crowds] if crowds is not None and len(crowds) == len(boxes) else [False] * len(boxes)
        return [RawBox(box=b, category=c, crowd=f) for b, c, f in zip(boxes, categories, flags, strict=True)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [box for item in value for box in _objects({key: [part] for key, part in _item(item).items()})]
    raise RowError(f"column {OBJECTS!r}: expected {{bbox, category}}, got {type(value).__name__}")


def _item(item: Any) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(f"column {OBJECTS!r}: expected a list of {{bbox, category}}, got one of {type(item).__name__}")
    return item


def _declared(source: Any) -> Mapping[int, str]:
    """Names of categories that a `datasets` object notes; none elsewhere."""
    features = getattr(source, "features", None)
    inner = features.get(OBJECTS) if isinstance(features, Mapping) else None
    while inner is not None and not isinstance(inner, Mapping):
        inner = getattr(inner, "feature", None)
    if inner is None:
        return {}
    label = next((inner[name] for name in CATEGORIES if name in inner), None)
    names = getattr(label, "names", None) or getattr(getattr(label, "feature", None), "names", None)
    return dict(enumerate(names)) if names else {}
