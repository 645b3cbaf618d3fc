"""What is wrong with one adapter is told with that adapter's name, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorabank as lb
from lorabank.errors import ConfigError, DataError, TargetError
from tests.training.tiny import tiny_rows, write_rows


def test_wrong_settings_name_their_adapter(base_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows(8))
    good: dict[str, Any] = {"model": str(base_folder), "data": str(rows)}
    with pytest.raises(TargetError, match=r"^adapters\.b\.targets: 'q_porj' matches no layer"):
        lb.train(**good, adapters={"a": {}, "b": {"targets": ["q_porj"]}})
    with pytest.raises(DataError, match=r"^adapters\.b\.data: no file or folder './rows.jsnl'"):
        lb.train(**good, adapters={"a": {}, "b": {"data": "./rows.jsnl"}})
    with pytest.raises(DataError, match=r"^adapters\.b\.val_data: no file or folder './rows.jsnl'"):
        lb.train(**good, adapters={"a": {}, "b": {"val_data": "./rows.jsnl"}})
    with pytest.raises(ConfigError, match=r"^eval\.metrics: metric 'rogue': expected one of"):
        lb.train(**{**good, "eval": {"metrics": ["rogue"]}})
