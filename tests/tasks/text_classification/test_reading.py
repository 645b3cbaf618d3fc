"""Rows with labels: which columns, which labels, and what becomes of rows that can't be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorabank.config.classification import ClassificationConfig
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.text_classification.labels import MULTI, REGRESSION, SINGLE, LabelSet
from lorabank.tasks.text_classification.prepare import PreparedTexts, label_counts, prepare_texts
from tests.tasks.text_classification.tiny import mood_rows, words_tokenizer

TOKENIZER = words_tokenizer()


def prepared(rows: Any, *, val: Any = None, labels: LabelSet | None = None, seed: int = 1, **settings: Any) -> PreparedTexts:
    own = {key: settings.pop(key) for key in ("text", "text_pair", "label", "kind", "labels") if key in settings}
    return prepare_texts(
        DataConfig(**{"val_split": 0, **settings}),
        ClassificationConfig(**own),
        TOKENIZER,
        seed=seed,
        train=rows,
        val=val,
        known=[] if labels is None else [labels],
    )


def targets(found: PreparedTexts) -> list[Any]:
    return [found.labels.target(row.label) for row in found.train if row.label is not None]


def test_names_of_labels_and_their_order() -> None:
    found = prepared(mood_rows(8))
    assert found.labels == LabelSet(kind=SINGLE, names=("neg", "pos"))
    assert targets(found)[:4] == [1, 0, 1, 0]
    assert label_counts(found.train, found.labels) == {"neg": 4, "pos": 4}
    assert "2 labels: neg 4, pos 4" in found.report.facts
    backwards = prepared(mood_rows(8)[::-1])
    assert backwards.labels == found.labels, "the order is the alphabet's, not the rows'"
    given = prepared(mood_rows(8), labels=LabelSet(kind=SINGLE, names=("pos", "neg")))
    assert targets(given)[:4] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ("sentence1", "sentence2", "label"),
        ("premise", "hypothesis", "label"),
        ("question1", "question2", "label"),
        ("question", "sentence", "label"),
        ("text", "text_pair", "target"),
        ("query", "document", "category"),
    ],
)
def test_pairs_as_glue_and_others_call_them(first: str, second: str, label: str) -> None:
    rows = [{"idx": i, first: "the food", second: "is good and cheap", label: str(i % 2)} for i in range(4)]
    found = prepared(rows)
    assert found.report.facts[0] == f"columns: {first!r} as the text, {second!r} as the second text, {label!r} as the label"
    text = "[CLS] the food [SEP] is good and cheap [SEP]"
    assert TOKENIZER.decode(list(found.train[0].input_ids)) == text
    assert found.train[0].token_type_ids == (0, 0, 0, 0, 1, 1, 1, 1, 1)


def test_a_single_text_and_columns_by_name() -> None:
    rows = [{"body": "the food", "kind": "ab"[i % 2], "label": "x"} for i in range(4)]
    found = prepared(rows, text="body", label="kind")
    assert found.labels.names == ("a", "b")
    assert found.train[0].token_type_ids == (0, 0, 0, 0)
    with pytest.raises(DataError, match=r"classification.text: row 1 of .* has no column 'bodi' \(did you mean 'body'\?\)"):
        prepared(rows, text="bodi", label="kind")
    with pytest.raises(DataError, match=r"no column with the text.*Name it with classification.text"):
        prepared(rows)
    with pytest.raises(DataError, match=r"no column with the label.*'body', 'kind'.*Name it with classification.label"):
        prepared([{"body": "x", "kind": "a"}], text="body")


def test_numbers_as_labels_are_ordered_by_size() -> None:
    found = prepared([{"text": "good", "label": i % 12} for i in range(24)])
    assert found.labels.names == tuple(map(str, range(12)))
    assert targets(found)[:12] == list(range(12))
    text = prepared([{"text": "good", "label": str(i % 12)} for i in range(24)])
    assert text.labels == found.labels
    assert prepared([{"text": "good", "label": i % 2 == 0} for i in range(4)]).labels.names == ("false", "true")
    assert prepared([{"text": "good", "label": float(i % 2)} for i in range(4)]).labels.names == ("0", "1")


def test_names_of_a_data_set() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zwei", "eins", "drei"])})
    rows = datasets.Dataset.from_dict({"text": ["good", "bad", "a", "the"], "label": [0, 1, -1, 0]}, features=features)
    found = prepared(rows)
    assert found.labels.names == ("zwei", "eins", "drei"), "the data set's order, with labels that no row has"
    assert targets(found) == [0, 1, 0]
    assert found.report.dropped["no label in column 'label'"].origins == ("row 3 of the train rows given",)
    assert any("labels without a training row" in line and "'drei'" in line for line in found.report.lines())


def test_names_of_a_saved_data_set(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zwei", "eins"])})
    datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features).save_to_disk(str(tmp_path / "set"))
    assert prepared(str(tmp_path / "set")).labels.names == ("zwei", "eins")


def test_a_csv_file(tmp_path: Path) -> None:
    file = tmp_path / "sts.csv"
    file.write_text('sentence1,sentence2,score\nthe food,"the place, dear",3.80\na,b,5.0\ngood,bad,0\n', encoding="utf-8")
    found = prepared(str(file))
    assert found.labels == LabelSet(kind=REGRESSION, names=("score",))
    assert targets(found) == [3.8, 5.0, 0.0]
    assert found.report.facts[1] == "numbers from 0 to 5, mean 2.93"
    versions = tmp_path / "versions.csv"
    versions.write_text("text,label\ngood,1.5\nbad,beta\n", encoding="utf-8")
    assert prepared(str(versions)).labels.names == ("1.5", "beta"), "numbers among names are names, as they are written"


def test_whole_numbers_are_an_amount_where_the_user_says_so() -> None:
    rows = [{"text": "good", "stars": i % 5} for i in range(10)]
    found = prepared(rows, label="stars", kind=REGRESSION)
    assert found.labels == LabelSet(kind=REGRESSION, names=("stars",))
    assert targets(found)[4] == 4.0


def test_several_labels_a_row(tmp_path: Path) -> None:
    rows = [{"text": "good", "labels": ["b", "a"]}, {"text": "bad", "labels": []}, {"text": "the", "labels": ["c"]}]
    found = prepared(rows)
    assert found.labels == LabelSet(kind=MULTI, names=("a", "b", "c"))
    assert targets(found) == [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    file = tmp_path / "rows.csv"
    file.write_text('text,labels\ngood,"[""b"", ""a""]"\nbad,"[]"\nthe,"[""c""]"\n', encoding="utf-8")
    assert targets(prepared(str(file))) == targets(found)


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        {"text": "good", "label": "a"},
        {"text": "  ", "label": "a"},
        {"text": "bad", "label": None},
        {"text": "bad", "label": ""},
        {"text": "bad", "label": "b"},
        {"text": ["bad"], "label": "b"},
        {"label": "b"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = prepared(str(file))
    assert {reason: rows.origins for reason, rows in found.report.dropped.items()} == {
        "column 'text' is empty": (f"{file}:2",),
        "no label in column 'label'": (f"{file}:3", f"{file}:4"),
        "column 'text': expected text, got list": (f"{file}:6",),
        "column 'text' is missing": (f"{file}:7",),
    }
    assert (found.report.read, found.report.kept) == (7, 2)
    assert any(line.startswith("dropped 2: no label") for line in found.report.lines())
    with pytest.raises(DataError, match=r"5 of 7 rows can't be used:\n  - 2 × no label .*:3, .*:4\)(.|\n)*data.bad_rows to drop"):
        prepared(str(file), bad_rows="stop")


def test_rows_to_be_scored_are_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in mood_rows(6)), encoding="utf-8")
    labels = prepared([*mood_rows(6), {"text": "the", "label": "other"}]).labels
    found = prepared(None, labels=labels, test=str(file))
    assert (found.train, found.val, len(found.test)) == ([], [], 6)
    said = "\n".join(found.report.lines())
    assert "6 rows read, 6 kept: 6 test" in said and "train" not in said


def test_nan_stops_the_run_unless_it_may_be_dropped() -> None:
    rows = [{"text": "good", "score": 1.5}, {"text": "bad", "score": math.nan}, {"text": "the", "score": 2.5}]
    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 3 rows(.|\n)*column 'score' holds NaN \(row 2 of"):
        prepared(rows)
    found = prepared(rows, nan_rows="drop")
    assert targets(found) == [1.5, 2.5]
    assert found.report.dropped["column 'score' holds NaN"].count == 1


def test_the_word_nan_among_fractions_is_a_missing_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,score\ngood,1.5\nbad,NaN\nthe,2.5\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 3 rows(.|\n)*column 'score' holds NaN \(.*rows.csv:3"):
        prepared(str(file))
    found = prepared(str(file), nan_rows="drop")
    assert found.labels.kind == REGRESSION
    assert targets(found) == [1.5, 2.5]
    file.write_text("text,label\ngood,nan\nbad,NaN\nthe,2\n", encoding="utf-8")
    assert prepared(str(file)).labels.names == ("2", "NaN", "nan"), "a name among names"


def test_labels_that_the_head_lacks() -> None:
    for same in (["a", "a"], []):
        with pytest.raises(ConfigError, match=r"classification\.labels: expected different names"):
            ClassificationConfig(labels=same)
    rows, val = mood_rows(8), [{"text": "the food", "label": "poss"}, {"text": "the", "label": "pos"}]
    found = prepared(rows, val=val)
    reason = "the head has no label 'poss' (did you mean 'pos'?); it has 'neg', 'pos'"
    assert found.report.dropped[reason].origins == ("row 1 of the val rows given",)
    assert len(found.val) == 1
    with pytest.raises(DataError, match="the head has no label 'poss'"):
        prepared(rows, val=val, bad_rows="stop")
    with pytest.raises(DataError, match="val data: not the only row can be used"):
        prepared(rows, val=val[:1])


def test_one_label_only() -> None:
    with pytest.raises(DataError, match="every row is 'a' in column 'label', so there is nothing to tell apart"):
        prepared([{"text": "good", "label": "a"}, {"text": "bad", "label": "a"}])
    with pytest.raises(DataError, match=r"every row has the number 2.5"):
        prepared([{"text": "good", "score": 2.5}, {"text": "bad", "score": 2.5}])


def test_a_label_with_one_row_is_trained_on_and_named() -> None:
    rows = [{"text": f"{a} {b}", "label": "a" if b != "dear" else "b"} for a in ("good", "bad", "fast") for b in ("the", "cheap")]
    rows.append({"text": "it is dear", "label": "b"})
    for seed in range(6):
        found = prepared(rows, val_split=3, seed=seed)
        assert "b" in [row.label for row in found.train]
        assert len(found.val) == 3
    assert any("label 'b' has one training row" in line and "row 7 of" in line for line in found.report.lines())


def test_equal_texts_stay_together_and_contradictions_are_told() -> None:
    rows = [{"text": WORD, "label": label} for WORD in ("good", "bad", "the", "food", "is", "fast") for label in "ab"]
    found = prepared(rows, val_split=4)
    assert not {row.source.text for row in found.train} & {row.source.text for row in found.val}
    assert found.report.notes["same text, another label"].count == 6


def test_texts_in_splits_that_are_given_apart_are_told() -> None:
    rows = mood_rows(6)
    found = prepared(rows, val=[rows[4], {"text": "we like it", "label": "pos"}])
    assert found.report.notes["same text in val and train"].origins == ("row 1 of the val rows given",)
    assert "same text in val and train" not in prepared(rows, val_split=2).report.notes


def test_long_rows_are_cut_the_longer_text_first() -> None:
    rows = [{"premise": "the food " * 10, "hypothesis": "is good", "label": i % 2} for i in range(2)]
    found = prepared(rows, max_length=10)
    assert len(found.train[0].input_ids) == 10
    assert TOKENIZER.decode(list(found.train[0].input_ids)).endswith("[SEP] is good [SEP]")
    assert found.report.notes["cut to 10 tokens"].count == 2


def test_the_order_of_splits_is_the_seeds() -> None:
    one, two = (prepared(mood_rows(40), val_split=0.05, seed=1) for _ in range(2))
    assert [row.origin for row in one.val] == [row.origin for row in two.val]
    assert len(one.val) == 2


def test_a_slip_in_a_column_of_numbers_makes_no_names_of_them() -> None:
    """One `n/a` among fractions: a head of a label a number would train without a word."""
    rows = [{"text": f"the text {i}", "label": f"{i / 10}" if i % 3 else f"{i}.0"} for i in range(12)]
    rows[4]["label"], rows[9]["label"] = "n/a", "4,5"
    with pytest.raises(DataError, match=r"10 of its labels are numbers, some with a fraction, and 2 are not: 'n/a' .*'4,5' "):
        prepared(rows)
    found = prepared(rows, kind=REGRESSION)
    assert len(found.train) == 10 and {error.count for error in found.report.dropped.values()} == {2}
    assert len(prepared(rows, kind=SINGLE).labels.names) == 12
    few = [{"text": f"the text {i}", "label": label} for i, label in enumerate(["3.11", "3.12", "other", "none", "3.11", "none"])]
    assert prepared(few).labels.names == ("3.11", "3.12", "none", "other")


def test_a_number_beyond_fp32_is_a_bad_row() -> None:
    rows = [{"text": f"the text {i}", "label": i / 8} for i in range(8)] + [{"text": "much", "label": 1e40}]
    found = prepared(rows)
    assert len(found.train) == 8
    assert [*found.report.dropped] == ["column 'label': 1e+40 is more than a model can count (fp32, up to 3.4e+38)"]


def test_a_list_of_labels_that_misses_those_of_the_rows() -> None:
    with pytest.raises(DataError, match=r"others are: 4 × 'neg' \(did you mean 'ne'\?\)\. The list, .*labels, has 'pos', 'ne'"):
        prepare_texts(
            DataConfig(val_split=0), ClassificationConfig(labels=("pos", "ne")), TOKENIZER, seed=1, train=mood_rows(8), known=[]
        )


def test_all_bad_rows_are_named_at_once() -> None:
    """Those without a text, and those whose label the list lacks, which is known later."""
    rows = [*mood_rows(8), {"text": "", "label": "pos"}, {"text": "x", "label": "odd"}]
    config = ClassificationConfig(labels=("pos", "neg"))
    with pytest.raises(DataError, match=r"2 of 10 rows can't be used:\n(.*\n)*.*no label 'odd'") as told:
        prepare_texts(DataConfig(val_split=0, bad_rows="stop"), config, TOKENIZER, seed=1, train=rows, known=[])
    assert "column 'text' is empty" in str(told.value)


def test_words_for_a_missing_value_are_told_and_halves_of_a_character_are_bad_rows() -> None:
    rows = [*mood_rows(8), {"text": "None", "label": "pos"}, {"text": "seen", "label": "NaN"}]
    found = prepared([*rows, {"text": "x", "label": "bad \ud83d"}, {"text": "bad \ud83d end", "label": "pos"}])
    note = found.report.notes["the whole text of a column is NaN, null or None, which is trained as that word"]
    assert note.count == 2 and len(found.train) == 10
    assert {reason.partition(" holds")[0] for reason in found.report.dropped} == {"column 'label'", "column 'text'"}


def test_the_columns_are_those_of_most_rows_not_of_the_first() -> None:
    pairs = [{"text": f"the food {i}", "text_pair": "is dear", "label": "ab"[i % 2]} for i in range(12)]
    found = prepared([{"text": "alone", "label": "a"}, *pairs])
    assert {row.source.pair for row in found.train} == {"is dear"} and len(found.train) == 12
    unlabelled = prepared([{"text": "alone"}, *mood_rows(8)])
    assert len(unlabelled.train) == 8
