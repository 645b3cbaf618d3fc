"""metrics.jsonl: deterministic lines, cut back to a checkpoint, whole after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorabank.errors import OutputError
from lorabank.training.events import Notice
from lorabank.training.metrics_file import CLOCK_KEYS, MetricsFile, count_lines, cut_back, read_metrics
from tests.training.events_for_tests import evaluation, plan, play, result, step


def test_one_object_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    play([file])
    assert len(read_metrics(file.path)) > 30, "every line is flushed"
    file.on_end(result(tmp_path))
    rows = read_metrics(file.path)
    assert [row["event"] for row in rows[:3]] == ["start", "eval", "step"]
    assert rows[-1]["event"] == "end"
    assert rows[2]["adapter"] == "formal"
    assert set(rows[2]["clock"]) == {"tokens_per_second", "seconds_left"} <= set(CLOCK_KEYS)
    assert all(row["pass_index"] >= 0 for row in rows)


def test_only_the_clock_differs_between_two_runs(tmp_path: Path) -> None:
    first, second = MetricsFile(tmp_path / "1.jsonl"), MetricsFile(tmp_path / "2.jsonl")
    first.on_step(step("formal", 1))
    second.on_step(replace(step("formal", 1), tokens_per_second=9.0, seconds_left=9.0))
    one, two = read_metrics(first.path)[0], read_metrics(second.path)[0]
    assert one != two
    assert {**one, "clock": 0} == {**two, "clock": 0}


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = MetricsFile(tmp_path / "whole.jsonl")
    play([whole])
    whole.on_end(result(tmp_path))
    cut = MetricsFile(tmp_path / "cut.jsonl")
    play([cut], last=11)
    lines = count_lines(cut.path)  # as the checkpoint of pass 11 has it
    for index in (12, 13, 14):
        cut.on_step(step("formal", index))
    with cut.path.open("a") as file:
        file.write('{"event": "step", "pass_in')  # in the middle of a line
    assert count_lines(cut.path) == lines + 3
    cut_back(cut.path, lines)
    assert max(row["pass_index"] for row in read_metrics(cut.path)) == 11
    again = MetricsFile(cut.path)
    play([again], first=12, resumed_from="checkpoints/step-11")
    again.on_end(result(tmp_path))
    assert cut.path.read_bytes() == whole.path.read_bytes()


def test_a_finished_run_that_goes_on_has_one_end(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    play([file])
    file.on_end(result(tmp_path))
    cut_back(file.path, count_lines(file.path) - 1)
    assert [row["event"] for row in read_metrics(file.path)].count("end") == 0
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_notices_before_the_start_are_written_once(tmp_path: Path) -> None:
    for resumed_from in (None, "checkpoints/step-20"):
        file = MetricsFile(tmp_path / "m.jsonl")
        file.on_notice(Notice(text="kept 1600 rows"))
        file.on_start(plan(resumed_from))
        file.on_notice(Notice(text=f"goes on from {resumed_from}"))
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [row["event"] for row in rows] == ["start", "notice", "notice", "notice"]
    assert [row["text"] for row in rows[1:]] == ["kept 1600 rows", "goes on from None", "goes on from checkpoints/step-20"]


def test_the_weights_stay_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_end(replace(result(tmp_path), trained={"formal": object()}))  # type: ignore[dict-item]
    assert "trained" not in read_metrics(file.path)[0]


def test_a_notice_belongs_to_its_pass(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(plan())
    file.on_notice(Notice(text="stopped", adapter="formal", pass_index=7))
    assert read_metrics(file.path)[-1] == {
        "event": "notice",
        "pass_index": 7,
        "text": "stopped",
        "adapter": "formal",
        "level": "info",
    }


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_eval(evaluation("formal", 1, float("nan"), best=False))
    text = file.path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_metrics(file.path)[0]["metrics"]["loss"] == "nan"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(OutputError, match="can't be written"):
        MetricsFile(tmp_path / "m.jsonl").on_step(step("formal", 1))
