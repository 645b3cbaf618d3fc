"""What COCO files say in odd ways is read as it is meant, or told with the entry that says it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabank.errors import DataError
from tests.tasks.detection.made import coco_folder, picture_of
from tests.tasks.detection.test_prepare import read

Content = dict[str, Any]


def changed(folder: Path, change: Callable[[Content], object], count: int = 4) -> str:
    """The path of a COCO file with a change."""
    path = coco_folder(folder, count)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def of_each(key: str, value: Callable[[Any], Any]) -> Callable[[Content], object]:
    """A change of a key of all annotations."""
    return lambda content: [note.update({key: value(note.get(key))}) for note in content["annotations"]]


def of_first(part: str, **values: Any) -> Callable[[Content], object]:
    """A change of the first entry of a list."""
    return lambda content: content[part][0].update(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [("category_id", str), ("category_id", float), ("image_id", str), ("image_id", float), ("iscrowd", lambda _: "0")],
)
def test_numbers_may_be_texts(key: str, value: Callable[[Any], Any], tmp_path: Path) -> None:
    plain = read(str(coco_folder(tmp_path / "plain", 4)))
    sets = read(changed(tmp_path / "other", of_each(key, value)))
    assert [row.boxes for row in sets.train] == [row.boxes for row in plain.train]
    assert [row.image_id for row in sets.train] == [100, 101, 102, 103]
    assert (sets.labels, sets.category_ids, sets.report.notes) == (("red", "green"), {"red": 1, "green": 2}, {})


def test_a_number_as_text_is_an_id_though_a_category_is_called_so(tmp_path: Path) -> None:
    """Of digits counted from 1: the id 2 is the category "1"."""

    def digits(content: Content) -> None:
        content["categories"] = [{"id": 1, "name": "0"}, {"id": 2, "name": "1"}]
        of_each("category_id", str)(content)

    sets = read(changed(tmp_path, digits))
    assert sets.labels == ("0", "1") and [row.boxes[0].label for row in sets.train] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("category", ["7", "rde", 7])
def test_a_category_that_is_not_declared_is_told_whatever_it_is(category: Any, tmp_path: Path) -> None:
    sets = read(changed(tmp_path, of_first("annotations", category_id=category)))
    hint = " (did you mean 'red'?)" if category == "rde" else ""
    assert list(sets.report.notes) == [f"1 box of a category that isn't declared ({category!r}{hint}), left out"]
    assert {box.label for row in sets.train for box in row.boxes} == {"red", "green"}


@pytest.mark.parametrize(
    ("flag", "crowd"), [(1, True), ("1", True), (" TRUE", True), (0, False), ("false", False), (None, False)]
)
def test_a_crowd_is_what_says_so(flag: Any, crowd: bool, tmp_path: Path) -> None:
    sets = read(changed(tmp_path, of_first("annotations", iscrowd=flag)))
    assert sets.train[0].boxes[0].crowd is crowd and not any(box.crowd for row in sets.train[1:] for box in row.boxes)


def test_crowds_alone_have_words_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 4 pictures has a box round a single thing: 6 boxes are crowds \(iscrowd\)"):
        read(changed(tmp_path, of_each("iscrowd", lambda _: 1)))


def test_annotations_of_pictures_that_are_not_listed_are_counted_where_nothing_else_is(tmp_path: Path) -> None:
    stray = r"has a box: .*6 annotations of pictures that the file doesn't list, left out: .*image_id other-100, "
    with pytest.raises(DataError, match=stray):
        read(changed(tmp_path, of_each("image_id", lambda number: f"other-{number}")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_understood(encoding: str, tmp_path: Path) -> None:
    path = coco_folder(tmp_path, 3)
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read(str(path)).train) == 3


LONG = 300 * "x"
REFUSED: list[tuple[Callable[[Content], object], str]] = [
    (lambda content: content.update(categories=5), "`categories`: expected a list of objects, got 5"),
    (lambda content: content.update(annotations=5), "`annotations`: expected a list of objects, got 5"),
    (lambda content: content["annotations"].insert(1, 5), "annotations[1]: expected an object, got 5"),
    (
        of_first("annotations", image_id=[1]),
        "annotations[0]: expected {image_id, bbox, category_id}, image_id a number or a text",
    ),
    (
        of_first("annotations", image_id=None),
        "annotations[0]: expected {image_id, bbox, category_id}, image_id a number or a text",
    ),
    (of_first("annotations", iscrowd="maybe"), "annotations[0]: iscrowd: expected 0 or 1, got 'maybe'"),
    (of_first("annotations", iscrowd=[1]), "annotations[0]: iscrowd: expected 0 or 1, got [1]"),
    (of_first("annotations", iscrowd=float("nan")), "annotations[0]: iscrowd: expected 0 or 1, got nan"),
    (of_first("images", id=[1]), "images[0]: expected {id, file_name}, the id a number or a text"),
    (of_first("images", file_name=5), "images[0]: expected {id, file_name}"),
    (of_first("images", id="101"), "two images have the id 101"),
    (of_first("categories", name=" "), "categories[0]: expected {id, name}"),
    (of_first("categories", name="half \ud83d"), "categories[0]: expected {id, name}"),
    (of_first("categories", id=2), "categories[1]: the id 2 is that of two categories, 'red' and 'green'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_another_form_is_refused_with_the_file_and_the_entry(
    change: Callable[[Content], object], message: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        read(path)


def test_one_id_with_one_name_twice_is_one_category(tmp_path: Path) -> None:
    sets = read(changed(tmp_path, lambda content: content["categories"].append({"id": 1, "name": "red "})))
    assert sets.labels == ("red", "green")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b.png", "a file name with a NUL character"),
        ("x\ud83d.png", "a file name with half a character"),
        (LONG, "a file name longer than any file's"),
        ("/".join(["x" * 200] * 25), "a file name longer than any file's"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_bad_picture(name: str, reason: str, tmp_path: Path) -> None:
    path = changed(tmp_path, of_first("images", file_name=name))
    sets = read(path)
    assert len(sets.train) == 3 and "\n".join(sets.report.lines()).encode()
    (line,) = [line for line in sets.report.lines() if line.startswith("dropped")]
    assert line.startswith(f"dropped 1: {reason}") and line.endswith(f"({path}: images[0])")
    with pytest.raises(DataError, match=r"1 of 4 pictures can't be used"):
        read(path, bad_rows="stop")


def test_entries_of_one_file_with_other_boxes_are_all_left_out(tmp_path: Path) -> None:
    """Kept, each would teach the other's boxes as nothing. Merged, a slip (names without their folders, a copied line) would put
    another picture's boxes on this one. So they are bad pictures, as many as they are: named, counted, refused by `bad_rows`."""

    def same_file(content: Content) -> None:
        content["images"][1]["file_name"] = "./0.png"

    path = changed(tmp_path / "two", same_file)
    sets = read(path)
    assert [row.image_id for row in sets.train] == [102, 103]
    (line,) = [line for line in sets.report.lines() if line.startswith("dropped")]
    assert line.startswith("dropped 2: listed more than once, with other boxes each time")
    assert "0.png as image_id 100, " in line and "0.png as image_id 101)" in line
    with pytest.raises(DataError, match=r"2 of 4 pictures can't be used"):
        read(path, bad_rows="stop")


def test_entries_of_one_file_with_equal_boxes_stay(tmp_path: Path) -> None:
    def copied(content: Content) -> None:
        content["images"].append({**content["images"][0], "id": 7})
        content["annotations"] += [{**note, "image_id": 7} for note in content["annotations"] if note["image_id"] == 100]

    assert [row.image_id for row in read(changed(tmp_path, copied)).train] == [100, 101, 102, 103, 7]


def test_pictures_one_pixel_wide_or_high_are_told(tmp_path: Path) -> None:
    path = changed(tmp_path, of_first("images", width=1, height=1))
    picture_of([], side=1).save(tmp_path / "0.png")
    sets = read(path)
    note = sets.report.notes["only one pixel wide or high"]
    assert note.count == 1 and note.origins[0].endswith("0.png") and len(sets.train) == 4
