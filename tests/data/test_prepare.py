"""From files to token rows and a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
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
    report = run(chatml, train=path, nan_rows="drop").report
    assert (report.read, report.kept) == (20, 12)
    empty = report.dropped["the completion is empty: column 'ref' holds nothing"]
    assert empty.count == 7 and empty.origins == tuple(f"{path}:{n}" for n in range(13, 18))
    assert report.dropped["column 'ref' holds NaN"].origins == (f"{path}:20",)
    assert any("dropped 1: column 'ref' holds NaN" in line for line in report.lines())


def nan_files(folder: Path) -> dict[str, tuple[Any, list[str]]]:
    """Sources with NaN in `ref` of rows 3 and 9, and in `mr` of row 5: name to source and the origins of those rows."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = pairs(NAMES)
    rows[2]["ref"] = rows[8]["ref"] = rows[4]["mr"] = float("nan")
    jsonl, parquet = folder / "a.jsonl", folder / "a.parquet"
    jsonl.write_text("\n".join(json.dumps(row) for row in rows))
    # Arrow's columns have one type, so a NaN beside texts can't be: whole files of numbers have it
    numbers = [{"mr": float("nan") if n == 4 else float(n), "ref": float("nan") if n in (2, 8) else float(n)} for n in range(12)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbers), parquet)
    return {
        "JSON lines": (str(jsonl), [f"{jsonl}:{n}" for n in (3, 9, 5)]),
        "Parquet": (str(parquet), [f"row {n} of {parquet}" for n in (3, 9, 5)]),
        "datasets": (datasets.Dataset.from_list(numbers), [f"row {n} of the train rows given" for n in (3, 9, 5)]),
        "dicts": (rows, [f"row {n} of the train rows given" for n in (3, 9, 5)]),
    }


@pytest.mark.parametrize("kind", ["JSON lines", "Parquet", "datasets", "dicts"])
def test_nan_stops_with_the_rows_and_the_columns(kind: str, tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    source, (third, ninth, fifth) = nan_files(tmp_path)[kind]
    with pytest.raises(DataError) as caught:
        run(chatml, train=source)
    message = str(caught.value)
    assert "NaN, a missing value, in 3 of 12 rows" in message
    assert f"2 × column 'ref' holds NaN ({third}, {ninth})\n" in message
    assert f"1 × column 'mr' holds NaN ({fifth})\n" in message
    assert "set data.nan_rows to drop, which leaves them out and counts them" in message
    assert [setting.place for setting in caught.value.settings] == ["data.nan_rows"]
    report = run(chatml, train=source, nan_rows="drop").report
    assert report.kept == 9
    assert {reason: rows.origins for reason, rows in report.dropped.items()} == {
        "column 'ref' holds NaN": (third, ninth),
        "column 'mr' holds NaN": (fifth,),
    }


def test_nan_is_counted_over_all_rows_and_sources(chatml: PreTrainedTokenizerFast) -> None:
    train = pairs(NAMES, copies=200)
    for row in (*train[3:9], train[-1]):  # the last lies in another chunk
        row["ref"] = float("nan")
    val = [*pairs(["Hello"]), {"mr": "a", "ref": float("nan")}]
    with pytest.raises(DataError, match=r"in 8 of 1,203 rows.*\n.*8 × .*\(row 4 of the train rows given, .*row 9 of .*\)"):
        run(chatml, train=train, val=val)
    with pytest.raises(DataError, match=r"in 1 of 15 rows.*\n.*\(row 3 of the val rows given\)"):
        run(chatml, train=pairs(NAMES), val=val)


def test_rows_are_not_tokenised_once_there_is_nan(chatml: PreTrainedTokenizerFast) -> None:
    calls: list[int] = []
    rows = pairs(NAMES, copies=300)
    rows[600]["ref"] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        prepare(
            DataConfig(prompt="{mr}", completion="{ref}"), chatml, seed=1, train=rows, progress=lambda done, _: calls.append(done)
        )
    assert calls == [512], "the chunks before it, and no more"


def test_nan_in_a_column_that_is_not_used_is_no_matter(chatml: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "score": float("nan")} for row in pairs(NAMES)]
    assert run(chatml, train=rows).report.kept == 12
    with pytest.raises(DataError, match="12 × column 'score' holds NaN"):
        run(chatml, train=rows, group_by="score")


def test_nothing_left_is_an_error_with_the_reasons(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none of the 12 rows can be used:\n  - 12 × no trained token within max_length = 5"):
        run(chatml, train=pairs(NAMES), max_length=5)
    with pytest.raises(DataError, match="val data: not the only row"):
        run(chatml, train=pairs(NAMES), val=[{"mr": "a", "ref": ""}])


def test_rows_that_cannot_be_used_stop_it_where_that_is_asked_for(chatml: PreTrainedTokenizerFast) -> None:
    rows = [*pairs(NAMES), *({"mr": f"a {i}", "ref": ""} for i in range(22)), {"mr": "word " * 99, "ref": "late"}]
    empty = "the completion is empty: column 'ref' holds nothing"
    long = "no trained token within max_length = 50: the prompt alone fills it"
    dropped = run(chatml, train=rows, max_length=50).report.dropped
    assert {why: rows.count for why, rows in dropped.items()} == {empty: 22, long: 1}
    with pytest.raises(DataError) as caught:
        run(chatml, train=rows, bad_rows="stop", max_length=50)
    message = str(caught.value)
    assert message.startswith(f"data: 23 of 35 rows can't be used:\n  - 22 × {empty} (row 13 of the train rows given, ")
    assert f"row 32 of the train rows given, …)\n  - 1 × {long}" in message, "twenty are named"
    assert message.endswith("set data.bad_rows to drop, which leaves them out and counts them.")
    assert run(chatml, train=pairs(NAMES), bad_rows="stop").report.kept == 12


def test_rows_to_be_scored_are_test_rows(tmp_path: Path, chatml: PreTrainedTokenizerFast) -> None:
    import datasets

    parts = {"train": pairs(NAMES), "test": pairs(["one", "two"])}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "both")
    found = run(chatml, test=str(tmp_path / "both"))
    assert (found.train, found.val, len(found.test)) == ([], [], len(parts["test"]))
    assert found.report.lines()[0].endswith(f"{len(parts['test'])} test")
    with pytest.raises(DataError, match="test data: not the only row can be used"):
        datasets.Dataset.from_list([{"mr": "a", "ref": ""}]).save_to_disk(tmp_path / "bad")
        run(chatml, test=str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"no training data: set data\.train to a file"):
        run(chatml, val=pairs(NAMES))


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
