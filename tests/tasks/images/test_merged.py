"""Classifiers with an adapter in their weights, and adapters away from their runs: pictures are made as they were in training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ConvNextImageProcessor

import lorabank as lb
from lorabank.cli import main
from lorabank.config.images import ImagesConfig
from lorabank.errors import ModelError
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE
from lorabank.models.image_processors import processor_class
from lorabank.tasks.images.kept import KEPT
from lorabank.tasks.images.load import load_image_model, own_labels
from tests.tasks.images.made import folder
from tests.tasks.images.test_task import CONVOLUTIONS, SETTINGS, Net, saved

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
    lb.train(model="EfficientNet-Lite0", data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "run"), **settings)
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

    twice = tmp_path / "twice"
    for number, classes in enumerate((("grey", "red"), ("blue", "green", "grey"))):  # the last: as many as the base has
        few, run = folder(tmp_path / f"few{number}", each=4, classes=classes), tmp_path / f"run{number}"
        lb.train(model=str(out), data=str(few), targets=CONVOLUTIONS, output=str(run), **settings)
        assert main(["merge", str(run / "default"), "--output", str(twice), "--device", "cpu"]) == 0
        again = answers(run, few, tmp_path / f"again{number}.jsonl", "--adapters", "default")
        assert_alike(answers(twice, few, tmp_path / f"twice{number}.jsonl"), again)
        shutil.rmtree(twice)
    capsys.readouterr()
    assert main(["merge", str(adapter), "--model", str(out), "--output", str(twice), "--device", "cpu", "--force"]) == 0

    shutil.copytree(out, tmp_path / "bad")
    about = {"architecture": EFFICIENTNET_LITE, "labels": ["a", "b", "c"], "head": "_fc"}
    for change in ({"architecture": "x"}, {"labels": ["a"]}, {"head": "_gone"}, {"head": "_conv_stem"}):
        (tmp_path / "bad" / "classifier.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ModelError, match="don't make a classifier"):
            load_image_model(str(tmp_path / "bad"))
    (tmp_path / "bad" / "classifier.json").write_text("{")
    with pytest.raises(ModelError, match="don't make a classifier"):
        load_image_model(str(tmp_path / "bad"))
    capsys.readouterr()
    assert main(["merge", str(adapter), "--output", str(tmp_path / "no"), "--by-shard"]) != 0
    assert "--by-shard: is for folders of transformers' models, and EfficientNet-Lite0 isn't one" in capsys.readouterr().err


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
        assert processor_class(out).from_pretrained(out).size["shortest_edge"] == 24
        found = answers(out, data, tmp_path / f"merged{len(way)}.jsonl", "--task", "image-classification")
        assert_alike(found, in_run)
        if not way:
            again = {**settings, "max_steps": 1}
            lb.train(model=str(out), data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "second"), **again)
            assert (
                main(["merge", str(tmp_path / "second" / "default"), "--output", str(tmp_path / "twice"), "--device", "cpu"]) == 0
            )
            assert (tmp_path / "twice" / "config.json").is_file()
        shutil.rmtree(out)


@pytest.mark.parametrize("beside", [False, True])
def test_an_image_processor_in_a_processors_file_stays_there(beside: bool, tmp_path: Path) -> None:
    """As transformers writes it of models that read text as well; an older file `beside` it isn't what transformers reads."""
    base, data = saved(tmp_path / "resnet", "resnet"), folder(tmp_path / "d", each=4)
    processor = ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0, image_mean=[0.1] * 3)
    (base / "processor_config.json").write_text(json.dumps({"image_processor": processor.to_dict()}, default=list))
    if beside:
        ConvNextImageProcessor(size={"shortest_edge": 20}, image_mean=[0.9] * 3).save_pretrained(base)
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "images": {"image_size": 24}}
    lb.train(model=str(base), data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "run"), **settings)
    in_run = answers(tmp_path / "run", data, tmp_path / "run.jsonl", "--adapters", "default")
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run" / "default"), "--output", str(out), "--device", "cpu"]) == 0
    assert (out / "preprocessor_config.json").exists() == beside
    said = json.loads((out / "processor_config.json").read_text())["image_processor"]
    assert said["size"] == {"shortest_edge": 24} and said["image_mean"] == [0.1] * 3
    assert_alike(answers(out, data, tmp_path / "merged.jsonl", "--task", "image-classification"), in_run)


def test_timms_models_are_merged_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for timm, whose real models are tried where torchvision loads (test_models.py)."""
    monkeypatch.setitem(sys.modules, "timm", timm := types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.data", data_of_timm := types.ModuleType("timm.data"))

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        torch.manual_seed(0 if pretrained else 1)
        assert name == "small.one"
        return Net()

    said = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    vars(timm).update(create_model=create_model, data=data_of_timm)
    vars(data_of_timm).update(resolve_model_data_config=lambda model: said)
    data = folder(tmp_path / "d", each=4)
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}}
    lb.train(model="timm:small.one", data=str(data), targets=CONVOLUTIONS, output=str(tmp_path / "run"), **settings)
    in_run = answers(tmp_path / "run", data, tmp_path / "run.jsonl", "--adapters", "default")
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run" / "default"), "--output", str(out), "--device", "cpu"]) == 0
    assert json.loads((out / "classifier.json").read_text())["architecture"] == "timm:small.one"
    assert_alike(answers(out, data, tmp_path / "merged.jsonl"), in_run)


def test_adapters_that_say_their_pictures_beside_those_that_do_not(tmp_path: Path) -> None:
    """As files were before they said it."""
    one = lb.Adapter.load(trained_at(tmp_path / "one", 24))
    older = replace(one, metadata={key: value for key, value in one.metadata.items() if key != "images"})
    with pytest.warns(UserWarning, match=r"images: old: the file doesn't say how it was trained.*image_size 24"):
        KEPT.merged(ImagesConfig(), {"new": one, "old": older})
    usual = lb.Adapter.load(trained_at(tmp_path / "two", None))
    silent = replace(usual, metadata={key: value for key, value in usual.metadata.items() if key != "images"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KEPT.merged(ImagesConfig(), {"new": usual, "old": silent})
        lb.combine([(usual, 0.5), (silent, 0.5)])
    with pytest.warns(UserWarning, match="trained with different settings: images.image_size"):
        lb.combine([(one, 0.5), (older, 0.5)])


def trained_at(folder_of: Path, size: int | None) -> Path:
    """The folder of an adapter that was trained at a size."""
    base, data = saved(folder_of / "resnet", "resnet"), folder(folder_of / "d", each=4)
    settings = {**SETTINGS, "max_steps": 1, "eval": {"every": 0}, "images": {"image_size": size}}
    lb.train(model=str(base), data=str(data), targets=CONVOLUTIONS, output=str(folder_of / "run"), **settings)
    return folder_of / "run" / "default"
