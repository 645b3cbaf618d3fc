"""Pictures and boxes from every form; what is wrong with them is named, counted, and mended or refused as was chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import DetrImageProcessorPil

from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.detection.augment import augment
from lorabank.tasks.detection.pictures import open_picture
from lorabank.tasks.detection.prepare import DetectionSets, prepare
from lorabank.tasks.detection.preprocess import PixelStore, read_off
from lorabank.tasks.detection.rows import Box
from tests.tasks.detection.made import coco_folder, picture_of, processor, table_rows


def read(
    source: Any, *, labels: list[str] | None = None, val_split: float | int = 0, bad_rows: str = "drop", **settings: Any
) -> DetectionSets:
    detection = DetectionConfig(**settings)
    store = PixelStore(read_off(processor(), None), 1e6)
    name = source if isinstance(source, str) or source is None else None
    return prepare(
        DataConfig(train=str(name) if name else None, val_split=val_split, bad_rows=bad_rows),
        detection,
        seed=1,
        train=None if name else source,
        val=None,
        keep=store.keep,
        labels=labels,
    )


def test_a_coco_file_gives_pictures_boxes_and_the_categories_that_it_declares(tmp_path: Path) -> None:
    sets = read(str(coco_folder(tmp_path / "data", 10)), val_split=3)
    assert (len(sets.train), len(sets.val)) == (7, 3)
    assert sets.labels == ("red", "green") and sets.category_ids == {"red": 1, "green": 2}
    first = min((*sets.train, *sets.val), key=lambda row: row.image_id)
    assert first.image_id == 100 and first.origin.endswith("0.png") and (first.width, first.height) == (32, 32)
    assert [box.label for box in first.boxes] == ["red"] and first.reference == "1 × red"
    assert read(str(tmp_path / "data")).labels == sets.labels  # the folder will do


def test_pictures_are_found_in_an_images_folder_and_where_a_setting_says(tmp_path: Path) -> None:
    path = coco_folder(tmp_path / "data", 2)
    for place in (tmp_path / "data" / "images", tmp_path / "elsewhere"):
        place.mkdir()
        for file in path.parent.glob("*.png"):
            file.rename(place / file.name)
        assert len(read(str(path), images=None if place.name == "images" else str(place)).train) == 2
        for file in place.glob("*.png"):
            file.rename(path.parent / file.name)
    with pytest.raises(DataError, match="no folder 'nowhere'"):
        read(str(path), images="nowhere")


def test_tables_folders_and_datasets_give_the_same_rows(tmp_path: Path) -> None:
    rows = table_rows(4)
    sets = read(rows)
    (tmp_path / "folder").mkdir()
    lines = []
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / "folder" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "objects": row["objects"]}))
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(lines))
    objects = {"bbox": Sequence(Sequence(Value("float32"))), "category": Sequence(ClassLabel(names=["red", "green"]))}
    made = Dataset.from_list(rows, features=Features({"image": ImageFeature(), "objects": objects}))
    split = [[{"bbox": b, "category": c} for b, c in zip(*row["objects"].values(), strict=True)] for row in rows]
    listed = [{"image": row["image"], "objects": items} for row, items in zip(rows, split, strict=True)]
    for other in (read(str(tmp_path / "folder")), read(made), read(listed)):
        assert [row.boxes for row in other.train] == [row.boxes for row in sets.train]
        assert set(other.labels) == {"red", "green"}
    assert read(made).labels == ("red", "green") and sets.labels == ("green", "red")  # declared, or sorted


def test_folders_of_splits_are_taken_as_such(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("valid", 2)):
        coco_folder(tmp_path / name, count, seed=count)
    sets = read(str(tmp_path), val_split=0.5)
    assert (len(sets.train), len(sets.val)) == (5, 2)


GOOD = [4, 4, 10, 10]
FAULTS: list[tuple[list[Any], str | None, str]] = [
    ([28, 28, 10, 10], "red", "reaching outside the picture, cut off"),
    ([40, 2, 5, 5], "red", "outside the picture, left out"),
    ([4, 4, 0, 5], "red", "of no size, left out"),
    ([4, 4, 5, -5], "red", "of no size, left out"),
    ([4, float("nan"), 5, 5], "red", "with NaN or infinite numbers, left out"),
    ([4, 4, float("inf"), 5], "red", "with NaN or infinite numbers, left out"),
    ([4, 4, 5], "red", "that aren't four numbers"),
    ([4, 4, 10**400, 5], "red", "with NaN or infinite numbers, left out"),
    ([4, 4, "5", 5], "red", "that aren't four numbers"),
    (GOOD, "red", "there twice, left out"),
    ([4, 4, 5, 5], None, "of a category that isn't declared"),
    ([4, 4, 5, 5], "gren", "of category 'gren', none of the 2 known .*'green'"),
    ([4, 4, 0.5, 5], "red", "smaller than 1 pixels a side"),
    ([0.1, 0.2, 0.5, 0.4], "red", "with all numbers from 0 to 1, as shares of the picture, where pixels are expected: multiply"),
    ([0.0, 0.0, 1.0, 1.0], "red", "with all numbers from 0 to 1, as shares of the picture"),
]


@pytest.mark.parametrize(("box", "category", "reason"), FAULTS)
def test_what_is_wrong_with_a_box_is_counted_or_refused(tmp_path: Path, box: Any, category: Any, reason: str) -> None:
    file = tmp_path / "a.png"
    picture_of([("red", GOOD)]).save(file)
    rows = [{"image": str(file), "objects": {"bbox": [GOOD, box], "category": ["red", category]}}]
    sets = read(rows, labels=["red", "green"])
    cut = "cut off" in reason
    assert len(sets.train[0].boxes) == 1 + cut and sets.train[0].boxes[0] == Box("red", 4.0, 4.0, 10.0, 10.0)
    if cut:
        assert sets.train[0].boxes[1] == Box("red", 28.0, 28.0, 4.0, 4.0)
    (line,) = [line for line in sets.report.lines() if line.startswith("1 box ")]
    assert re.search(f"1 box {reason}", line) and str(file) in line
    assert len(read(rows, labels=["red", "green"], bad_boxes="drop").train[0].boxes) == 1
    with pytest.raises(DataError, match=r"1 box can't be used unchanged") as refused:
        read(rows, labels=["red", "green"], bad_boxes="stop")
    assert str(file) in str(refused.value)


def test_what_is_wrong_with_a_picture_is_counted_or_refused(tmp_path: Path) -> None:
    path = coco_folder(tmp_path, 5)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    (tmp_path / "2.png").write_bytes(b"")
    picture_of([], side=20).save(tmp_path / "3.png")
    sets = read(str(path))
    assert len(sets.train) == 1
    report = "\n".join(sets.report.lines())
    for reason in ("no such file", "an empty file", "its size is 20 × 20, and its annotations say 32 × 32", "picture"):
        assert reason in report
    with pytest.raises(DataError, match=r"4 of 5 pictures can't be used") as refused:
        read(str(path), bad_rows="stop")
    assert all(f"{i}.png" in str(refused.value) for i in range(4))


def test_pictures_to_be_scored_are_test_pictures(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("test", 2)):
        coco_folder(tmp_path / "both" / name, count)
    store = PixelStore(read_off(processor(), None), 1e6)
    data = DataConfig(test=str(tmp_path / "both"))
    sets = prepare(data, DetectionConfig(), seed=1, train=None, val=None, keep=store.keep, labels=["red", "green", "blue"])
    assert (sets.train, sets.val, len(sets.test)) == ([], [], 2)
    said = "\n".join(sets.report.lines())
    assert "2 pictures read, 2 kept: 2 test" in said and "1 category without a box: blue" in said
    assert "train" not in said.replace(str(tmp_path), "")


def test_nothing_to_learn_from_is_refused_before_training(tmp_path: Path) -> None:
    empty = [{"image": picture_of([]), "objects": {"bbox": [], "category": []}}]
    with pytest.raises(DataError, match="not the only picture has a box"):
        read(empty)
    outside = [{"image": picture_of([]), "objects": {"bbox": [[99, 99, 5, 5]], "category": ["red"]}}]
    with pytest.raises(DataError, match="1 × outside the picture"):
        read(outside)
    for content, message in (("{}", "expected COCO's form"), ("{", "not a readable COCO file")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=message):
            read(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match="expected columns"):
        read([{"image": picture_of([]), "boxes": []}])


def test_pictures_without_a_box_stay_and_annotations_of_none_are_told(tmp_path: Path) -> None:
    path = coco_folder(tmp_path, 3)
    content = json.loads(path.read_text())
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 101]
    content["annotations"] += [{"id": 99 + i, "image_id": 7, "category_id": 1, "bbox": GOOD} for i in range(2)]
    path.write_text(json.dumps(content))
    sets = read(str(path))
    report = "\n".join(sets.report.lines())
    assert len(sets.train) == 3 and "1 training picture without a box" in report
    assert "2 annotations of pictures that the file doesn't list" in report and "image_id 7" in report


def test_a_turned_picture_s_boxes_are_of_the_size_that_its_annotations_say() -> None:
    picture = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = picture.getexif()
    exif[274] = 6  # a quarter turn
    for width, height, upright in ((40, 20, False), (20, 40, True), (None, None, True)):
        picture.info["exif"] = exif.tobytes()
        row = {"image": picture, "width": width, "height": height, "objects": {"bbox": [[1, 1, 5, 5]], "category": ["a"]}}
        (made,) = read([row]).train
        assert made.upright is upright and (made.width, made.height) == ((20, 40) if upright else (40, 20))


@pytest.mark.parametrize("size", [{"height": 48, "width": 40}, {"shortest_edge": 30, "longest_edge": 60}])
def test_pixels_are_the_image_processor_s(size: dict[str, int]) -> None:
    library = DetrImageProcessorPil(size=size)
    picture = picture_of([("red", GOOD)], side=33).resize((50, 33))
    expected = library(images=picture, do_pad=False, return_tensors="pt")["pixel_values"][0]
    ours = read_off(library, None)
    pixels = ours.pixels(picture)
    torch.testing.assert_close(ours.normalised(pixels), expected, atol=1e-5, rtol=1e-5)
    x, mask = ours.stacked([pixels])
    assert x.shape[-1] == ours.width and mask.sum() == expected.shape[1] * expected.shape[2]


def test_sizes_are_a_setting_and_one_that_nobody_knows_is_an_error() -> None:
    ours = read_off(DetrImageProcessorPil(), 64)
    assert ours.scaled_size(200, 100) == (32, 64) and (ours.height, ours.width) == (64, 64)
    with pytest.raises(ConfigError, match=r"Set detection\.image_size"):
        read_off(object(), None)


def test_varied_pictures_keep_their_boxes_and_depend_on_their_draw_alone() -> None:
    """The square's pixels stay inside its box, whatever was cut off, flipped or coloured."""
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, 20:36, 8:30] = 200
    box = torch.tensor([[8 / 64, 20 / 64, 30 / 64, 36 / 64]])
    seen = 0
    for draw in range(1, 40):
        x, boxes, left = augment(picture, box, draw, ("crop", "flip", "colour"))
        again = augment(picture, box, draw, ("crop", "flip", "colour"))
        assert torch.equal(x, again[0]) and torch.equal(boxes, again[1])
        if not left[0]:
            continue
        seen += 1
        rows, columns = (x.mean(0) > 80).nonzero().unbind(1)
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert (found - boxes[0]).abs().max() < 2.5 / 64
    assert seen > 20


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"detection\.bad_boxes.*'clib'"):
        DetectionConfig(bad_boxes="clib")
    with pytest.raises(ConfigError, match=r"detection\.augment: expected of crop, flip, colour, got 'flop'"):
        DetectionConfig(augment=("flop",))
    with pytest.raises(ConfigError, match=r"detection\.labels: expected different names"):
        DetectionConfig(labels=("a", "a"))


def test_deep_and_transparent_pictures_are_seen_as_other_tasks_see_them(tmp_path: Path) -> None:
    """16 bits are scaled, not cut off at 255; what is transparent is white."""
    deep = np.full((20, 20), 128 * 257, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name, value in (("deep.png", 128), ("clear.png", 255)):
        picture, _, _ = open_picture(tmp_path / name)
        assert picture.mode == "RGB" and np.unique(np.asarray(picture)).tolist() == [value]
