"""From folders, tables and data sets to checked, stratified splits; what can't be used is named, counted, dropped or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature

from lorabank.config.images import ImagesConfig
from lorabank.config.train import DataConfig
from lorabank.data.stratified import stratified_rows
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.images.prepare import PreparedImages, prepare_images
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.rows import PixelStore
from lorabank.tasks.images.sources import find_pictures
from tests.data.locked import locked
from tests.tasks.images.made import as_bytes, folder, picture


def prepared(data: dict[str, Any], images: dict[str, Any] | None = None, **more: Any) -> PreparedImages:
    config = ImagesConfig(image_size=16, **(images or {}))
    store = PixelStore(read_off(plain_processor(config), config), 1e6)
    return prepare_images(DataConfig(**data), config, store, seed=0, **more)


def test_a_folder_a_class_is_split_by_class(tmp_path: Path) -> None:
    found = prepared({"train": str(folder(tmp_path / "d", each=10)), "val_split": 0.2, "test_split": 0.1})
    assert found.labels == ("blue", "green", "red")
    assert (len(found.train), len(found.val), len(found.test)) == (21, 6, 3)
    assert found.report.classes["red"] == {"train": 7, "val": 2, "test": 1}
    assert not {r.digest for r in found.train} & {r.digest for r in (*found.val, *found.test)}
    again = prepared({"train": str(tmp_path / "d"), "val_split": 0.2, "test_split": 0.1})
    assert again.val == found.val


def test_folders_of_splits_and_classes_in_their_order(tmp_path: Path) -> None:
    folder(tmp_path / "d" / "train", each=3)
    folder(tmp_path / "d" / "val", each=2)
    found = prepared({"train": str(tmp_path / "d")})
    assert (len(found.train), len(found.val)) == (9, 6)
    for number in (2, 10):
        (tmp_path / "n" / f"class {number}").mkdir(parents=True)
        for i in range(2):
            picture("red", 10 * number + i).save(tmp_path / "n" / f"class {number}" / f"{i}.png")
    assert prepared({"train": str(tmp_path / "n"), "val_split": 0}).labels == ("class 2", "class 10")
    with pytest.raises(DataError, match="holds train, val, and no folder 'test' for test data"):
        prepared({"train": str(tmp_path / "d"), "test": str(tmp_path / "d")})


def test_a_table_names_files_beside_it(tmp_path: Path) -> None:
    folder(tmp_path / "pictures", each=4)
    lines = [f"pictures/{c}/{i}.png,{c}" for c in ("red", "green", "blue") for i in range(4)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,label", *lines]))
    found = prepared({"train": str(tmp_path / "rows.csv"), "val_split": 0.25})
    assert found.report.classes == {c: {"train": 3, "val": 1} for c in ("blue", "green", "red")}
    assert found.train[0].origin == f"{tmp_path}/rows.csv:2"
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps({"bild": x.split(",")[0], "art": x.split(",")[1]}) + "\n" for x in lines)
    )
    with pytest.raises(DataError, match=r"no column for a picture .* among bild, art. Name it with images.image_column"):
        prepared({"train": str(tmp_path / "odd.jsonl")})
    own = prepared({"train": str(tmp_path / "odd.jsonl")}, {"image_column": "bild", "label_column": "art"})
    assert own.labels == found.labels
    with pytest.raises(DataError, match=r"no column 'bidl' \(did you mean 'bild'\?\)"):
        prepared({"train": str(tmp_path / "odd.jsonl")}, {"image_column": "bidl"})


def test_datasets_and_parquet_keep_the_names_of_their_classes(tmp_path: Path) -> None:
    names = ["red", "green", "blue"]
    rows = {
        "image": [{"bytes": as_bytes(picture(names[i % 3], i)), "path": None} for i in range(9)],
        "label": [i % 3 for i in range(9)],
    }
    rows["image"][4] = {"bytes": b"broken", "path": None}
    table = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": ClassLabel(names=names)}))
    table.to_parquet(str(tmp_path / "t.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (table, DatasetDict({"train": table}), str(tmp_path / "t.parquet"), str(tmp_path / "saved")):
        found = prepared({"val_split": 0}, train=source)
        assert found.labels == ("blue", "green", "red")
        assert len(found.train) == 8
        ((why, reason),) = found.report.dropped.items()
        assert why.startswith("no picture that can be read") and reason.origins[0].startswith("row 5 of")
    objects = prepared({"val_split": 0}, train=[{"image": picture(names[i % 3], i), "label": names[i % 3]} for i in range(6)])
    assert len(objects.train) == 6


def test_bad_pictures_are_dropped_and_counted_or_stop_it(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=4)
    (where / "red" / "cut.jpg").write_bytes(as_bytes(picture("red", 9, (90, 90)), "JPEG")[:700])
    (where / "red" / "empty.png").write_bytes(b"")
    (where / "green" / "notes.txt").write_text("x")
    picture("blue", 9, (3, 3)).save(where / "blue" / "tiny.png")
    picture("blue", 9).save(where / "loose.png")
    found = prepared({"train": str(where), "val_split": 0.25})
    dropped = {why: reason.origins[0] for why, reason in found.report.dropped.items()}
    assert dropped == {
        "a cut off picture": f"{where}/red/cut.jpg",
        "an empty file": f"{where}/red/empty.png",
        "no picture by its name (.txt)": f"{where}/green/notes.txt",
        "smaller than 8 pixels a side": f"{where}/blue/tiny.png",
        "lies beside the class folders": f"{where}/loose.png",
    }
    assert found.report.read == 17 and found.report.kept == 12
    assert any(line == f"dropped 1: an empty file ({where}/red/empty.png)" for line in found.report.lines())
    with pytest.raises(DataError) as caught:
        prepared({"train": str(where), "bad_rows": "stop"})
    assert "5 of 17 pictures can't be used" in str(caught.value)
    assert all(origin in str(caught.value) for origin in dropped.values())


def test_links_to_folders_are_walked_once(tmp_path: Path) -> None:
    where, elsewhere = (
        folder(tmp_path / "d", each=4, classes=("red", "green")),
        folder(tmp_path / "far", each=4, classes=("blue",)),
    )
    (where / "red" / "deep").mkdir()
    picture("red", 50).save(where / "red" / "deep" / "0.png")
    plain = prepared({"train": str(where)}, labels=["green", "red", "blue"])
    assert plain.report.read == 9
    (where / "red" / "loop").symlink_to(where / "red")
    (where / "red" / "deep" / "up").symlink_to("../..")
    (where / "selfloop").symlink_to(where)
    (where / "a copy of red").symlink_to(where / "red" / "deep")  # comes before red
    (where / "outside").symlink_to(tmp_path)
    assert prepared({"train": str(where)}, labels=["green", "red", "blue"]).report == plain.report
    (elsewhere / "blue" / "back").symlink_to(where)
    (where / "green" / "more").symlink_to(elsewhere / "blue")  # a class of its own all the same
    (where / "sky").symlink_to(elsewhere / "blue")
    (where / ".store" / "grey").mkdir(parents=True)
    picture("grey", 60).save(where / ".store" / "grey" / "0.png")
    (where / "grey").symlink_to(where / ".store" / "grey")
    linked = prepared({"train": str(where), "val_split": 0})
    assert linked.report.classes == {"green": {"train": 4}, "grey": {"train": 1}, "red": {"train": 5}, "sky": {"train": 4}}
    assert not linked.report.duplicates.count
    assert {Path(row.origin).relative_to(where).parent.name for row in linked.train} == {"green", "grey", "red", "deep", "sky"}
    assert len(find_pictures(str(where), labelled=False)) == 14


@pytest.mark.parametrize("which", ["d", "d/red", "d/red/deep"])
def test_a_folder_of_pictures_that_may_not_be_read_is_named(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("d"), each=2)
    (Path("d") / "red" / "deep").mkdir()
    for mode in (0, 0o444):
        with locked(Path(which), mode):
            for labelled in (True, False):
                with pytest.raises(DataError, match=rf"^{which}: this folder can't be read \(Permission denied\)\. Allow it"):
                    find_pictures("d", labelled=labelled)


def test_a_row_of_a_table_is_told_with_the_file_that_it_names(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=4)
    names = [f"{c}/{i}.png" for c in ("red", "green", "blue") for i in range(4)]
    rows = [{"file_name": name, "label": name.partition("/")[0]} for name in names]
    odd = ["RED/0.png", "red/0.png ", "a\0b", "x\ud83d.png", "~draft 1.png", "Q" * 9000]
    rows += [{"file_name": name, "label": "red"} for name in odd] + [{"file_name": names[0], "label": "\ud83d"}]
    table = where / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepared({"train": str(where), "val_split": 0.25})
    assert found.report.kept == 12
    assert {why: reason.origins for why, reason in found.report.dropped.items()} == {
        "no such file": tuple(
            f"{table}:{line}: {str(where / name)!r}" for line, name in ((13, odd[0]), (14, odd[1]), (17, odd[4]))
        ),
        "a name that no file can have": tuple(f"{table}:{line}: {str(where / odd[line - 13])!r}" for line in (15, 16)),
        "can't be read: File name too long": (f"{table}:18: {str(where / odd[5])[:100] + '…' + 'Q' * 100!r}",),
        "the label '\\ud83d' isn't Unicode text": (f"{table}:19",),
    }
    "\n".join(found.report.lines()).encode()
    store = PixelStore(read_off(plain_processor(ImagesConfig(image_size=16)), ImagesConfig(image_size=16)), 0)
    again = prepare_images(DataConfig(train=str(where), val_split=0), ImagesConfig(image_size=16), store, seed=0)
    (where / "blue" / "3.png").unlink()
    with pytest.raises(DataError, match=rf"^{table}:12: '{where}/blue/3.png': no such file, though it was fine"):
        store.stacked(again.train)


def test_a_class_folder_is_called_by_text_and_has_pictures(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=4)
    (where / "emptyclass" / ".cache").mkdir(parents=True)
    odd = where / os.fsdecode(b"\xe4")
    odd.mkdir()
    picture("grey", 1).save(odd / "0.png")
    (where / "red" / "phone.HEIC").write_bytes(b"x")
    found = prepared({"train": str(where), "val_split": 0.25, "bad_rows": "drop"})
    assert found.labels == ("blue", "green", "red") and (found.report.read, found.report.kept) == (14, 12)
    assert f"class folders without a picture: 1 ({where}/emptyclass)" in found.report.lines()
    assert {why: reason.origins for why, reason in found.report.dropped.items()} == {
        "the label '\\udce4' isn't Unicode text": (f"{odd}/0.png",),
        ".heic isn't read: convert it to PNG or JPEG": (f"{where}/red/phone.HEIC",),
    }
    (where / "loose.avif").write_bytes(b"x")
    faults = {each.origin: str(each.error) for each in find_pictures(str(where), labelled=False) if each.error}
    assert faults == {
        f"{where}/loose.avif": ".avif isn't read: convert it to PNG or JPEG",
        f"{where}/red/phone.HEIC": ".heic isn't read: convert it to PNG or JPEG",
    }
    (tmp_path / "e" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="expected at least one picture, got none"):
        prepared({"train": str(tmp_path / "e")})


def test_one_picture_is_no_data_to_train_on(tmp_path: Path) -> None:
    picture("red", 1).save(tmp_path / "x.png")
    (tmp_path / "x.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.png: expected pictures with their labels, got one picture\. Give a folder"):
        prepared({"train": str(tmp_path / "x.png")})
    assert [each.picture for each in find_pictures(str(tmp_path / "x.png"), labelled=False)] == [tmp_path / "x.png"]
    for labelled in (True, False):
        with pytest.raises(DataError, match=r"x\.heic: \.heic isn't read: convert it to PNG or JPEG"):
            find_pictures(str(tmp_path / "x.heic"), labelled=labelled)


def test_nothing_left_and_nothing_there_are_errors(tmp_path: Path) -> None:
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="not the only picture can be used:\n  - 1 × an empty file"):
        prepared({"train": str(tmp_path / "d")})
    folder(tmp_path / "one", classes=("red",))
    with pytest.raises(DataError, match="at least two classes, got red alone"):
        prepared({"train": str(tmp_path / "one")})
    (tmp_path / "flat").mkdir()
    picture("red", 1).save(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match=r"expected a folder for each class .* found a.png"):
        prepared({"train": str(tmp_path / "flat")})
    with pytest.raises(DataError, match="no file or folder"):
        prepared({"train": "./gone"})
    with pytest.raises(ConfigError, match=r"images.augment: .*'colur' \(did you mean 'colour'\?\)"):
        ImagesConfig(augment=("colur",))


def test_a_class_with_one_picture_is_trained_on_and_said(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=6)
    (where / "grey").mkdir()
    picture("grey", 1).save(where / "grey" / "only.png")
    found = prepared({"train": str(where), "val_split": 0.2})
    assert found.report.classes["grey"] == {"train": 1}
    assert any("too few pictures to hold one out" in line and "grey: " in line for line in found.report.lines())


def test_labels_that_the_head_lacks_are_named(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "t", each=4), folder(tmp_path / "v", each=2, classes=("red", "grey"))
    found = prepared({"train": str(train), "val": str(val)})
    assert found.report.dropped["label 'grey' is none of the 3 known (did you mean 'green'?)"].count == 2
    assert len(found.val) == 2
    with pytest.raises(DataError, match=rf"2 × label 'grey' is none of the 3 known .*{val}/grey/0.png"):
        prepared({"train": str(train), "val": str(val), "bad_rows": "stop"})
    given = prepared({"train": str(train)}, {"labels": ("red", "green", "blue", "grey")})
    assert given.labels == ("red", "green", "blue", "grey")
    assert any(line.startswith("labels without a training picture: 1 (grey)") for line in given.report.lines())


def test_nan_labels_follow_their_own_setting() -> None:
    rows = [{"image": picture(c, i), "label": c} for i in range(4) for c in ("red", "green")]
    rows.append({"image": picture("red", 99), "label": float("nan")})
    with pytest.raises(DataError, match=r"1 × column 'label' holds NaN .*row 9 of"):
        prepared({"val_split": 0}, train=rows)
    assert prepared({"val_split": 0, "nan_rows": "drop"}, train=rows).report.dropped["column 'label' holds NaN"].count == 1


def test_copies_are_found_and_stay_in_one_split(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=6)
    for number in range(3):
        (where / "red" / f"copy{number}.png").write_bytes((where / "red" / "0.png").read_bytes())
    (where / "green" / "copy.png").write_bytes((where / "red" / "0.png").read_bytes())
    found = prepared({"train": str(where), "val_split": 0.3})
    assert found.report.duplicates.count == 4
    assert found.report.other_labels.count == 5
    red = (found.train, found.val)
    assert sum(any(r.label == "red" and r.digest == found.train[0].digest for r in part) for part in red) <= 2
    own = {r.digest for r in found.train if r.label == "red"}
    assert not own & {r.digest for r in found.val if r.label == "red"}


def test_a_file_that_changes_while_training_is_named(tmp_path: Path) -> None:
    where = folder(tmp_path / "d", each=3)
    config = ImagesConfig(image_size=16)
    store = PixelStore(read_off(plain_processor(config), config), 3 * 16 * 16 * 4)  # room for four
    found = prepare_images(DataConfig(train=str(where), val_split=0), config, store, seed=0)
    assert store.stacked(found.train).shape == (9, 3, 16, 16)
    last = found.train[-1]
    Path(last.origin).write_bytes(as_bytes(picture("grey", 5)))
    with pytest.raises(DataError, match=f"{last.origin}: its content is another than when the run began"):
        store.stacked([last])
    Path(last.origin).unlink()
    with pytest.raises(DataError, match="no such file, though it was fine when the run began"):
        store.stacked([last])


def test_stratified_splits_don_t_depend_on_the_order() -> None:
    keys, labels = [f"{i}" for i in range(40)], ["a" if i % 4 else "b" for i in range(40)]
    there = stratified_rows(keys, labels, val=0.25, test=4, seed=3).split
    back = stratified_rows(keys[::-1], labels[::-1], val=0.25, test=4, seed=3).split
    assert {keys[i] for i in there.val} == {keys[::-1][i] for i in back.val}
    assert [sum(labels[i] == c for i in there.val) for c in "ab"] == [8, 2]
    assert [sum(labels[i] == c for i in there.test) for c in "ab"] == [3, 1]
    with pytest.raises(DataError, match="leaves none to train on"):
        stratified_rows(keys, labels, val=0.5, test=20, seed=3)
    with pytest.raises(DataError, match="no class has two different rows"):
        stratified_rows(["x", "y"], ["a", "b"], val=0.5, test=0, seed=3)
