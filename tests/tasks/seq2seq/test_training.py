"""Encoder-decoders under the bank: trained jointly as alone, writing as they were trained, loaded, scored, resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lorabank as lb
from lorabank import api
from lorabank.config.train import DataConfig, TrainConfig
from lorabank.errors import ConfigError, DataError
from lorabank.tasks import task_kind
from lorabank.tasks.seq2seq.model import Beginning, Manner, beginning, decoder_inputs, write
from lorabank.training.data_sets import RowObjects
from lorabank.training.events import RunResult
from tests.tasks.seq2seq.tiny import bart, mbart, sentences, summary_rows, t5, translation_rows
from tests.training.test_joint import Recorder
from tests.training.tiny import files_of, write_rows

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
LANGUAGES = {"source_lang": "en_XX", "target_lang": "de_DE"}
BASES: dict[str, tuple[Callable[[], Pair], dict[str, str]]] = {
    "t5": (t5, {}),
    "bart": (bart, {}),
    "mbart": (lambda: mbart(fifty=False), LANGUAGES),
    "mbart-50": (mbart, LANGUAGES),
}
TRANSLATED = [{"source": english, "target": german} for english, german in sentences(36)]
ANIMALS = [{"source": row["document"], "target": row["summary"]} for row in summary_rows(36)]
BACKWARDS = [{"source": english, "target": " ".join(reversed(english.split()))} for english, _ in sentences(36)]
ROWS = {"german": TRANSLATED, "animal": ANIMALS, "backwards": BACKWARDS}


def run(base: str, names: list[str], **settings: Any) -> tuple[RunResult, Recorder]:
    told = Recorder()
    make, languages = BASES[base]
    model, tokenizer = make()
    common: dict[str, Any] = {
        "eps": 1e-5,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "seed": 3,
        "max_steps": 4,
        "eval": {"every": 2, "samples": 0, "metrics": ["loss", "chrf"], "max_new_tokens": 6},
        "seq2seq": languages,
    }
    result = lb.train(
        task="text2text-generation",
        model=model,
        tokenizer=tokenizer,
        data={name: ROWS[name] for name in names},
        adapters={name: {"rank": 4, "dropout": 0.1 if name == "german" else 0.0} for name in names},
        listeners=[told],
        **{**common, **settings},
    )
    return result, told


@pytest.mark.parametrize("base", BASES)
def test_three_adapters_together_as_alone(base: str) -> None:
    """Law 3, with what they write in the middle of it."""
    together, told = run(base, list(ROWS))
    for name in ROWS:
        alone, only = run(base, [name])
        for path, layer in together.trained[name].layers.items():
            torch.testing.assert_close(layer.delta(), alone.trained[name].layers[path].delta(), rtol=2e-3, atol=2e-5, msg=path)
        joint, own = ([r for r in each.evals if r.adapter == name] for each in (told, only))
        assert [r.step for r in joint] == [r.step for r in own] == [2, 4]
        for a, b in zip(joint, own, strict=True):
            assert a.metrics.keys() == {"loss", "chrf"}
            assert a.metrics == pytest.approx(b.metrics, rel=1e-3)


@pytest.mark.parametrize("base", ["t5", "mbart-50"])
def test_recomputed_it_is_the_same(base: str) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "eval": {"every": 0, "samples": 0}}
    plain, _ = run(base, ["animal"], **settings)
    again, _ = run(base, ["animal"], gradient_checkpointing=True, **settings)
    for path, layer in plain.trained["animal"].layers.items():
        torch.testing.assert_close(layer.delta(), again.trained["animal"].layers[path].delta(), rtol=1e-4, atol=1e-6, msg=path)


def test_the_loss_is_the_models_own() -> None:
    """transformers' loss over the batch is the mean over its target tokens; ours are sums a row."""
    for make, languages in BASES.values():
        model, tokenizer = make()
        task = opened(model, tokenizer, seq2seq=languages)
        rows = task.read(task.config, RowObjects(train=TRANSLATED[::7])).by_adapter["default"].train
        batch = task.batch([[row] for row in rows], ["x"] * len(rows), examples=range(len(rows)), draws=[0] * len(rows))
        with torch.no_grad():
            sums = batch.loss(model, batch.inputs, batch.targets)
            inputs = {key: value for key, value in batch.inputs.items() if key != "decoder_input_ids"}
            expected = model(**inputs, labels=batch.targets["labels"]).loss
        assert float(sums.sum() / sum(batch.weights)) == pytest.approx(float(expected), rel=1e-5)
        assert len({len(row.target_ids) for row in rows}) > 1
        for i, row in enumerate(rows):  # a row's own loss doesn't see its neighbours' lengths
            alone = task.batch([[row]], ["x"], examples=[0], draws=[0])
            with torch.no_grad():
                mine = alone.loss(model, alone.inputs, alone.targets)
            assert float(mine) == pytest.approx(float(sums[i]), rel=1e-4)


def test_how_an_answer_begins() -> None:
    """As what was trained: the pad token (T5), the start of text (BART), the language at one end or the other (mBART)."""
    for (make, languages), start, forced in zip(
        BASES.values(), ("<pad>", "</s>", "de_DE", "</s>"), (None, "<s>", None, "de_DE"), strict=True
    ):
        model, tokenizer = make()
        opened(model, tokenizer, seq2seq=languages)
        found = beginning(model, tokenizer)
        named: Any = tokenizer.convert_tokens_to_ids
        assert found == Beginning(start=named(start), forced=None if forced is None else named(forced))


def test_decoder_inputs_of_a_class_without_its_own_function() -> None:
    model, _ = t5()
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    own = decoder_inputs(model, labels)
    assert own.tolist() == [[0, 5, 6], [0, 7, 1]]


@pytest.mark.parametrize("base", ["t5", "mbart-50"])
def test_each_row_is_written_by_its_own_adapter(base: str) -> None:
    """It learns; and a mixed batch writes what each adapter writes alone."""
    result, _ = run(
        base,
        ["animal", "backwards"],
        max_steps=60,
        learning_rate=1e-2,
        eval={"every": 0, "metrics": ["exact_match"], "max_new_tokens": 12},
    )
    make, languages = BASES[base]
    model, tokenizer = make()
    task = opened(model, tokenizer, seq2seq=languages)
    bank = lb.attach(model)
    for name, adapter in result.trained.items():
        bank.load(name, adapter)
    engine = task.engine(bank)
    rows = task.read(task.config, RowObjects(train=ANIMALS[:3])).by_adapter["default"].train
    jobs = [(name, row) for row in rows for name in ("animal", "base", "backwards")]
    mixed = task._texts(engine, jobs, 12)
    assert mixed == [task._texts(engine, [job], 12)[0] for job in jobs]
    assert mixed[0::3] == ["cat", "dog", "cat"]
    assert result.adapters["animal"].final_metrics["exact_match"] > result.base_metrics_of["animal"]["exact_match"]


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_beams_are_those_of_the_model_with_one_adapter(base: str) -> None:
    """A batch of three adapters and the base: each row has the text that transformers' beams find over its adapter alone."""
    make, _ = BASES[base]
    model, tokenizer = make()
    task = opened(model, tokenizer, seq2seq={"beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2})
    bank = lb.attach(model)
    for seed, name in enumerate("abc"):
        bank.add(name, lb.AdapterConfig(rank=4), seed=seed)
        for index, p in enumerate(bank.parameters(name)):
            with torch.no_grad():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * index + seed)))
    rows = task.read(task.config, RowObjects(train=ANIMALS[:4])).by_adapter["default"].train
    jobs = [(name, row) for row in rows for name in ("a", "base", "b", "c")]
    mixed = task._texts(task.engine(bank), jobs, 8)
    assert len(set(mixed)) > 4
    differs = 0
    for (name, row), text in zip(jobs, mixed, strict=True):
        given = {"input_ids": torch.tensor([row.input_ids]), "decoder_start_token_id": task.begin.start}
        said = {"max_new_tokens": 8, "max_length": None, "min_length": 0, "forced_bos_token_id": task.begin.forced}
        own = {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2, "early_stopping": False}
        with torch.no_grad(), bank.route(lb.BASE if name == "base" else name):
            found: Any = [model.generate(**given, **said, **more) for more in (own, {"num_beams": 1})]
        beams, greedy = (tokenizer.decode(each[0], skip_special_tokens=True).strip() for each in found)
        assert text == beams
        differs += beams != greedy
    assert differs


def opened(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Any:
    from lorabank.config.seq2seq import Seq2SeqConfig

    config = TrainConfig(
        task="text2text-generation", data=DataConfig(val_split=0), seq2seq=Seq2SeqConfig(**settings.get("seq2seq", {}))
    )
    return task_kind("text2text-generation").open(config, model, tokenizer, {})


@pytest.mark.parametrize("base", ["bart", "mbart-50"])
def test_texts_end_where_the_model_has_no_more_positions(base: str) -> None:
    scored = {"every": 2, "samples": 0, "metrics": ["loss", "chrf"], "max_new_tokens": 128}  # the usual; there are 48 positions
    result, _ = run(base, ["animal"], max_steps=1, eval=scored)
    assert "chrf" in result.adapters["animal"].best_metrics


def test_prefixes_that_a_model_knows() -> None:
    params = {"summarization": {"prefix": "summarize : "}, "translation_en_to_de": {"prefix": "translate the to die : "}}
    model, tokenizer = t5(task_specific_params=params)
    make: Any = lambda name, **own: task_kind(name).open(config_of(name, **own), model, tokenizer, {})  # noqa: E731
    assert make("summarization").prefix == "summarize : "
    assert make("translation", source_lang="en", target_lang="de").prefix == "translate the to die : "
    assert make("text2text-generation").prefix == ""
    assert make("summarization", prefix="").prefix == ""


def config_of(task: str, **settings: str) -> TrainConfig:
    from lorabank.config.seq2seq import Seq2SeqConfig

    return TrainConfig(task=task, data=DataConfig(val_split=0), seq2seq=Seq2SeqConfig(**settings))


def test_a_decoder_is_refused_and_sent_to_its_task() -> None:
    from tests.training.tiny import tiny_model, tiny_tokenizer

    with pytest.raises(
        ConfigError, match="LlamaForCausalLM is no encoder-decoder.*task text-generation".replace(".*", r"(.|\n)*")
    ):
        lb.train(task="summarization", model=tiny_model(), tokenizer=tiny_tokenizer(), data=summary_rows(4))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "mbart"
    model, tokenizer = mbart()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_from_files_to_predictions_and_back(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of `translation` from files; its folder is loaded, scored, and writes; interrupted it ends with the same bytes."""
    rows = write_rows(tmp_path / "rows.jsonl", translation_rows(36))  # type: ignore[arg-type]

    def settings(folder: str) -> dict[str, Any]:
        return {
            "task": "translation",
            "model": str(base_folder),
            "output": str(tmp_path / folder),
            "data": {"train": str(rows), "val_split": 6},
            "adapters": {"small": {"rank": 2, "dropout": 0.1}, "large": {"rank": 8}},
            "seq2seq": LANGUAGES,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "eval": {"every": 2, "metrics": ["loss", "bleu"], "max_new_tokens": 6, "samples": 2},
            "save": {"every": 2, "keep": 9},
        }

    result = lb.train(**settings("whole"))
    assert result.adapters["small"].final_metrics.keys() == {"loss", "bleu"}
    lb.train(**settings("parts"))
    lb.train(**settings("parts"), resume="step-2")
    left = ("checkpoints", "metrics.jsonl", "loss.png", "config.yaml")
    one, two = (files_of(tmp_path / folder, leave_out=left) for folder in ("whole", "parts"))
    assert {name: data for name, data in one.items() if name.endswith((".safetensors", ".json", "samples.md"))} == {
        name: data for name, data in two.items() if name.endswith((".safetensors", ".json", "samples.md"))
    }
    assert "| large |" in (tmp_path / "whole" / "samples.md").read_text()

    loaded = api.load_run(tmp_path / "whole")
    assert loaded.config is not None
    scores = api.evaluate(tmp_path / "whole", loaded.config.data, metrics=["loss", "chrf"], max_new_tokens=6)
    assert set(scores) == {"small", "large", "base"}
    assert scores["small"]["loss"] == pytest.approx(result.adapters["small"].final_metrics["loss"], rel=1e-5)

    (tmp_path / "lines.txt").write_text("the cat ran\n", encoding="utf-8")
    api.predict(tmp_path / "whole", tmp_path / "lines.txt", tmp_path / "lines.jsonl", ["small"], options={"max_new_tokens": 3})
    assert json.loads((tmp_path / "lines.jsonl").read_text())["text"] == "the cat ran"
    asked = write_rows(tmp_path / "asked.jsonl", [{"translation": {"en": "the cat ran"}}, {"translation": {"en": " "}}])  # type: ignore[list-item]
    said = api.predict(tmp_path / "whole", str(asked), tmp_path / "out.jsonl", ["small", "base"], options={"max_new_tokens": 6})
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert isinstance(first["small"], str) and isinstance(first["base"], str)
    assert (second["small"], second["unread"]) == (None, "column 'en' is empty")
    assert "1 of them unread" in said
    assert "cut" not in said
    (tmp_path / "long.txt").write_text("cat\n" + "the cat ran " * 4000 + "\n", encoding="utf-8")
    said = api.predict(
        tmp_path / "whole", tmp_path / "long.txt", tmp_path / "long.jsonl", ["small"], options={"max_new_tokens": 2}
    )
    assert re.search(r"\n1 row cut to [\d,]+ tokens \(data\.max_length\): .*long\.txt:2$", said)
    with pytest.raises(DataError, match=r"out.jsonl:1: has a column 'base'"):
        api.predict(tmp_path / "whole", tmp_path / "out.jsonl", tmp_path / "again.jsonl", ["base"])

    asked_for: list[int] = []

    def told(*args: Any, manner: Manner, **more: Any) -> list[str]:
        asked_for.append(manner.beams)
        return write(*args, manner=manner, **more)

    monkeypatch.setattr("lorabank.tasks.seq2seq.task.write", told)
    more = {"max_new_tokens": 6, "beams": 3}
    api.predict(tmp_path / "whole", str(asked), tmp_path / "beams.jsonl", ["small", "base"], options=more)
    assert set(asked_for) == {3}
