"""A disk that fills up: training goes on, older checkpoints stay, and what couldn't be saved can be saved later."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import lorabank as lb
from lorabank.errors import OutputError
from lorabank.training.events import StepRecord
from lorabank.training.metrics_file import MetricsFile
from tests.training.test_joint import Recorder
from tests.training.tiny import assert_same_run, lines_without_clock, tiny_model, tiny_rows


class FullBetween(Recorder):
    """No file may grow beyond `size` bytes from the pass `first` up to the pass `last`."""

    def __init__(self, first: int, last: int, size: int) -> None:
        super().__init__()
        self.first, self.last, self.size = first, last, size

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if record.pass_index == self.first:
            _limit(self.size)
        if record.pass_index == self.last:
            _limit(resource.RLIM_INFINITY)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def no_limit_afterwards() -> Iterator[None]:
    try:
        yield
    finally:
        _limit(resource.RLIM_INFINITY)


def train(tokenizer: PreTrainedTokenizerFast, told: Recorder, **more: Any) -> Any:
    settings = {"max_steps": 12, "batch_size": 4, "learning_rate": 5e-3, "save": {"every": 3, "keep": 9}, "eval": {"every": 0}}
    return lb.train(
        model=tiny_model(),
        tokenizer=tokenizer,
        data=tiny_rows(),
        adapters={"a": {"rank": 8}},
        output="out",
        listeners=[told],
        **{**settings, **more},
    )


@pytest.fixture
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    train(tokenizer, Recorder())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "whole" / "out"


def test_a_checkpoint_that_finds_no_room(whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told = FullBetween(5, 10, 20_000)
    with no_limit_afterwards():
        result = train(tokenizer, told)
    assert result.adapters["a"].status == "finished"
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-12", "step-3"]
    warnings = [notice.text for notice in told.notices if notice.level == "warning"]
    assert [text.split(":")[0] for text in warnings] == ["no checkpoint at pass 6", "no checkpoint at pass 9"]
    assert all("Training goes on" in text for text in warnings)
    assert (tmp_path / "out" / "a" / "adapter_model.safetensors").read_bytes() == (
        whole / "a" / "adapter_model.safetensors"
    ).read_bytes()


def test_no_room_at_the_end(whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with no_limit_afterwards(), pytest.raises(OutputError, match=r"last checkpoint: lorabank\.train\(.*resume=True\) saves it"):
        train(tokenizer, FullBetween(11, -1, 20_000))
    assert not (tmp_path / "out" / "a" / "adapter_model.safetensors").exists()
    result = train(tokenizer, Recorder(), resume=True)
    assert result.adapters["a"].status == "finished"
    assert_same_run(tmp_path / "out", whole)


def test_metrics_wait_for_room(whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told = FullBetween(4, 8, 1_000)
    with no_limit_afterwards():
        train(tokenizer, told)
    assert sum("metrics.jsonl" in notice.text for notice in told.notices) == 1
    steps = [line["step"] for line in lines_without_clock(tmp_path / "out" / "metrics.jsonl") if line["event"] == "step"]
    assert steps == list(range(1, 13)), "none is lost, none is cut"


def test_metrics_that_never_find_room(tmp_path: Path) -> None:
    from tests.training.events_for_tests import result, step

    file = MetricsFile(tmp_path / "m.jsonl", on_full=lambda text: None)
    end = result(tmp_path)
    with no_limit_afterwards():
        _limit(10)
        file.on_step(step("formal", 1))
        with pytest.raises(OutputError, match="can't be written"):
            file.on_end(end)
    assert (tmp_path / "m.jsonl").read_bytes() == b""
