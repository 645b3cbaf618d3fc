"""What is wrong with one adapter is told with that adapter's name, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorabank as lb
from lorabank.errors import ConfigError, DataError, TargetError
from tests.tasks.tiny import labelled_rows, tiny_bert
from tests.training.test_joint import Recorder
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


def test_few_held_out_rows_are_said_to_be_few(base_folder: Path) -> None:
    told = Recorder()
    settings: dict[str, Any] = {"model": str(base_folder), "max_steps": 1, "listeners": [told]}
    lb.train(**settings, data={"train": tiny_rows(48), "validation": tiny_rows(12, "town")[:2]})
    lb.train(**settings, data={"train": tiny_rows(48), "validation": tiny_rows(12, "town")})
    (said,) = [notice for notice in told.notices if "held out" in notice.text]
    assert said.adapter == "default"
    assert said.text.startswith("only 2 rows are held out, too few to choose the best step by")
    assert "data.val_split takes a larger share" in said.text


def test_labels_that_no_held_out_row_has_are_named(tmp_path: Path) -> None:
    told = Recorder()
    data = {"train": labelled_rows(30, ("good", "bad", "odd")), "validation": labelled_rows(12)}
    lb.train(model=str(tiny_bert(tmp_path / "bert")), task="text-classification", max_steps=1, listeners=[told], data=data)
    (said,) = [notice.text for notice in told.notices if "held-out" in notice.text]
    assert said.startswith("no held-out row has the label odd. ")
