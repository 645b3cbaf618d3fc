"""A data set that was downloaded from the hub, as a folder: each task reads its splits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorabank.config.train import DataConfig
from lorabank.errors import DataError
from tests.tasks.detection.made import coco_folder
from tests.tasks.images.made import folder as image_folder
from tests.tasks.reading import READINGS, parquet, repository
from tests.tasks.speech.tiny import audio_folder, tone

TASKS = pytest.mark.parametrize("task", READINGS)
SHARDS = {
    "data/train-00000-of-00002.parquet": 8,
    "data/train-00001-of-00002.parquet": 6,
    "data/validation-00000-of-00001.parquet": 3,
    "data/test-00000-of-00001.parquet": 4,
}


def counts(sets: Any) -> list[int]:
    return [len(sets.train), len(sets.val), len(sets.test)]


def origins(rows: Any, folder: Path) -> set[str]:
    """The files that they are from."""
    return {str(Path(row.origin.split(" of ")[-1].split(",")[0].rstrip(")")).relative_to(folder)) for row in rows}


@TASKS
def test_splits_are_read_by_what_they_are_for(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    repo = repository(tmp_path / "repo", reading, SHARDS)
    for source in (repo, repo / "data"):
        sets = reading.read(DataConfig(train=str(source)), tmp_path, None)
        assert counts(sets) == [14, 3, 0]
        (told,) = [line for line in sets.report.lines() if "left aside" in line]
        assert told == (
            "splits left aside, neither trained on nor used for validation: test; to score test: lorabank eval OUTPUT --data "
            f"{source}"
        )
    assert origins(sets.train, repo) == {f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)}
    assert origins(sets.val, repo) == {"data/validation-00000-of-00001.parquet"}
    scored = reading.read(DataConfig(test=str(repo), val_split=0), tmp_path, None)
    assert counts(scored) == [0, 0, 4] and origins(scored.test, repo) == {"data/test-00000-of-00001.parquet"}
    assert not any("left aside" in line for line in scored.report.lines())


@TASKS
def test_validation_rows_that_are_named_come_first(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    repo = repository(tmp_path / "repo", reading, SHARDS)
    own = tmp_path / "own.parquet"
    parquet(reading.rows(5, 7), own)
    sets = reading.read(DataConfig(train=str(repo), val=str(own)), tmp_path, None)
    assert counts(sets) == [14, 5, 0]
    (told,) = [line for line in sets.report.lines() if "left aside" in line]
    assert "used for validation: test, validation; to score test" in told
    named = reading.read(DataConfig(train=str(repo), val=str(repo / "data/validation-00000-of-00001.parquet")), tmp_path, None)
    assert counts(named) == [14, 3, 0]
    (told,) = [line for line in named.report.lines() if "left aside" in line]
    assert "used for validation: test; to score test" in told


@TASKS
def test_without_a_validation_split_rows_are_held_out(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    repo = repository(tmp_path / "repo", reading, {"train.parquet": 8, "test.parquet": 4})
    sets = reading.read(DataConfig(train=str(repo), val_split=2), tmp_path, None)
    assert counts(sets) == [6, 2, 0]
    assert origins([*sets.train, *sets.val], repo) == {"train.parquet"}, "a test split is no validation split"
    with pytest.raises(DataError, match=r"test\.parquet, train\.parquet.*none is for val\. Name one file instead"):
        reading.read(DataConfig(train=str(repo), val=str(repo)), tmp_path, None)
    alone = repository(tmp_path / "alone", reading, {"default/train-00000-of-00001.parquet": 8})
    assert counts(reading.read(DataConfig(train=str(alone), val_split=2), tmp_path, None)) == [6, 2, 0]
    held = repository(tmp_path / "held", reading, {"data/test-00000-of-00001.parquet": 8})
    with pytest.raises(DataError, match="none is for train"):
        reading.read(DataConfig(train=str(held)), tmp_path, None)


@TASKS
def test_one_of_several_configurations_is_named(task: str, tmp_path: Path) -> None:
    reading = READINGS[task]
    files = {f"{name}/{split}-00000-of-00001.parquet": 4 for name in ("de", "en") for split in ("train", "validation")}
    repo = repository(tmp_path / "repo", reading, files)
    with pytest.raises(DataError, match=rf"^{repo}: expected one data set, .* de, en\. Name one of them, such as {repo}/de\.$"):
        reading.read(DataConfig(train=str(repo)), tmp_path, None)
    sets = reading.read(DataConfig(train=str(repo / "en")), tmp_path, None)
    assert counts(sets) == [4, 4, 0]
    one = repository(tmp_path / "one", reading, {"data/en/train/0000.parquet": 3, "data/en/dev/0000.parquet": 2})
    assert counts(reading.read(DataConfig(train=str(one)), tmp_path, None)) == [3, 2, 0]


def test_names_of_classes_are_those_of_the_features(tmp_path: Path) -> None:
    for task, names in (
        ("text-classification", {"good", "bad"}),
        ("image-classification", {"red", "blue"}),
        ("object-detection", {"red", "green"}),
    ):
        reading = READINGS[task]
        repo = repository(tmp_path / task, reading, SHARDS)
        for source in (repo, repo / "data/train-00000-of-00002.parquet"):
            sets = reading.read(DataConfig(train=str(source), val_split=0), tmp_path, None)
            assert {name for row in sets.train for name in reading.shown(row).split()} <= names
            assert set(getattr(sets.labels, "names", sets.labels)) == names


def test_splits_of_other_names_are_never_guessed(tmp_path: Path) -> None:
    reading = READINGS["text-classification"]
    files = {"plain/train-00000-of-00001.parquet": 6, "plain/unsupervised-00000-of-00001.parquet": 4}
    repo = repository(tmp_path / "imdb", reading, files)
    sets = reading.read(DataConfig(train=str(repo), val_split=2), tmp_path, None)
    assert counts(sets) == [4, 2, 0]
    assert any(line.endswith("used for validation: unsupervised") for line in sets.report.lines())
    chat = READINGS["text-generation"]
    files = {f"data/{split}-00000-of-00001.parquet": 3 for split in ("train_sft", "test_sft", "test_gen")}
    one = repository(tmp_path / "one", chat, files)
    assert counts(chat.read(DataConfig(train=str(one), val_split=1), tmp_path, None)) == [2, 1, 0]
    parquet(chat.rows(3, 9), one / "data" / "train_gen-00000-of-00001.parquet")
    with pytest.raises(DataError, match="train_gen, train_sft might be for train"):
        chat.read(DataConfig(train=str(one)), tmp_path, None)


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    reading = READINGS["text-classification"]
    real = repository(tmp_path / "blobs", reading, SHARDS)
    snapshot = tmp_path / "snapshots" / "0a1b"
    (snapshot / "data").mkdir(parents=True)
    for name in SHARDS:
        blob = (real / name).rename(tmp_path / Path(name).stem)  # blobs have no suffix
        (snapshot / name).symlink_to(blob)
    assert counts(reading.read(DataConfig(train=str(snapshot)), tmp_path, None)) == [14, 3, 0]


@pytest.mark.parametrize("inside", ["", "data"])
def test_folders_of_pictures_and_recordings(inside: str, tmp_path: Path) -> None:
    pictures, sounds = tmp_path / "pictures", tmp_path / "sounds"
    for each, split in ((3, "train"), (2, "validation"), (1, "test")):
        image_folder(pictures / inside / split, each=each)
        audio_folder(sounds / inside / split, [(f"{i}.wav", tone(0.3, 200.0 * each, seed=i), "ae") for i in range(each)])
    for folder in (pictures, sounds):
        (folder / "README.md").write_text("# Rows\n")
        (folder / "banner.png").write_bytes((pictures / inside / "train" / "red").glob("*.png").__next__().read_bytes())
    assert counts(READINGS["image-classification"].read(DataConfig(train=str(pictures)), tmp_path, None)) == [9, 6, 0]
    for task in ("automatic-speech-recognition", "text-to-speech"):
        assert counts(READINGS[task].read(DataConfig(train=str(sounds)), tmp_path, None)) == [3, 2, 0]


def test_classes_that_are_called_as_splits_stay_classes(tmp_path: Path) -> None:
    image_folder(tmp_path / "d", each=2, classes=("red", "blue"))
    (tmp_path / "d" / "red").rename(tmp_path / "d" / "train")  # a locomotive
    (tmp_path / "d" / "train" / "test").mkdir()
    sets = READINGS["image-classification"].read(DataConfig(train=str(tmp_path / "d"), val_split=0), tmp_path, None)
    assert set(sets.labels) == {"train", "blue"} and len(sets.train) == 4


def test_tables_at_the_top_name_files_beside_them(tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", each=3, classes=("red", "blue"))
    names = sorted(path.relative_to(tmp_path) for path in (tmp_path / "photos").rglob("*.png"))
    for split, own in (("train", names[:2] + names[3:5]), ("dev", [names[2], names[5]])):
        rows = [f"{name},{name.parent.name}" for name in own]
        (tmp_path / f"{split}.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
    sets = READINGS["image-classification"].read(DataConfig(train=str(tmp_path)), tmp_path, None)
    assert counts(sets) == [4, 2, 0] and set(sets.labels) == {"red", "blue"}


def test_a_parquet_file_of_another_tool_has_no_names_of_classes(tmp_path: Path) -> None:
    rows = pyarrow.Table.from_pylist([{"text": f"t {i}", "label": i % 2} for i in range(6)])
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    sets = READINGS["text-classification"].read(DataConfig(train=str(tmp_path / "rows.parquet")), tmp_path, None)
    assert set(sets.labels.names) == {"0", "1"}


def test_coco_files_that_are_called_as_splits(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        coco_folder(tmp_path / "repo", count, seed=count).rename(tmp_path / "repo" / f"instances_{name}.json")
    sets = READINGS["object-detection"].read(DataConfig(train=str(tmp_path / "repo")), tmp_path, None)
    assert counts(sets) == [5, 2, 0]
    shutil.copy(tmp_path / "repo" / "instances_train.json", tmp_path / "repo" / "persons_train.json")
    with pytest.raises(DataError, match=r"one COCO file for train data, got instances_train\.json, persons_train\.json"):
        READINGS["object-detection"].read(DataConfig(train=str(tmp_path / "repo")), tmp_path, None)


def test_the_line_that_scores_a_split_can_be_typed(tmp_path: Path) -> None:
    repo = repository(tmp_path / "my rows", READINGS["text-generation"], SHARDS)
    sets = READINGS["text-generation"].read(DataConfig(train=str(repo)), tmp_path, None)
    assert any(line.endswith(f"lorabank eval OUTPUT --data '{repo}'") for line in sets.report.lines())
