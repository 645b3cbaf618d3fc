"""A run folder whose config.yaml has settings by their old names loads; a file that somebody writes now is told the new name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorabank.config.parse import load_config
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
    assert (config.speech.long_audio, config.diffusion.no_caption) == ("drop", "drop")
    with pytest.raises(ConfigError, match=r"is `data\.bad_rows` now"):
        load_config(tmp_path / "config.yaml")
