"""`predict` of detectors: every picture that is left out is named with its reason; an output of another kind is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import lorabank as lb
from lorabank import api
from lorabank.config.detection import DetectionConfig
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.detection.prepare import DetectionSets, prepare
from tests.data.locked import locked
from tests.tasks.detection.made import coco_folder, picture_of, saved_detector

TRAINING: dict[str, Any] = {"task": "object-detection", "rank": 2, "max_steps": 1, "val_split": 0, "eval": {"every": 0}}
CUT = "no picture that can be read (another format, or damaged)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicting")
    data = coco_folder(folder / "data", 4)
    lb.train(model=str(saved_detector(folder / "base")), data=str(data), output=str(folder / "run"), **TRAINING)
    return folder / "run"


def pictures(folder: Path, *, bad: dict[str, bytes]) -> Path:
    """A folder with one good picture."""
    folder.mkdir()
    picture_of([]).save(folder / "good.png")
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return folder


def test_every_picture_that_is_left_out_is_named_with_its_reason(run: Path, tmp_path: Path) -> None:
    broken = {f"broken-{i}.png": b"nothing" for i in range(8)}
    data = pictures(tmp_path / "in", bad={**broken, "empty.png": b"", "phone.heic": b"nothing", "two.txt": b""})
    told = api.predict(run, data, tmp_path / "out", options={"bad_rows": "drop", "draw": 0})
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {Path(line["file_name"]).name: line["error"] for line in lines} == {
        **dict.fromkeys([*broken, "phone.heic"], CUT),
        "empty.png": "an empty file",
    }
    assert told.startswith("1 picture; ") and "10 pictures left out (all in left_out.jsonl):" in told
    assert f"1 × an empty file ({data}/empty.png)" in told and f"9 × {CUT} ({data}/broken-0.png, " in told
    told = api.predict(run, data, tmp_path / "alone.json", options={"bad_rows": "drop"})
    assert all(str(data / name) in told for name in (*broken, "empty.png", "phone.heic"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["alone.json", "in", "out"]


def test_where_all_can_be_used_nothing_is_said_to_be_left_out(run: Path, tmp_path: Path) -> None:
    told = api.predict(run, pictures(tmp_path / "in", bad={}), tmp_path / "out")
    assert "left out" not in told and "\n" not in told and not (tmp_path / "out" / "left_out.jsonl").exists()


def test_a_folder_below_that_may_not_be_read_is_a_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(pictures(Path("in"), bad={}) / "shut", bad={})

    def found(bad_rows: str) -> DetectionSets:
        data = DataConfig(test="in", bad_rows=bad_rows)
        return prepare(data, DetectionConfig(), seed=0, train=None, val=None, keep=lambda *_: None, boxed=False)

    with locked(Path("in/shut")):
        sets = found("drop")
        with pytest.raises(DataError, match=r"1 × a folder that can't be read: Permission denied \(in/shut\)"):
            found("stop")
    assert [row.origin for row in sets.test] == ["in/good.png"]
    assert [str(error) for error in sets.errors] == ["in/shut: a folder that can't be read: Permission denied"]


def test_a_name_that_is_not_utf_8_is_written_and_said_escaped(run: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "in", bad={})
    (data / "good.png").rename(os.fsdecode(os.fsencode(data) + b"/\xe4.png"))
    Path(os.fsdecode(os.fsencode(data) + b"/\xe5.png")).write_bytes(b"")
    options = {"threshold": 0.0, "bad_rows": "drop", "draw": 0}
    told = api.predict(run, data, tmp_path / "out", options=options)
    assert rf"1 × an empty file ({data}/\udce5.png)" in told and told.encode()
    found = json.loads((tmp_path / "out" / "default.json").read_text(encoding="utf-8"))
    assert found and os.fsencode(found[0]["file_name"]).endswith(b"/\xe4.png")


def test_a_missing_cell_is_a_bad_picture(run: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "in", bad={})
    (data / "metadata.jsonl").write_text('{"file_name": "good.png"}\n{"file_name": NaN}\n')
    told = api.predict(run, data, tmp_path / "out", options={"bad_rows": "drop", "draw": 0})
    assert f"1 × column 'file_name' holds NaN ({data}/metadata.jsonl:2)" in told


def test_a_picture_of_one_pixel_is_told(run: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "in", bad={})
    picture_of([], side=1).save(data / "dot.png")
    told = api.predict(run, data, tmp_path / "out", options={"draw": 0})
    assert told.endswith(f"\nonly one pixel wide or high: {data}/dot.png")


@pytest.mark.parametrize("name", ["x.csv", "x.PNG", "x.jsonl"])
def test_a_file_of_another_kind_is_no_folder(name: str, run: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "in", bad={})
    suffix = Path(name).suffix.lower()
    with pytest.raises(ConfigError, match=rf"{name}': object-detection writes JSON, no {suffix}\. Name a folder"):
        api.predict(run, data, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_may_have_a_dot(run: Path, tmp_path: Path) -> None:
    api.predict(run, pictures(tmp_path / "in", bad={}), tmp_path / "found.v2", options={"draw": 0})
    assert (tmp_path / "found.v2" / "default.json").is_file()
