"""An adapter away from its run, and a model with one merged in, read and write as the run does: languages, prefix, beams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import lorabank as lb
from lorabank import api
from lorabank.cli import main
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError
from tests.tasks.seq2seq.tiny import mbart, sentences, t5, translation_rows
from tests.training.tiny import write_rows

Making = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
LANGUAGES = {"source_lang": "en_XX", "target_lang": "de_DE"}
CASES: dict[str, tuple[Making, dict[str, Any]]] = {
    "mbart": (lambda: mbart(fifty=False), LANGUAGES),
    "mbart-50": (mbart, {**LANGUAGES, "beams": 2}),
    "t5": (t5, {"source_lang": "en", "target_lang": "de", "prefix": "the german : "}),
}


def answers(source: Path, asked: Path, out: Path, name: str) -> list[str]:
    api.predict(source, str(asked), out, [name], device="cpu", options={"max_new_tokens": 6})
    return [json.loads(line)[name] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [[], ["--by-shard"]], ids=["whole", "by-shard"])
def test_alone_and_merged_it_writes_as_in_its_run(case: str, way: list[str], tmp_path: Path, capsys: Any) -> None:
    make, settings = CASES[case]
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    for part in make():
        part.save_pretrained(base)
    rows = write_rows(tmp_path / "rows.jsonl", translation_rows(36))  # type: ignore[arg-type]
    lb.train(
        task="translation",
        model=str(base),
        output=str(run),
        data={"train": str(rows), "val_split": 6},
        seq2seq=settings,
        batch_size=8,
        learning_rate=1e-2,
        max_steps=48,
        eval={"every": 0, "samples": 0},
    )
    asked = write_rows(tmp_path / "asked.jsonl", [{"translation": {"en": english}} for english, _ in sentences(4)])  # type: ignore[list-item]
    in_run = answers(run, asked, tmp_path / "run.jsonl", "default")
    assert len({*in_run} - {""}) > 1
    shutil.copytree(run / "default", tmp_path / "alone")
    assert answers(tmp_path / "alone", asked, tmp_path / "alone.jsonl", "alone") == in_run

    capsys.readouterr()
    assert main(["merge", str(run / "default"), "--output", str(merged), "--device", "cpu", *way]) == 0
    assert f"used with, as in training: source_lang {settings['source_lang']!r}" in capsys.readouterr().out
    assert answers(merged, asked, tmp_path / "merged.jsonl", "base") == in_run
    held = DataConfig(test=str(rows))
    named = ((run, "default"), (merged, "base"))
    scored = [api.evaluate(folder, held, [name], metrics=["loss"], device="cpu") for folder, name in named]
    assert scored[1]["base"]["loss"] == pytest.approx(scored[0]["default"]["loss"], rel=1e-4)

    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(merged)
    for (english, _), ours in zip(sentences(4), in_run, strict=True):
        with torch.no_grad():
            found = model.generate(
                **tokenizer(settings.get("prefix", "") + english, return_tensors="pt"), max_new_tokens=6, early_stopping=False
            )
        assert tokenizer.decode(found[0], skip_special_tokens=True).strip() == ours


def test_what_a_merged_model_is_for_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "lorabank_task.json").write_text('{"task": "translation", "settings": {"beems": 2}}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"lorabank_task.json: what the merged model is for can't be read \(.*beems"):
        api.load_run(tmp_path)


def test_a_base_by_itself_is_told_its_languages(tmp_path: Path, capsys: Any) -> None:
    for part in mbart():
        part.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", translation_rows(6))  # type: ignore[arg-type]
    words = ["eval", str(tmp_path / "base"), "--task", "translation", "--data", str(rows), "--device", "cpu"]
    assert main(words) == 2
    assert "--source-lang: " in (said := capsys.readouterr().err) and "say which: " in said
    languages = ["--source-lang", "en_XX", "--target-lang", "de_DE"]
    assert main([*words, *languages]) == 0
    answered = ["predict", str(tmp_path / "base"), "--task", "translation", "--data", str(rows), "--device", "cpu", *languages]
    assert main([*answered, "--output", str(tmp_path / "out.jsonl"), "--max-rows", "2"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert main([*words[:3], "text-classification", *words[4:], *languages]) == 2
    assert "--source-lang: is for summarization, translation, text2text-generation, and this" in capsys.readouterr().err
    settings: dict[str, Any] = {"max_steps": 1, "eval": {"every": 0, "samples": 0}, "seq2seq": LANGUAGES}
    lb.train(task="translation", model=str(tmp_path / "base"), data=str(rows), output=str(tmp_path / "run"), **settings)
    assert main(["eval", str(tmp_path / "run"), "--data", str(rows), "--device", "cpu", *languages]) == 2
    assert "--source-lang: is for a base model by itself" in capsys.readouterr().err
