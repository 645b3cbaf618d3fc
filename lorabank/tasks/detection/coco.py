"""`read_coco`: pictures and boxes of a file in COCO's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lorabank.config.paths import expanded
from lorabank.data.files import read_text
from lorabank.data.row import RowError
from lorabank.data.split import group_of
from lorabank.errors import DataError, Setting
from lorabank.tasks.detection.boxes import writable
from lorabank.tasks.detection.entries import Entry, Found, RawBox, size_said
from lorabank.tasks.detection.objects import as_crowd, shown
from lorabank.tasks.detection.pictures import file_named


def read_coco(path: Path, *, images: str | None = None, limit: int | None = None, group_by: str | None = None) -> Found:
    """A file in COCO's form: `images` {id, file_name, width, height}, `annotations` {image_id, bbox, category_id}, `categories`.

    `annotations` may be missing: then there is nothing to learn from, only pictures. Numbers that refer to another entry may be
    text. Raises DataError, with the entry, for another form.
    """
    content = _content(path)
    names = _names(path, content)
    folder = _folder_of(path, images)
    by_image = _boxes(path, content, names)
    listed: dict[str, Entry] = {}
    for place, image in _items(path, content, "images"):
        key = _key(image.get("id"))
        if key is None or not isinstance(image.get("file_name"), str):
            raise DataError(f"{place}: expected {{id, file_name}}, the id a number or a text, got {str(image)[:80]}")
        if key in listed:
            raise DataError(f"{path}: two images have the id {image['id']!r} ({listed[key].origin} is one of them)")
        listed[key] = _entry(place, image, folder, by_image.get(key, ()), group_of(image, group_by, place))
    stray = {f"{path}: image_id {key}": len(boxes) for key, boxes in by_image.items() if key not in listed}
    return Found(entries=list(islice(listed.values(), limit)), names=names, stray=stray)


def _content(path: Path) -> Mapping[str, Any]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable COCO file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: expected COCO's form, an object with `images`, `annotations` and `categories`")
    return content


def _items(path: Path, content: Mapping[str, Any], part: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it is, for messages; what it says) of each entry of a list that the file may lack."""
    value = content.get(part)
    if value is not None and not isinstance(value, list):
        raise DataError(f"{path}: `{part}`: expected a list of objects, got {shown(value)}")
    for number, item in enumerate(value or ()):
        place = f"{path}: {part}[{number}]"
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected an object, got {shown(item)}")
        yield place, item


def _names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for place, category in _items(path, content, "categories"):
        number, name = category.get("id"), category.get("name")
        if type(number) is not int or not isinstance(name, str) or not name.strip() or not writable(name):
            raise DataError(f"{place}: expected {{id, name}}, a number and a text, got {category!r}")
        name = name.strip()
        if names.setdefault(number, name) != name:
            raise DataError(
                f"{place}: the id {number} is that of two categories, {names[number]!r} and {name!r}. Give each an id of its own."
            )
    return names


def _boxes(path: Path, content: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, list[RawBox]]:
    """Boxes by their picture's id."""
    numbers = {str(number): number for number in names}
    found: dict[str, list[RawBox]] = {}
    for place, note in _items(path, content, "annotations"):
        key = _key(note.get("image_id"))
        if key is None:
            raise DataError(
                f"{place}: expected {{image_id, bbox, category_id}}, image_id a number or a text, got {str(note)[:80]}"
            )
        try:
            crowd = as_crowd(note.get("iscrowd"))
        except RowError as error:
            raise DataError(f"{place}: {error.reason}") from None
        category = note.get("category_id")
        if isinstance(category, str):
            category = numbers.get(category.strip(), category)
        found.setdefault(key, []).append(RawBox(box=note.get("bbox"), category=category, crowd=crowd))
    return found


def _key(value: Any) -> str | None:
    """An id as numbers and texts have it in common; None for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None


def _entry(place: str, image: Mapping[str, Any], folder: Path, boxes: Sequence[RawBox], group: str | None) -> Entry:
    try:
        file = _located(folder, file_named(image["file_name"]))
    except RowError as error:
        return Entry(origin=place, image_id=image["id"], error=error.at(place))
    return Entry(origin=str(file), image_id=image["id"], picture=file, size=size_said(image), boxes=boxes, group=group)


def _folder_of(path: Path, images: str | None) -> Path:
    if images is None:
        return path.parent
    folder = expanded(images, place="detection.images", kind=DataError)
    if not folder.is_dir():
        raise DataError(Setting("detection.images"), f": no folder {images!r}")
    return folder


def _located(folder: Path, name: Path) -> Path:
    """Where a file is: in the folder, or in `images` of it or beside it; as a message names it where it is in none of them."""
    places = (folder / name, folder / "images" / name, folder.parent / "images" / name)
    return next((place for place in places if _is_file(place)), places[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # opening it says why
        return False
