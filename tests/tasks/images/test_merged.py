"""Classifiers with an adapter in their weights, and adapters away from their runs: pictures are made as they were in training."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor

import lorabank as lb
from lorabank.cli import main
from lorabank.errors import ModelError
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE
from lorabank.tasks.images.load import load_image_model, own_labels
from tests.tasks.images.made import folder
from tests.tasks.images.test_task import CONVOLUTIONS, SETTINGS, saved

needs_lite = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs efficientnet-lite-pytorch and its weights"
)


def answers(source: Path, data: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """Each picture's label and scores, by the one model that was asked."""
    words = ["predict", str(source), "--data", str(data), "--output", str(out), "--device", "cpu", *more]
    assert main(words) == 0
    return [
        next(value["top"] for key, value in json.loads(line).items() if key != "image") for line in out.read_text().splitlines()
    ]


def assert_alike(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


@needs_lite
@pytest.mark.filterwarnings("ignore:.*are convolutions in groups, whose A would take")
def test_efficientnet_lite_is_merged_for_its_own_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    data = folder(tmp_path / "d", each=4)
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "images": {"image_size": 32}}
    lb.train(model=EFFICIENTNET_LITE, data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "run"), **settings)
    adapter, out = tmp_path / "run" / "default", tmp_path / "merged"
    assert main(["merge", str(adapter), "--output", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "merged and unmerged outputs differ by at most" in said and "labels: blue, green, red\n" in said

    in_run = answers(tmp_path / "run", data, tmp_path / "run.jsonl", "--adapters", "default")
    assert_alike(answers(out, data, tmp_path / "merged.jsonl"), in_run)  # by its files, without --task
    shutil.copytree(adapter, tmp_path / "alone")
    assert_alike(answers(tmp_path / "alone", data, tmp_path / "alone.jsonl", "--adapters", "alone"), in_run)

    theirs = EfficientNet.from_name(EFFICIENTNET_LITE)
    theirs._fc = nn.Linear(theirs._fc.in_features, 3)
    theirs.load_state_dict(load_file(out / "model.safetensors"))
    ours, x = load_image_model(str(out), device="cpu").model, torch.rand(2, 3, 64, 64)
    assert own_labels(ours) == ("blue", "green", "red")
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=0, atol=1e-6)

    few = folder(tmp_path / "few", each=4, classes=("grey", "red"))
    lb.train(model=str(out), data=str(few), targets=CONVOLUTIONS, output=str(tmp_path / "again"), **settings)
    assert main(["merge", str(tmp_path / "again" / "default"), "--output", str(tmp_path / "twice"), "--device", "cpu"]) == 0
    again = answers(tmp_path / "again", few, tmp_path / "again.jsonl", "--adapters", "default")
    assert_alike(answers(tmp_path / "twice", few, tmp_path / "twice.jsonl"), again)

    for name, damage in (("classifier.json", "{"), ("classifier.json", '{"architecture": "x", "labels": null, "head": null}')):
        shutil.copytree(out, tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / name).write_text(damage)
        with pytest.raises(ModelError, match="don't make a classifier"):
            load_image_model(str(tmp_path / "bad"))
    capsys.readouterr()
    assert main(["merge", str(adapter), "--output", str(tmp_path / "no"), "--by-shard"]) != 0
    assert "--by-shard: is for folders of transformers' models, and efficientnet-lite0 isn't one" in capsys.readouterr().err


def test_a_merged_model_of_transformers_makes_pictures_of_the_adapters_size(tmp_path: Path, capsys: Any) -> None:
    base, data = saved(tmp_path / "resnet", "resnet"), folder(tmp_path / "d", each=4)
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "images": {"image_size": 24, "mean": [0.4, 0.5, 0.6]}}
    lb.train(model=str(base), data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "run"), **settings)
    adapter, out = tmp_path / "run" / "default", tmp_path / "merged"
    in_run = answers(tmp_path / "run", data, tmp_path / "run.jsonl", "--adapters", "default")
    shutil.copytree(adapter, tmp_path / "alone")
    assert_alike(answers(tmp_path / "alone", data, tmp_path / "alone.jsonl", "--adapters", "alone"), in_run)
    for way in ([], ["--by-shard"]):
        capsys.readouterr()
        assert main(["merge", str(adapter), "--output", str(out), "--device", "cpu", *way]) == 0
        assert "pictures are made 24 pixels a side, as in training" in capsys.readouterr().out
        assert AutoImageProcessor.from_pretrained(out).size["shortest_edge"] == 24
        found = answers(out, data, tmp_path / f"merged{len(way)}.jsonl", "--task", "image-classification")
        assert_alike(found, in_run)
        shutil.rmtree(out)
