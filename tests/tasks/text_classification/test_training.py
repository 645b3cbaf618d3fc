"""Whole runs: adapters with labels of their own, trained jointly as each would be alone, saved, loaded, scored, predicted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorabank as lb
from lorabank import api
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError, OutputError
from lorabank.training.events import RunResult
from tests.tasks.text_classification.tiny import (
    mood_rows,
    price_rows,
    star_rows,
    tag_rows,
    tiny_bert,
    tiny_llama,
    words_tokenizer,
)
from tests.training.test_joint import Recorder
from tests.training.tiny import files_of, write_rows

BASES: dict[str, Callable[[], nn.Module]] = {"bert": tiny_bert, "llama": tiny_llama}


ROWS = {"mood": mood_rows(160), "price": price_rows(160), "stars": star_rows(160), "tags": tag_rows(160)}


def run(model: nn.Module, names: list[str], **settings: Any) -> tuple[RunResult, Recorder]:
    told = Recorder()
    common: dict[str, Any] = {
        "eps": 1e-5,  # at 1e-8 AdamW makes a step of the rounding of a gradient near zero
        "batch_size": 4,
        "learning_rate": 5e-3,
        "seed": 3,
        "eval": {"every": 5, "samples": 0},
        "max_steps": 10,
    }
    result = lb.train(
        task="text-classification",
        model=model,
        tokenizer=words_tokenizer(),
        data={name: ROWS[name] for name in names},
        adapters={name: {"rank": 4, "dropout": 0.1 if name == "mood" else 0.0} for name in names},
        listeners=[told],
        **{**common, **settings},
    )
    return result, told


@pytest.mark.parametrize("base", BASES)
def test_four_label_sets_together_as_alone(base: str) -> None:
    """Two labels, three, a number and several labels a row, in common passes: law 3, heads of different widths included."""
    names = list(ROWS)
    together, told = run(BASES[base](), names)
    for name in names:
        alone, only = run(BASES[base](), [name])
        mine, other = together.trained[name], alone.trained[name]
        for path, layer in mine.layers.items():
            torch.testing.assert_close(layer.delta(), other.layers[path].delta(), rtol=1e-3, atol=1e-5, msg=path)
        for path, values in mine.modules.items():
            for key, value in values.items():
                torch.testing.assert_close(value, other.modules[path][key], rtol=1e-3, atol=1e-5, msg=f"{path}.{key}")
        joint, own = ([r for r in each.evals if r.adapter == name] for each in (told, only))
        assert [r.step for r in joint] == [r.step for r in own] == [5, 10]
        for a, b in zip(joint, own, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-3, nan_ok=True)
    heads = {name: next(iter(adapter.modules.values()))["weight"].shape[0] for name, adapter in together.trained.items()}
    assert heads == {"mood": 2, "price": 3, "stars": 1, "tags": 2}


@pytest.mark.parametrize("base", BASES)
def test_recomputed_it_is_the_same(base: str) -> None:
    plain, _ = run(BASES[base](), ["mood"], max_steps=3, batch_size=8, warmup_steps=0)
    parts, _ = run(
        BASES[base](), ["mood"], max_steps=3, batch_size=8, warmup_steps=0, gradient_checkpointing=True, eval={"every": 0}
    )
    for path, layer in plain.trained["mood"].layers.items():
        torch.testing.assert_close(layer.delta(), parts.trained["mood"].layers[path].delta(), rtol=1e-4, atol=1e-6, msg=path)


def test_it_learns_and_says_by_which_measure() -> None:
    result, told = run(tiny_bert(), ["mood", "stars"], max_steps=60, eval={"every": 20, "best": "loss"})
    mood, stars = result.adapters["mood"].final_metrics, result.adapters["stars"].final_metrics
    assert set(mood) == {"loss", "accuracy", "f1", "matthews"}
    assert set(stars) == {"loss", "pearson", "spearman", "rmse"}
    assert mood["accuracy"] == 1.0
    assert stars["pearson"] > 0.9
    assert set(told.evals[0].metrics) in (set(mood), set(stars)), "during training too"
    assert not result.base_metrics, "a head that nobody trained says nothing"


def test_the_best_step_by_another_measure() -> None:
    result, told = run(tiny_bert(), ["mood"], max_steps=30, eval={"every": 5, "best": "f1_macro", "metrics": ["accuracy"]})
    scores = {r.step: r.metrics["f1_macro"] for r in told.evals}
    assert scores[result.adapters["mood"].best_step or 0] == max(scores.values())
    with pytest.raises(ConfigError, match=r"eval.best: pearson isn't a score of adapter 'mood', whose labels are single"):
        run(tiny_bert(), ["mood"], eval={"every": 5, "best": "pearson"})
    with pytest.raises(ConfigError, match="'pearson': it is for regression"):
        run(tiny_bert(), ["mood"], eval={"metrics": ["pearson"]})
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        run(tiny_bert(), ["mood"], eval={"metrics": ["acuracy"]})


@pytest.fixture(scope="module")
def finished(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two label sets, from files."""
    folder = tmp_path_factory.mktemp("runs")
    files = {name: write_rows(folder / f"{name}.jsonl", ROWS[name]) for name in ("mood", "price")}
    lb.train(
        task="text-classification",
        model=str(bert_folder),
        output=str(folder / "out"),
        adapters={name: {"rank": 4, "data": str(file)} for name, file in files.items()},
        batch_size=4,
        learning_rate=5e-3,
        max_steps=60,
        data={"val_split": 0.25},
        eval={"every": 20},
        save={"every": 20},
    )
    return folder / "out"


def test_what_a_run_leaves(finished: Path) -> None:
    about = json.loads((finished / "price" / "lorabank.json").read_text())
    assert "high" in json.dumps(about)
    text = (finished / "samples.md").read_text()
    assert "# mood: 40 held-out rows" in text and "# price: 40 held-out rows" in text
    assert "| is | was taken for | rows |" in text
    assert (finished / "price" / "held_out.png").stat().st_size > 5000
    assert ", num_labels=3, " in (finished / "price" / "README.md").read_text()
    report = json.loads((finished / "data_report.json").read_text())
    assert any("columns: 'text' as the text, 'label' as the label" in json.dumps(own) for own in report.values())


def test_predict_gives_names_and_probabilities(finished: Path, tmp_path: Path) -> None:
    rows = [{"text": "the food was great", "id": 7}, {"text": " ", "id": 8}, {"text": "it is dear and fast", "id": 9}]
    said = api.predict(finished, str(write_rows(tmp_path / "rows.jsonl", rows)), tmp_path / "out.jsonl", ["mood", "price"])
    first, second, third = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    mood, price = first["mood"], third["price"]
    assert (first["id"], mood["label"], mood["score"]) == (7, "pos", mood["probabilities"]["pos"])
    assert sum(mood["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert list(price["probabilities"]) == ["high", "low", "none"]
    assert price["label"] == "high"
    assert second == {"text": " ", "id": 8, "mood": None, "price": None, "unread": "column 'text' is empty"}
    assert "3 rows (1 of them unread" in said
    with pytest.raises(DataError, match=r"out.jsonl:1: has a column 'mood', and what 'mood' says would be written over it"):
        api.predict(finished, str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", ["mood"])


def test_predict_writes_json_lines_under_no_other_name(finished: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the food"}])
    with pytest.raises(OutputError, match=r"labels\.csv: expected a name for JSON lines, got \.csv\. Name it labels\.jsonl"):
        api.predict(finished, str(rows), tmp_path / "labels.csv", ["mood"])


def test_predict_keeps_the_place_of_a_first_row_without_a_text(finished: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": 1}, {"text": "the food", "id": 2}, {"text": "dear", "id": 3}])
    api.predict(finished, str(rows), tmp_path / "out.jsonl", ["mood"])
    first, second, _ = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["mood"] is None and "'text'" in first["unread"] and second["mood"]["label"] in ("pos", "neg")


def test_predict_names_texts_that_it_cuts(finished: Path, tmp_path: Path) -> None:
    texts = [{"text": "the food was great"}, {"text": "dear " * 5000}]
    said = api.predict(finished, str(write_rows(tmp_path / "rows.jsonl", texts)), tmp_path / "out.jsonl", ["mood"])
    assert re.search(r"\n1 row cut to [\d,]+ tokens \(data\.max_length\): .*rows\.jsonl:2$", said)
    assert "cut" not in api.predict(finished, str(write_rows(tmp_path / "one.jsonl", texts[:1])), tmp_path / "1.jsonl", ["mood"])


def test_eval_of_own_and_other_rows(finished: Path, tmp_path: Path) -> None:
    own = api.evaluate(finished, api.load_run(finished).config.data, metrics=["accuracy"])  # type: ignore[union-attr]
    assert set(own) == {"mood", "price"}
    assert own["mood"]["accuracy"] == 1.0
    file = write_rows(tmp_path / "test.jsonl", [*mood_rows(8), {"text": "the food", "label": "meh"}])
    told: list[str] = []
    found = api.evaluate(finished, DataConfig(test=str(file)), ["mood"], metrics=["accuracy", "glue:mrpc"], say=told.append)
    assert set(found["mood"]) == {"loss", "accuracy", "f1"}
    assert any("the head has no label 'meh'" in line and "test.jsonl:9" in line for line in told)
    with pytest.raises(DataError, match=r"test.jsonl:1: the head has no label 'pos'.*adapter 'price'.*--adapters"):
        api.evaluate(finished, DataConfig(test=str(file)), ["mood", "price"])


def test_an_adapter_by_itself(finished: Path, tmp_path: Path) -> None:
    """Its folder alone says labels, task and base."""
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "it is cheap"}])
    api.predict(finished / "price", str(data), tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["price"]["label"] == "low"


def test_a_text_a_line(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("it is cheap\n\nit is dear and fast\n", encoding="utf-8")
    api.predict(finished, str(tmp_path / "lines.txt"), tmp_path / "out.jsonl", ["price"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["text"], line["price"]["label"]) for line in lines] == [("it is cheap", "low"), ("it is dear and fast", "high")]
    (tmp_path / "lines.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lines.txt: expected a text a line, got an empty file"):
        api.predict(finished, str(tmp_path / "lines.txt"), tmp_path / "more.jsonl")


def test_peft_loads_it_and_says_the_same(finished: Path, bert_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(bert_folder), num_labels=3, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, str(finished / "price")).eval()
    tokenizer = words_tokenizer()
    with torch.no_grad():
        shares = model(**tokenizer("it is slow and fast", return_tensors="pt")).logits.softmax(-1)[0]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "it is slow and fast"}])
    api.predict(finished, str(data), tmp_path / "out.jsonl", ["price"])
    ours = json.loads((tmp_path / "out.jsonl").read_text())["price"]["probabilities"]
    assert list(ours.values()) == pytest.approx(shares.tolist(), abs=1e-4)


def test_merged_it_is_a_classifier_by_itself(finished: Path, tmp_path: Path) -> None:
    """Its labels have their names, so that other tools say them, and it is scored and trained further by them."""
    from lorabank.cli.main import main

    assert main(["merge", str(finished / "price"), "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert merged.config.id2label == {0: "high", 1: "low", 2: "none"}
    assert merged.config.problem_type == "single_label_classification"
    file = write_rows(tmp_path / "test.jsonl", price_rows(12))
    data = DataConfig(test=str(file))
    alone = api.evaluate(tmp_path / "merged", data, metrics=["accuracy"], task="text-classification")
    assert alone["base"] == pytest.approx(api.evaluate(finished, data, ["price"], metrics=["accuracy"])["price"], rel=1e-4)


def test_what_starts_from_an_adapter_keeps_its_labels(finished: Path, bert_folder: Path, tmp_path: Path) -> None:
    """Its head has their order; rows of other labels are told and left out."""
    rows = [*price_rows(12)[::3], *price_rows(12)[1::3], {"text": "it is good", "label": "free"}]
    result = lb.train(
        task="text-classification",
        model=str(bert_folder),
        data={"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "val_split": 0},
        adapters={"price": {"init_from": str(finished / "price")}},
        max_steps=1,
        learning_rate=1e-9,
    )
    assert json.loads(result.trained["price"].metadata["labels"]) == ["high", "low", "none"]
    before = lb.Adapter.load(finished / "price").modules["classifier"]["weight"]
    torch.testing.assert_close(result.trained["price"].modules["classifier"]["weight"], before)
    with pytest.raises(DataError, match=r"the head has no label 'free'.*rows.jsonl:9"):
        lb.train(
            task="text-classification",
            model=str(bert_folder),
            data={"train": str(tmp_path / "rows.jsonl"), "bad_rows": "stop"},
            adapters={"price": {"init_from": str(finished / "price")}},
        )


def test_a_run_is_not_loaded_for_another_task(finished: Path, tmp_path: Path) -> None:
    """Its base would get a head that nobody trained, and be scored by it."""
    shutil.copytree(finished / "mood", tmp_path / "mood")
    for source in (finished, finished / "mood", tmp_path / "mood"):
        with pytest.raises(ConfigError, match=r"was trained for text-classification, so it can't be loaded for text-generation"):
            api.load_run(source, task="text-generation")
    assert api.load_run(tmp_path / "mood", task="text-classification").names == ["mood"]


def test_interrupted_and_resumed(bert_folder: Path, tmp_path: Path) -> None:
    files = {name: write_rows(tmp_path / f"{name}.jsonl", ROWS[name]) for name in ("mood", "price")}

    def settings(folder: str) -> dict[str, Any]:
        return {
            "task": "text-classification",
            "model": str(bert_folder),
            "output": str(tmp_path / folder),
            "adapters": {name: {"rank": 2, "data": str(file), "dropout": 0.1} for name, file in files.items()},
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "eval": {"every": 4},
            "save": {"every": 4, "keep": 9},
        }

    lb.train(**settings("whole"))
    lb.train(**settings("parts"))
    lb.train(**settings("parts"), resume="step-4")
    left = ("checkpoints", "metrics.jsonl", "loss.png", "config.yaml")
    one, two = (files_of(tmp_path / folder, leave_out=left) for folder in ("whole", "parts"))
    assert sorted(one) == sorted(two)
    for name in one:
        if name.endswith((".safetensors", ".json", "samples.md", "held_out.png")):
            assert one[name] == two[name], name


def test_a_head_that_was_trained_before_is_gone_on_with() -> None:
    """Same labels: its order and its values; other labels: a new head."""
    model = tiny_bert()
    model.config.id2label, model.config.label2id = {0: "pos", 1: "neg"}, {"pos": 0, "neg": 1}
    model.config.problem_type = "single_label_classification"
    before = model.classifier.weight.detach().clone()
    result, _ = run(model, ["mood", "price"], max_steps=1, learning_rate=1e-9)
    torch.testing.assert_close(result.trained["mood"].modules["classifier"]["weight"], before)
    assert result.trained["price"].modules["classifier"]["weight"].shape[0] == 3
    assert json.loads(result.trained["mood"].metadata["labels"]) == ["pos", "neg"]
    alone, _ = run(model, ["mood"], max_steps=1, learning_rate=1e-9)
    assert "accuracy" in alone.base_metrics, "the base can be scored by its own head"


def test_the_models_own_head_is_kept_for_its_own_labels_alone() -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save: \[\] keeps .*no names of labels.*'neg', 'pos'. Leave it out"):
        run(tiny_bert(), ["mood"], max_steps=1, modules_to_save=[])


def test_the_end_of_a_decoders_row_does_not_depend_on_its_padding() -> None:
    """Llama's head reads the last token that isn't padding, and the end token is the pad token here."""
    model = tiny_llama()
    model.config.id2label = {0: "neg", 1: "pos"}
    task = api_task(model)
    engine = task.engine(lb.attach(model))
    rows = task.read(task.config, objects(mood_rows(6))).by_adapter["default"].train
    together, _ = task.outputs(engine, [("base", row) for row in rows])
    for row, expected in zip(rows, together, strict=True):
        alone, _ = task.outputs(engine, [("base", row)])
        torch.testing.assert_close(alone[0], expected)
    assert len({row.size for row in rows}) > 1


def test_a_model_without_a_pad_token_is_told() -> None:
    model = tiny_llama()
    model.config.pad_token_id = None
    with pytest.raises(ConfigError, match=r"names no pad token.*model.config.pad_token_id = tokenizer.pad_token_id"):
        run(model, ["mood"])


def test_rows_longer_than_the_table_of_positions_are_cut(bert_folder: Path) -> None:
    rows = [{"text": "the food " * 50 + row["text"], "label": row["label"]} for row in mood_rows(8)]
    task = api_task(tiny_bert())
    found = task.read(task.config, objects(rows)).by_adapter["default"]
    assert max(row.size for row in found.train) == 64
    assert "cut to 64 tokens" in found.report.notes


def api_task(model: nn.Module) -> Any:
    from lorabank.config.train import TrainConfig
    from lorabank.tasks import task_kind

    config = TrainConfig(task="text-classification", data=DataConfig(val_split=0))
    return task_kind("text-classification").open(config, model, words_tokenizer(), {})


def objects(rows: list[dict[str, Any]]) -> Any:
    from lorabank.training.data_sets import RowObjects

    return RowObjects(train=rows)
