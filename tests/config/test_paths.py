"""What exists here is named by its absolute path; ids and the output stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabank.config.parse import config_from_dict
from lorabank.config.paths import expanded, with_absolute_paths
from lorabank.errors import ConfigError, DataError


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
    tasks = {"text-to-speech": {"synthesis": {"vocoder": "../old"}}, "object-detection": {"detection": {"images": "../sub"}}}
    speech, detection = (
        with_absolute_paths(config_from_dict({"model": "m", "task": task, **section})[0]) for task, section in tasks.items()
    )
    assert (speech.synthesis.vocoder, detection.detection.images) == (str(tmp_path / "old"), str(tmp_path / "sub"))
    a, b = found.adapters.values()
    assert (a.init_from, a.val_data) == (str(tmp_path / "old"), str(tmp_path / "v.jsonl"))
    assert (a.data, b.data) == (None, "nowhere.jsonl")
    assert with_absolute_paths(found) == found


def test_the_output_begins_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = config_from_dict({"model": "m", "output": "~/runs/x"})
    assert with_absolute_paths(config).output == str(tmp_path / "runs" / "x")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    trees = {
        "model": {"model": name},
        "data.train": {"model": "m", "data": {"train": name}},
        "adapters.a.data": {"model": "m", "adapters": {"a": {"data": name}}},
    }
    for place, tree in trees.items():
        with pytest.raises(ConfigError, match=rf"^{place}: '[~a].* can't be a path here \(\w"):
            with_absolute_paths(config_from_dict(tree)[0])
    with pytest.raises(DataError, match=r"^--data: "):
        expanded(name, place="--data", kind=DataError)
