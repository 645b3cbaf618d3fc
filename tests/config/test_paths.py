"""What exists here is named by its absolute path; ids and the output stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabank.config.parse import config_from_dict
from lorabank.config.paths import with_absolute_paths


def test_existing_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "old", "sub", "out"):
        (tmp_path / name).mkdir()
    for name in ("f.jsonl", "v.jsonl"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path / "sub")
    config, _ = config_from_dict(
        {
            "model": "../base",
            "output": "../out",
            "data": {"train": "../f.jsonl", "val": "org/rows:en:train"},
            "adapters": {"a": {"init_from": "../old", "val_data": "../v.jsonl"}, "b": {"data": "nowhere.jsonl"}},
        }
    )
    found = with_absolute_paths(config)
    assert (found.model, found.output) == (str(tmp_path / "base"), "../out")
    assert (found.data.train, found.data.val, found.data.test) == (str(tmp_path / "f.jsonl"), "org/rows:en:train", None)
    a, b = found.adapters.values()
    assert (a.init_from, a.val_data) == (str(tmp_path / "old"), str(tmp_path / "v.jsonl"))
    assert (a.data, b.data) == (None, "nowhere.jsonl")
    assert with_absolute_paths(found) == found
