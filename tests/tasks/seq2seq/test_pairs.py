"""Rows as sources and targets: which columns, which languages, and what becomes of rows that can't be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.config.train import DataConfig
from lorabank.data.row_report import Splits
from lorabank.errors import ConfigError, DataError
from lorabank.tasks.seq2seq.model import set_languages
from lorabank.tasks.seq2seq.rows import PairRow, prepare_pairs
from tests.tasks.seq2seq.tiny import mbart, summary_rows, t5, translation_rows
from tests.training.tiny import write_rows

TOKENIZER = t5()[1]


def prepared(rows: Any, *, prefix: str = "", **settings: Any) -> Splits[PairRow]:
    own = {key: settings.pop(key) for key in list(settings) if key in Seq2SeqConfig.__dataclass_fields__}
    data = DataConfig(**{"val_split": 0, **settings})
    return prepare_pairs(data, Seq2SeqConfig(**own), TOKENIZER, seed=1, prefix=prefix, train=rows)


def texts(found: Splits[PairRow]) -> list[tuple[str, str]]:
    return [(row.prompt_text, row.reference) for row in found.train]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("document", "summary"),
        ("article", "highlights"),
        ("dialogue", "summary"),
        ("source", "target"),
        ("prompt", "completion"),
        ("instruction", "output"),
    ],
)
def test_columns_by_name(source: str, target: str) -> None:
    found = prepared([{"id": 1, source: "the cat sat", target: "the cat"}])
    assert texts(found) == [("the cat sat", "the cat")]
    assert TOKENIZER.decode(list(found.train[0].input_ids)) == "the cat sat</s>"
    assert TOKENIZER.decode(list(found.train[0].target_ids)) == "the cat</s>"
    assert found.train[0].size == len(found.train[0].input_ids) + len(found.train[0].target_ids)


def test_columns_of_ones_own_and_templates() -> None:
    rows = [{"from": "the cat", "to": "die katze", "tone": "red"}]
    assert texts(prepared(rows, source="from", target="to")) == [("the cat", "die katze")]
    assert texts(prepared(rows, prompt="{tone} : {from}", completion="{to}")) == [("red : the cat", "die katze")]
    with pytest.raises(DataError, match=r"seq2seq.source: row 1 of .* no column 'form' \(did you mean 'from'\?\)"):
        prepared(rows, source="form", target="to")
    with pytest.raises(DataError, match=r"no columns of source and target.*'from', 'to', 'tone'.*seq2seq.source"):
        prepared(rows)
    with pytest.raises(ConfigError, match="go together"):
        prepared(rows, source="from")


def test_translations_by_language() -> None:
    rows = translation_rows(1)
    assert texts(prepared(rows, source_lang="en", target_lang="de"))[0][1].startswith("die katze")
    assert texts(prepared(rows, source_lang="de_DE", target_lang="en_XX"))[0][1].startswith("the cat")
    with pytest.raises(DataError, match=r"column 'translation' holds 'en', 'de'. Say which .*seq2seq.source_lang"):
        prepared(rows)
    with pytest.raises(DataError, match=r"they are 'en' and 'fr'"):
        prepared(rows, source_lang="en", target_lang="fr")
    flat = [dict(rows[0]["translation"])]
    assert texts(prepared(flat, source_lang="en", target_lang="de")) == texts(prepared(rows, source_lang="en", target_lang="de"))


def test_a_prefix_is_read_and_not_shown() -> None:
    found = prepared(summary_rows(2), prefix="summarize : ")
    assert TOKENIZER.decode(list(found.train[0].input_ids)).startswith("summarize : the cat")
    assert found.train[0].prompt_text.startswith("the cat")
    assert "before every source: 'summarize : '" in found.report.facts


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"document": "the cat", "summary": "cat"},
        {"document": " ", "summary": "cat"},
        {"document": "the cat", "summary": None},
        {"document": ["the cat"], "summary": "cat"},
        {"document": "the dog", "summary": ""},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepared(str(file))
    assert {reason: dropped.origins for reason, dropped in found.report.dropped.items()} == {
        "column 'document' is empty": (f"{file}:2",),
        "column 'summary' is missing": (f"{file}:3",),
        "column 'document': expected text, got list": (f"{file}:4",),
        "column 'summary' is empty": (f"{file}:5",),
    }
    with pytest.raises(DataError, match=r"4 of 5 rows can't be used(.|\n)*rows.jsonl:2"):
        prepared(str(file), bad_rows="stop")
    with pytest.raises(DataError, match="NaN"):
        prepared([{"document": "the", "summary": math.nan}])
    with pytest.raises(DataError, match="not the only row can be used"):
        prepared([{"document": "", "summary": "cat"}])
    with pytest.raises(DataError, match="turns of a chat, where a source and a target were expected"):
        prepared([{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]}])


def test_long_texts_are_cut_and_counted() -> None:
    rows = [{"document": "the cat " * 20, "summary": "the dog " * 20}]
    found = prepared(rows, max_length=8, max_target_length=5)
    assert (len(found.train[0].input_ids), len(found.train[0].target_ids)) == (8, 5)
    assert found.train[0].target_ids[-1] == TOKENIZER.eos_token_id, "its end stays"
    assert {"source cut to 8 tokens", "target cut to 5 tokens"} <= set(found.report.notes)


def test_equal_sources_stay_together() -> None:
    rows = [{"document": f"the {word}", "summary": f"{word} {i}"} for word in ("cat", "dog", "mat", "hill") for i in range(4)]
    found = prepared(rows, val_split=5)
    assert len(found.val) == 4
    assert not {row.prompt_text for row in found.val} & {row.prompt_text for row in found.train}


def test_sources_in_splits_that_are_given_apart_are_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "val.jsonl", [{"document": "the cat sat", "summary": "cat"}])
    rows = [{"document": text, "summary": "cat"} for text in ("the dog", "the cat sat")]
    assert prepared(rows, val=str(file)).report.notes["same source in val and train"].origins == (f"{file}:1",)


def test_codes_of_languages() -> None:
    tokenizer = mbart()[1]
    with pytest.raises(ConfigError, match=r"seq2seq.source_lang: MBart50Tokenizer has a code for each language.*ar_AR"):
        set_languages(tokenizer, Seq2SeqConfig())
    with pytest.raises(ConfigError, match=r"seq2seq.target_lang: 'de_D' is no language of .*did you mean 'de_DE'"):
        set_languages(tokenizer, Seq2SeqConfig(source_lang="en_XX", target_lang="de_D"))
    set_languages(tokenizer, Seq2SeqConfig(source_lang="en_XX", target_lang="de_DE"))
    assert tokenizer.decode(tokenizer(text_target="die katze")["input_ids"]).startswith("de_DE")
    set_languages(TOKENIZER, Seq2SeqConfig())
