"""Text classification from files to predictions: alone, jointly with other label sets, resumed, loaded again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lorabank as lb
from lorabank import api
from lorabank.cli import main
from lorabank.config.parse import load_config
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError
from tests.tasks.text_classification.test_reading import prepared
from tests.tasks.tiny import labelled_rows, tiny_bert
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run, write_rows

SETTINGS: dict[str, Any] = {
    "task": "text-classification",
    "rank": 4,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_steps": 6,
    "val_split": 0.2,
    "eval": {"every": 3, "metrics": ["loss", "accuracy"]},
    "save": {"every": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    two, three = labelled_rows(40), labelled_rows(45, ("odd", "good", "bad"))
    return {"mood": write_rows(tmp_path / "mood.jsonl", two), "kind": write_rows(tmp_path / "kind.jsonl", three)}


def test_a_classifier_learns_is_scored_saved_and_predicts(
    base: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = lb.train(
        model=str(base), output=str(tmp_path / "run"), data=str(files["mood"]), **{**SETTINGS, "max_steps": 60, "batch_size": 8}
    )
    mine = result.adapters["default"]
    assert mine.best_metrics["accuracy"] == 1.0 and mine.best_metrics["loss"] < 0.3
    rows = [{"text": row["text"]} for row in labelled_rows(6, start=100)]
    told = api.predict(tmp_path / "run", write_rows(tmp_path / "new.jsonl", rows), tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["default"]["label"] for line in lines] == [row["label"] for row in labelled_rows(6, start=100)]
    assert "6 rows labelled by default" in told
    scores = api.evaluate(tmp_path / "run", DataConfig(test=str(files["mood"])), metrics=["accuracy"])
    assert scores["default"]["accuracy"] == 1.0
    few = api.evaluate(tmp_path / "run", DataConfig(test=str(files["mood"])), metrics=["loss"], max_rows=3)
    spread_rows = [labelled_rows(40)[i] for i in (0, 13, 26)]
    only = api.evaluate(tmp_path / "run", DataConfig(test=str(write_rows(tmp_path / "few.jsonl", spread_rows))))
    assert few["default"]["loss"] == pytest.approx(only["default"]["loss"]) != pytest.approx(scores["default"]["loss"])
    with pytest.raises(ConfigError, match="metric 'rmse': it is for regression, and the labels are single"):
        api.evaluate(tmp_path / "run", DataConfig(test=str(files["mood"])), metrics=["rmse"])

    assert main(["merge", str(tmp_path / "run" / "default"), "--output", str(tmp_path / "merged")]) == 0
    merged = ["predict", str(tmp_path / "merged"), "--data", str(tmp_path / "new.jsonl"), "--output", str(tmp_path / "m.jsonl")]
    assert main(merged) == 0
    purpose = tmp_path / "merged" / "lorabank_task.json"
    assert json.loads(purpose.read_text()) == {"task": "text-classification", "settings": {}}
    purpose.unlink()
    (tmp_path / "m.jsonl").unlink()
    assert main(merged) == 2
    assert "this one is for task text-classification (`task` in a run, or --task)" in capsys.readouterr().err
    assert main([*merged, "--task", "text-classification"]) == 0
    whole = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["base"]["label"] for line in whole] == [line["default"]["label"] for line in lines]
    for flag, value in (("--temperature", "1"), ("--max-new-tokens", "3")):
        assert main([*merged[:-1], str(tmp_path / "n.jsonl"), "--task", "text-classification", flag, value]) == 2
        assert f"{flag}: is for text-generation" in (said := capsys.readouterr().err)
        assert "and this run's task is text-classification. Leave it out." in said
    with pytest.raises(ConfigError, match=r"has no names of labels, or .* with adapters="):
        api.predict(base, tmp_path / "new.jsonl", tmp_path / "n.jsonl", task="text-classification")
    assert not (tmp_path / "n.jsonl").exists()


def test_adapters_of_other_label_sets_train_jointly_as_they_do_alone(base: Path, files: dict[str, Path]) -> None:
    """Law 3: one pass serves heads of two and of three labels; each adapter ends where it ends alone."""
    both = {name: {"data": str(path)} for name, path in files.items()}
    joint = lb.train(model=str(base), adapters=both, **SETTINGS)
    for name in both:
        alone = lb.train(model=str(base), adapters={name: both[name]}, **SETTINGS)
        for one, other in zip(tensors(joint.trained[name]), tensors(alone.trained[name]), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
    heads = {name: len(joint.trained[name].modules["classifier"]["weight"]) for name in both}
    assert heads == {"mood": 2, "kind": 3}


def tensors(adapter: Any) -> list[torch.Tensor]:
    found = [tensor for path in sorted(adapter.layers) for tensor in (adapter.layers[path].A, adapter.layers[path].B)]
    return found + [values[key] for _, values in sorted(adapter.modules.items()) for key in sorted(values)]


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    runs = {"data": str(files["kind"]), "output": str(tmp_path / "run"), **SETTINGS}
    lb.train(model=str(base), **runs)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(model=str(base), listeners=[SignalAt(("step", 4), signal.SIGINT)], **runs)
    assert halved.interrupted and halved.adapters["default"].steps == 4
    lb.train(model=str(base), resume=True, **runs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"words": "x", "label": "a"}], "no column with the text"),
        (
            [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}],
            "every row is 'a' in column 'label', so there is nothing to tell apart",
        ),
        ([{"text": "", "label": "a"}], "not the only row can be used"),
    ],
)
def test_rows_that_nothing_can_be_learnt_from_are_named(
    base: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lb.train(model=str(base), data=str(write_rows(tmp_path / "rows.jsonl", rows)), **{**SETTINGS, "val_split": 0})


def test_settings_of_another_task_are_refused(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    data = str(files["mood"])
    with pytest.raises(ConfigError, match=r"eval\.metrics: metric 'bleu': expected one of loss, accuracy"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "eval": {"metrics": ["bleu"]}})
    with pytest.raises(ConfigError, match=r"^activation_offloading: is for text-generation alone so far\. Use gradient_ch"):
        lb.train(model=str(base), data=data, output=str(tmp_path / "run"), activation_offloading=True, **SETTINGS)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="base_dtype: nf4 is for text-generation alone"):
        lb.train(model=str(base), data=data, base_dtype="nf4", **SETTINGS)
    with pytest.raises(ConfigError, match=r"eval\.best: validation of text-classification has no metric 'acuracy'"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "eval": {"best": "acuracy"}})


def test_pairs_and_single_texts_are_not_taken_for_each_other_in_silence(base: Path, tmp_path: Path) -> None:
    single = labelled_rows(12)
    pairs = [{**row, "text_pair": "and more"} for row in single]
    one, two = write_rows(tmp_path / "one.jsonl", single), write_rows(tmp_path / "two.jsonl", pairs)
    alone, both = tmp_path / "alone", tmp_path / "both"
    short = {**SETTINGS, "max_steps": 1, "save": {"every": 0}}
    lb.train(model=str(base), output=str(alone), adapters={"s": {"data": str(one)}}, **short)
    lb.train(model=str(base), output=str(both), adapters={"s": {"data": str(one)}, "p": {"data": str(two)}}, **short)
    of_pairs = r"one.jsonl:1: adapter 'p' was trained on pairs of texts, and these are single texts.* `text_pair`"
    of_single = r"two.jsonl:\d+: adapter 's' was trained on single texts, and these are pairs.* Leave the column"
    with pytest.warns(UserWarning, match=of_pairs):
        api.evaluate(both, DataConfig(test=str(one)), ["s", "p"])
    with pytest.warns(UserWarning, match=of_pairs):
        api.predict(both, one, tmp_path / "a.jsonl")
    with pytest.warns(UserWarning, match=of_single):
        api.evaluate(alone / "s", DataConfig(test=str(two)))
    with pytest.warns(UserWarning, match=of_single):
        api.predict(both, two, tmp_path / "b.jsonl", ["s"])
    with pytest.warns(UserWarning, match=of_single):
        lb.train(model=str(base), adapters={"s": {"data": str(two), "init_from": str(alone / "s")}}, **short)
    api.evaluate(both, load_config(both)[0].data)  # each on its own rows, without a warning
    api.predict(both, one, tmp_path / "c.jsonl", ["s"])
    mixed = lb.combine([(lb.Adapter.load(both / "s"), 0.5), (lb.Adapter.load(alone / "s"), 0.5)])
    assert mixed.metadata["texts"] == "1"


def test_validation_rows_of_pairs_beside_single_texts_are_told() -> None:
    rows = {"train": labelled_rows(8), "val": [{**row, "text_pair": "more"} for row in labelled_rows(4, start=8)]}
    found = prepared(rows["train"], val=rows["val"])
    assert any("pairs of texts, and the others are single: 4 rows" in line for line in found.report.lines()), found.report.lines()
