"""Names of files that are no UTF-8, as archives from other systems leave them: they train, and are written escaped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lorabank as lb
from lorabank import api
from tests.tasks.images.made import picture
from tests.tasks.images.test_task import CONVOLUTIONS, SETTINGS, saved


def test_pictures_whose_names_are_no_utf_8(tmp_path: Path) -> None:
    for colour in ("red", "green"):
        (tmp_path / "d" / colour).mkdir(parents=True)
        for number in range(4):
            name = os.fsdecode(b"\xe4%d.png" % number)
            picture(colour, number if colour == "red" else 50 + number).save(tmp_path / "d" / colour / name)
        (tmp_path / "d" / colour / os.fsdecode(b"cut\xe4.png")).write_bytes(b"nothing")
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}}
    base, data, run = saved(tmp_path / "base", "resnet"), tmp_path / "d", tmp_path / "run"
    lb.train(model=str(base), data=str(data), targets=CONVOLUTIONS, output=str(run), **settings)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text(encoding="utf-8"))
    assert os.fsdecode(b"cut\xe4.png") in json.dumps(report, ensure_ascii=False)
    hardest = json.loads((tmp_path / "run" / "hardest_rows.json").read_text(encoding="utf-8"))["default"]
    assert all(os.fsdecode(b"\xe4") in row["origin"] for row in hardest)
    api.predict(tmp_path / "run", tmp_path / "d" / "red", tmp_path / "out.jsonl", ["default"], device="cpu")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(found) == 5
