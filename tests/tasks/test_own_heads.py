"""`predict` with the base beside adapters that have heads of their own: its labels are said to be others, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import lorabank as lb
from lorabank import api
from lorabank.cli import main
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError
from lorabank.models.quiet import quiet_transformers
from tests.tasks.detection.made import coco_folder, saved_detector
from tests.tasks.images.made import folder as image_folder
from tests.tasks.tiny import labelled_rows, tiny_bert
from tests.training.tiny import write_rows

NAMES = {0: "cat", 1: "dog", 2: "cow"}


def _vit(where: Path) -> tuple[Path, Path]:
    sizes: dict[str, Any] = {"num_labels": 3}
    config = hf.ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        **sizes,
    )
    with quiet_transformers():
        hf.ViTForImageClassification(config).save_pretrained(where / "model")
        hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(where / "model")
    return where / "model", image_folder(where / "pictures", each=4)


def _detector(where: Path) -> tuple[Path, Path]:
    return saved_detector(where / "model"), coco_folder(where / "coco", 6)


def _bert(where: Path) -> tuple[Path, Path]:
    tiny_bert(where / "model")
    config = json.loads((where / "model" / "config.json").read_text())
    assert "id2label" not in config or len(config["id2label"]) == 2
    return where / "model", write_rows(where / "rows.jsonl", labelled_rows(12))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task with heads, and what its base may be called."""

    make: Callable[[Path], tuple[Path, Path]]
    names: dict[int, str]
    note: str


CASES = {
    "image-classification": Case(make=_vit, names=NAMES, note="default, base (base by its own head, of 3 other labels:"),
    "object-detection": Case(make=_detector, names=NAMES, note="pictures (base by its own head, of 3 other labels:"),
    "text-classification": Case(
        make=_bert, names={0: "up", 1: "down"}, note="default, base (base by its own head, of 2 other labels: up, down)"
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_the_bases_own_labels_are_said_to_be_others(task: str, tmp_path: Path) -> None:
    case = CASES[task]
    model, data = case.make(tmp_path)
    settings: dict[str, Any] = {"task": task, "max_steps": 1, "rank": 2, "data": {"train": str(data), "val_split": 0}}
    lb.train(model=str(model), output=str(tmp_path / "run"), **settings)
    new = str(data.parent if data.suffix == ".json" else data / "red" if data.is_dir() else data)
    both = ["default", "base"]
    with pytest.raises(ConfigError, match=r"the base's own head was never trained .* Name adapters alone"):
        api.predict(tmp_path / "run", new, tmp_path / "refused", both)
    assert not (tmp_path / "refused").exists()
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": case.names, "label2id": {name: number for number, name in case.names.items()}}
    (model / "config.json").write_text(json.dumps(config))
    assert case.note in api.predict(tmp_path / "run", new, tmp_path / "both", both)
    assert "own head" not in api.predict(tmp_path / "run", new, tmp_path / "one")
    if task == "object-detection":
        merged = tmp_path / "merged"
        assert main(["merge", str(tmp_path / "run" / "default"), "--output", str(merged)]) == 0
        assert "base" in api.predict(merged, new, tmp_path / "alone", task=task)
        assert api.evaluate(merged, DataConfig(test=str(data)), task=task).keys() == {"base"}
        config = json.loads((merged / "config.json").read_text())
        unnamed = {"id2label": {i: f"LABEL_{i}" for i in range(len(config["id2label"]))}}
        (merged / "config.json").write_text(json.dumps({**config, **unnamed, "label2id": {}}))
        with pytest.raises(ConfigError, match="head has no names of labels"):
            api.predict(merged, new, tmp_path / "unnamed", task=task)


KEPT: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3, "modules_to_save": [], "rank": 2, "device": "cpu"}


@pytest.mark.parametrize(("task", "section"), [("image-classification", "images"), ("object-detection", "detection")])
def test_a_head_that_is_kept_and_that_nobody_named_asks_for_names(task: str, section: str, tmp_path: Path) -> None:
    """Of three labels and of three outputs: which is which is the user's to say."""
    model, data = CASES[task].make(tmp_path)
    found = {"images": "'blue', 'green', 'red'", "detection": "'red', 'green'"}[section]
    how: dict[str, Any] = {"model": str(model), "task": task, "data": {"train": str(data)}, "eval": {"samples": 0}, **KEPT}
    with pytest.raises(ConfigError, match=rf"modules_to_save: \[\] keeps .* 3 outputs .* rows' {found} .* {section}\.labels"):
        lb.train(**how)
    with pytest.raises(ConfigError, match=rf"{section}\.labels: 2 names, and .* gives 3"):
        lb.train(**how, **{section: {"labels": ["red", "green"]}})
    names = ["red", "green", "blue"]
    result = lb.train(**how, **{section: {"labels": names, "augment": []}}, output=str(tmp_path / "run"))
    (adapter,) = result.trained.values()
    assert names in [json.loads(value) for value in adapter.metadata.values() if value.startswith("[")]
    assert not adapter.modules and result.base_metrics["loss"] > 0
    scores = lb.evaluate(tmp_path / "run", str(data))
    assert scores.keys() == {"default", "base"}
