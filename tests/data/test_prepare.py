"""From files to token rows and a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from lorabank.config.train import DataConfig
from lorabank.data.prepare import PreparedData, prepare
from lorabank.errors import DataError

NAMES = ["The Eagle", "Burger King", "The River", "City Shop", "Hello", "Japan"]


def pairs(names: list[str], copies: int = 2) -> list[dict[str, Any]]:
    return [{"mr": f"name[{name}]", "ref": f"{name} is place {n}."} for name in names for n in range(copies)]


def run(tokenizer: PreTrainedTokenizerFast, seed: int = 1, train: Any = None, val: Any = None, **config: Any) -> PreparedData:
    given = {"prompt": "{mr}", "completion": "{ref}", **config}
    return prepare(DataConfig(**given), tokenizer, seed=seed, train=train, val=val)


def test_csv_to_rows_split_by_group(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mr,ref\n" + "".join(f"{row['mr']},{row['ref']}\n" for row in pairs(NAMES)))
    config = DataConfig(train=str(path), prompt="{mr}", completion="{ref}", group_by="mr", val_split=2, test_split=2)
    data = prepare(config, chatml, seed=1)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 2)
    groups = [{row.group for row in part} for part in (data.train, data.val, data.test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert data.train[0].origin.startswith(f"{path}:")
    report = data.report
    assert (report.read, report.kept, report.splits) == (12, 12, {"train": 8, "val": 2, "test": 2})
    assert report.forms == {"template": 12}
    assert (report.prompts_with_several_answers, report.rows_with_several_answers) == (6, 12)
    assert not report.in_two_splits and not report.dropped and report.duplicates.count == 0


def test_without_groups_the_same_prompt_in_two_splits_is_reported(chatml: PreTrainedTokenizerFast) -> None:
    data = run(chatml, train=pairs(["The Eagle"], copies=10), val_split=3)
    assert data.report.in_two_splits["val and train"].count == 3
    assert len(data.report.in_two_splits["val and train"].origins) == 3


def test_copies_of_a_row_stay_in_one_split(chatml: PreTrainedTokenizerFast) -> None:
    data = run(chatml, train=pairs(NAMES) * 2, val_split=4)
    assert data.report.duplicates.count == 12
    assert not {row.input_ids for row in data.train} & {row.input_ids for row in data.val}


def test_dropped_rows_are_counted_with_their_lines(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [*pairs(NAMES), *({"mr": "x", "ref": ""} for _ in range(7)), {"mr": "x", "ref": float("nan")}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = run(chatml, train=path).report
    assert (report.read, report.kept) == (20, 12)
    empty = report.dropped["the completion is empty: column 'ref' holds nothing"]
    assert empty.count == 7 and empty.origins == tuple(f"{path}:{n}" for n in range(13, 18))
    assert report.dropped["column 'ref' is nan, expected text"].origins == (f"{path}:20",)


def test_nothing_left_is_an_error_with_the_reasons(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none of the 12 rows can be used:\n  - 12 × no trained token within max_length = 5"):
        run(chatml, train=pairs(NAMES), max_length=5)
    with pytest.raises(DataError, match="val data: none of the 1 rows"):
        run(chatml, train=pairs(NAMES), val=[{"mr": "a", "ref": ""}])


def test_sources(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(pairs(["Japan"])[0]))
    data = run(chatml, train=pairs(NAMES), val=pairs(["Hello"]), test=str(tmp_path / "test.jsonl"))
    assert (len(data.train), len(data.val), len(data.test)) == (12, 2, 1), "a source of its own leaves the training rows whole"
    assert data.report.in_two_splits["test and train"].count == 1
    with pytest.raises(DataError, match="no training data"):
        run(chatml)


def test_a_set_too_small_for_the_default_share(chatml: PreTrainedTokenizerFast) -> None:
    data = run(chatml, train=pairs(["Japan"], copies=1))
    assert len(data.train) == 1 and not data.val
    assert any("too few" in note for note in data.report.notes)
    with pytest.raises(DataError, match="val_split"):
        run(chatml, train=pairs(["Japan"], copies=1), val_split=1)


def test_the_same_seed_gives_the_same_rows(chatml: PreTrainedTokenizerFast) -> None:
    once, again, other = (run(chatml, seed=seed, train=pairs(NAMES), val_split=0.5) for seed in (1, 1, 2))
    assert (once.train, once.val) == (again.train, again.val)
    assert once.val != other.val


def test_progress_ends_at_the_total(chatml: PreTrainedTokenizerFast) -> None:
    calls: list[tuple[int, int]] = []
    rows = pairs(NAMES, copies=100)
    config = DataConfig(prompt="{mr}", completion="{ref}")
    prepare(config, chatml, seed=1, train=rows, progress=lambda done, total: calls.append((done, total)))
    assert [total for _, total in calls] == [600, 600] and [done for done, _ in calls] == [512, 600]


def test_report_in_numbers_and_in_words(chatml: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "a " * n}]} for n in range(1, 101)
    ]
    data = prepare(DataConfig(max_length=60, val_split=10), chatml, seed=1, train=[*rows, {"messages": []}])
    report = data.report
    lengths = sorted(len(row.input_ids) for row in data.train + data.val)
    assert (report.lengths.min, report.lengths.max) == (lengths[0], 60)
    assert report.lengths.p50 == lengths[50] and report.lengths.p90 == lengths[90]
    assert report.truncated.count == sum(row.truncated for row in data.train + data.val) > 0
    assert report.tokens["train"] == sum(len(row.input_ids) for row in data.train)
    trained = sum(sum(row.weights) for row in data.train + data.val)
    assert report.trained_share == pytest.approx(trained / sum(report.tokens.values()))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["dropped"]["column 'messages' is an empty list"] == {"count": 1, "origins": ["row 101 of the train rows given"]}
    console = Console(width=200, record=True, quiet=True)
    console.print(report)
    text = "\n".join(report.lines())
    assert "101 rows read (messages), 100 kept: 90 train, 10 val" in text
    assert "dropped 1: column 'messages' is an empty list (row 101 of the train rows given)" in text
    assert f"cut to max_length: {report.truncated.count}" in text


def test_thousands_of_rows_a_second(chatml: PreTrainedTokenizerFast) -> None:
    rows = pairs(NAMES, copies=300)
    start = time.process_time()
    run(chatml, train=rows)
    assert len(rows) / (time.process_time() - start) > 500, "measured about 3,000 rows a second of CPU time"


def test_a_missing_value_that_became_text_is_trained_and_noted(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mr,ref\n" + "".join(f"{row['mr']},{row['ref']}\n" for row in pairs(NAMES)) + "x,NaN\nnull,y\nno,the nan\n")
    report = prepare(DataConfig(train=str(path), prompt="Say {mr}", completion="{ref}"), chatml, seed=1).report
    assert (report.kept, report.dropped) == (15, {})
    ((note, rows),) = report.notes.items()
    assert "NaN, null or None" in note
    assert (rows.count, rows.origins) == (2, (f"{path}:14", f"{path}:15"))
