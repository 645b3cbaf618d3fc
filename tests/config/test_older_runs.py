"""A run folder whose config.yaml has settings by their old names loads; a file that somebody writes now is told the new name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lorabank.config.flags import parse_train_arguments
from lorabank.config.parse import load_config
from lorabank.config.train import DataConfig, TrainConfig
from lorabank.errors import ConfigError

OLD = {
    "model": "m",
    "data": {"train": "rows.jsonl"},
    "images": {"bad_rows": "drop"},
    "speech": {"bad_rows": "refuse", "long_audio": "skip"},
    "synthesis": {"bad_rows": "skip"},
    "detection": {"bad_pictures": "drop"},
    "diffusion": {"bad_pictures": "stop", "no_caption": "skip"},
}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("text-generation", "drop"),
        ("automatic-speech-recognition", "stop"),
        ("text-to-image", "stop"),
        ("object-detection", "drop"),
    ],
)
def test_an_older_run_folder_loads(task: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**OLD, "task": task}))
    config, _ = load_config(tmp_path)
    assert config.data.bad_rows == expected
    own = {"automatic-speech-recognition": config.speech.long_audio, "text-to-image": config.diffusion.no_caption}
    assert own.get(task, "drop") == "drop"
    resumed = parse_train_arguments([str(tmp_path), "--resume"]).config
    assert resumed == replace(config, output=str(tmp_path))
    with pytest.raises(ConfigError, match=r"is `data\.bad_rows` now"):
        load_config(tmp_path / "config.yaml")


def test_an_older_run_that_had_settings_of_another_task_loads(tmp_path: Path) -> None:
    """They were ignored; a file that has them now is refused."""
    tree = {"model": "m", "task": "text-classification", "data": {"train": "rows.jsonl"}, "speech": {"beams": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path)[0] == TrainConfig(model="m", task="text-classification", data=DataConfig(train="rows.jsonl"))
    with pytest.raises(ConfigError, match=r"speech\.beams: is for automatic-speech-recognition"):
        load_config(tmp_path / "config.yaml")
