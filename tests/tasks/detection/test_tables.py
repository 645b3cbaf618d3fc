"""What tables say of boxes in odd ways is read as it is meant, or is a bad row of its own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from lorabank.tasks.detection.prepare import prepare
from tests.data.locked import locked
from tests.tasks.detection.made import coco_folder, picture_of, table_rows
from tests.tasks.detection.test_prepare import read

BOX = [4, 4, 10, 10]
GOOD = {"bbox": [BOX], "category": ["red"]}


def saved(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Rows of pictures on disk, by the names that they have in the folder."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, row in enumerate(table_rows(count)):
        row["image"].save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "objects": row["objects"]})
    return rows


def lines(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_objects_are_json_text_in_a_csv(tmp_path: Path) -> None:
    rows = saved(tmp_path)
    plain = read(lines(tmp_path, rows))
    (tmp_path / "metadata.jsonl").unlink()
    picture_of([]).save(tmp_path / "empty.png")
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "objects"])
        table.writerows([row["file_name"], json.dumps(row["objects"])] for row in rows)
        table.writerow(["empty.png", ""])
    sets = read(str(tmp_path))
    assert [row.boxes for row in sets.train] == [*(row.boxes for row in plain.train), ()]


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    """Its folder has JSON files, none of which is COCO's."""
    rows = table_rows(4)
    table = datasets.Dataset.from_list(
        [{"image": encoded(row["image"]), "objects": row["objects"]} for row in rows],
    ).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, validation=table.select([0])).save_to_disk(str(tmp_path / "splits"))
    plain = [row.boxes for row in read(rows).train]
    assert [row.boxes for row in read(str(tmp_path / "one")).train] == plain
    assert [row.boxes for row in read(str(tmp_path / "splits")).train] == plain


def encoded(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("flag", ["0", "False", 0, 0.0, np.int64(0), False])
def test_flags_of_a_table_are_read_as_cocos_are(flag: Any) -> None:
    row = {"image": picture_of([]), "objects": {**GOOD, "iscrowd": [flag]}}
    assert read([row]).train[0].boxes[0].crowd is False


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"bbox": 5, "category": ["red"]}, "column 'objects': bbox: expected a list, an entry a box, got 5"),
        ({"bbox": [BOX], "category": 1}, "column 'objects': category: expected a list, an entry a box, got 1"),
        ({"bbox": BOX, "category": "blue"}, "column 'objects': category: expected a list, an entry a box, got 'blue'"),
        ({**GOOD, "iscrowd": 0}, "column 'objects': iscrowd: expected a list, an entry a box, got 0"),
        ({**GOOD, "iscrowd": [0, 1]}, "column 'objects': 1 boxes and 2 of iscrowd"),
        ({**GOOD, "iscrowd": ["maybe"]}, "iscrowd: expected 0 or 1, got 'maybe'"),
        ({"bbox": [BOX]}, "column 'objects': expected {bbox, category}, got bbox"),
        ({"bbox": None, "category": ["red"]}, "column 'objects': bbox: expected a list, an entry a box, got None"),
        ("{'bbox': [[4, 4, 10, 10]]}", "column 'objects': expected {bbox, category}, got text that isn't JSON"),
        ("[" * 100_000, "column 'objects': expected {bbox, category}, got text that isn't JSON"),
        ("5", "column 'objects': expected {bbox, category}, got int"),
    ],
)
def test_objects_of_another_form_cost_their_own_row(objects: Any, reason: str, tmp_path: Path) -> None:
    data = lines(tmp_path, [*saved(tmp_path), {"file_name": "0.png", "objects": objects}])
    sets = read(data)
    assert len(sets.train) == 3 and list(sets.report.dropped) == [reason]
    assert sets.report.dropped[reason].origins == (f"{tmp_path}/metadata.jsonl:4",)


def test_numbers_of_categories_may_be_arrays(tmp_path: Path) -> None:
    row = {"image": picture_of([]), "objects": {"bbox": np.array([BOX]), "category": np.array([3])}}
    assert read([row]).train[0].boxes[0].label == "3"


def test_rows_with_one_image_id_are_told(tmp_path: Path) -> None:
    rows = [{**row, "image_id": number} for row, number in zip(saved(tmp_path), (7, 8, 7), strict=True)]
    note = read(lines(tmp_path, rows)).report.notes["with an image_id that another picture has too"]
    assert [Path(origin).name for origin in note.origins] == ["0.png", "2.png"]


def test_nan_follows_its_own_setting(tmp_path: Path) -> None:
    data = lines(tmp_path, [*saved(tmp_path), {"file_name": "0.png", "objects": float("nan")}])
    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 4 pictures"):
        prepare(DataConfig(), DetectionConfig(), seed=1, train=data, val=None, keep=lambda *_: None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b.png", "a file name with a NUL character, which no file can have"),
        ("x\ud83d.png", "a file name with half a character (a lone surrogate), which no file can have"),
        ("A" * 5000, "a file name longer than any file's (is it the picture itself, as text?)"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_bad_row(name: str, reason: str, tmp_path: Path) -> None:
    sets = read(lines(tmp_path, [*saved(tmp_path), {"file_name": name, "objects": GOOD}]))
    assert len(sets.train) == 3 and list(sets.report.dropped) == [reason]
    assert sets.report.dropped[reason].origins == (f"{tmp_path}/metadata.jsonl:4",)


def test_a_name_that_begins_as_a_user_s_folder_is_a_file_s_where_there_is_no_such_user(tmp_path: Path) -> None:
    rows = saved(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "~draft 1.png")
    sets = read(lines(tmp_path, [{**rows[0], "file_name": "~draft 1.png"}, *rows[1:]]))
    assert [Path(row.origin).name for row in sets.train] == ["~draft 1.png", "1.png", "2.png"]


def test_a_row_for_each_box_is_told(tmp_path: Path) -> None:
    """A picture's rows would each teach the others' boxes as nothing."""
    rows = [{"file_name": "0.png", "objects": {"bbox": [box], "category": ["red"]}} for box in (BOX, [20, 20, 8, 8])]
    saved(tmp_path, 1)
    with pytest.raises(DataError, match=r"none of the 2 pictures can be used:\n  - 2 × listed more than once, with other boxes"):
        read(lines(tmp_path, rows))


@pytest.mark.parametrize("shut", ["data", "data/train"])
def test_a_folder_that_may_not_be_read_is_named(shut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coco_folder(Path("data/train"), 2)
    with locked(Path(shut)), pytest.raises(DataError, match=rf"^{shut}: this folder can't be read \(Permission denied\)"):
        read("data")


def test_pictures_of_a_folder_that_may_not_be_entered_are_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = coco_folder(Path("data"), 3)
    content = json.loads(path.read_text())
    (Path("data") / "shut").mkdir()
    (Path("data") / "0.png").rename("data/shut/0.png")
    content["images"][0]["file_name"] = "shut/0.png"
    path.write_text(json.dumps(content))
    with locked(Path("data/shut")):
        sets = read("data")
    assert len(sets.train) == 2 and sets.report.dropped["can't be read: Permission denied"].origins == ("data/shut/0.png",)
