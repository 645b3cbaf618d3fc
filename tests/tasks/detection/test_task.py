"""Object detection from files to predictions: alone, jointly with other categories, resumed, loaded again."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessorPil
from transformers.models.auto.modeling_auto import AutoModelForObjectDetection

import lorabank as lb
from lorabank import api
from lorabank.bank.in_full.heads import DETECTORS, detector_heads, extra_outputs
from lorabank.cli import main
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError
from lorabank.models.image_processors import processor_class
from lorabank.tasks.detection.metrics import METRICS, coco_scores
from lorabank.tasks.detection.pictures import Picture
from lorabank.tasks.detection.rows import Box, DetectionRow
from tests.tasks.detection.made import coco_folder, processor, saved_detector, table_rows, tiny_detector
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run

SETTINGS: dict[str, Any] = {
    "task": "object-detection",
    "rank": 4,
    "learning_rate": 5e-3,
    "batch_size": 4,
    "max_steps": 4,
    "val_split": 0.25,
    "eval": {"every": 2, "metrics": ["loss", "mAP"]},
    "save": {"every": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_detector(tmp_path_factory.mktemp("yolos"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    sets = {"two": ("red", "green"), "three": ("blue", "red", "green"), "one": ("blue",)}
    return {name: coco_folder(folder / name, 16, labels, seed=i) for i, (name, labels) in enumerate(sets.items())}


def test_a_detector_learns_is_scored_saved_and_predicts(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    long = {
        **SETTINGS,
        "max_steps": 60,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "eval": {"every": 20, "best": "mAP50", "samples": 2},
    }
    result = lb.train(model=str(base), output=str(tmp_path / "run"), data=str(files["two"]), detection={"augment": []}, **long)
    mine = result.adapters["default"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("event") == "step" or "learning_rate" in line]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert {"loss", "mAP", "mAP50", "mAP75"} <= mine.best_metrics.keys() and mine.best_metrics["mAP50"] > 0
    with Image.open(tmp_path / "run" / "samples" / "default.png") as sheet:
        assert sheet.width > 600 and sheet.height > 600
    told = api.predict(tmp_path / "run", files["two"].parent, tmp_path / "found", options={"threshold": 0.01, "draw": 3})
    found = json.loads((tmp_path / "found" / "default.json").read_text())
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copyfile(next(files["two"].parent.glob("*.png")), mixed / "good.png")
    (mixed / "bad.png").write_text("nothing")
    with pytest.raises(DataError, match=r"1 of 2 pictures can't be used(?s:.*)bad\.png"):
        api.predict(tmp_path / "run", mixed, tmp_path / "none", options={"bad_rows": "stop"})
    assert api.predict(tmp_path / "run", mixed, tmp_path / "one", options={"bad_rows": "drop"}).startswith("1 picture")
    assert "16 pictures" in told and {entry["image_id"] for entry in found} <= set(range(100, 116)) and found
    for entry in found:
        x, y, width, height = entry["bbox"]
        assert entry["category_id"] == {"red": 1, "green": 2}[entry["category"]] and entry["score"] >= 0.01
        assert min(x, y) >= 0 and x + width <= 32.01 and y + height <= 32.01
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 3
    lines = list[str]()
    scores = api.evaluate(tmp_path / "run", DataConfig(test=str(files["two"])), metrics=["mAP"], say=lines.append)
    assert any(" boxes: red " in line for line in lines) and not any("training" in line for line in lines), lines
    assert scores.keys() == {"default"} and scores["default"]["mAP50"] > 0


@pytest.mark.parametrize(
    "kind", ["yolos", "detr", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("conditional_detr", "rt_detr"))]
)
def test_adapters_of_other_categories_train_jointly_as_they_do_alone(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """Law 3: one pass serves heads of one, two and three categories; each adapter ends where it ends alone."""
    base = saved_detector(tmp_path / "base", kind)
    sets = {name: {"data": str(path)} for name, path in files.items()}
    settings = {**SETTINGS, "eps": 1e-4}  # AdamW makes steps of the rounding of gradients that are almost zero
    joint = lb.train(model=str(base), adapters=sets, **settings)
    for name in sets:
        alone = lb.train(model=str(base), adapters={name: sets[name]}, **settings)
        for one, other in zip(tensors(joint.trained[name]), tensors(alone.trained[name]), strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=5e-4)
    extra = kind in ("yolos", "detr")
    path = detector_heads(tiny_detector(kind))[-1]
    heads = {name: [len(v) for k, v in joint.trained[name].modules[path].items() if k.endswith("bias")][-1] for name in sets}
    assert heads == {"one": 1 + extra, "two": 2 + extra, "three": 3 + extra}


def tensors(adapter: Any) -> list[torch.Tensor]:
    found = [tensor for path in sorted(adapter.layers) for tensor in (adapter.layers[path].A, adapter.layers[path].B)]
    return found + [values[key] for _, values in sorted(adapter.modules.items()) for key in sorted(values)]


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    runs = {"data": str(files["three"]), "output": str(tmp_path / "run"), **SETTINGS}
    lb.train(model=str(base), **runs)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(model=str(base), listeners=[SignalAt(("step", 3), signal.SIGINT)], **runs)
    assert halved.interrupted and halved.adapters["default"].steps == 3
    lb.train(model=str(base), resume=True, **runs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", sorted(DETECTORS))
@pytest.mark.filterwarnings("ignore:adapter .* have one weight:UserWarning")
def test_every_family_trains_and_is_loaded_again_from_objects(kind: str, tmp_path: Path) -> None:
    """The file's head, as wide as its categories and not as the model's, finds the same boxes in a fresh model."""
    model = tiny_detector(kind).requires_grad_(False)
    rows = table_rows(8, ("red", "green"))
    named = any(path.startswith("class_embed") for path, _ in model.named_modules())  # not in older transformers
    exclude = ["re:(class|bbox)_embed.*"] if kind == "rt_detr_v2" and named else ()  # it never calls those
    settings = {**SETTINGS, "max_steps": 2, "exclude": exclude, "detection": {"image_size": 64}}
    result = lb.train(model=model, tokenizer=processor(), data=rows, output=str(tmp_path / "run"), **settings)
    x = torch.randn(2, 3, 64, 64)
    adapter = result.trained["default"]
    first, second = (tiny_detector(kind).requires_grad_(False) for _ in range(2))
    bank = lb.attach(first)
    bank.load("mine", adapter)
    again = lb.attach(second)
    again.load("mine", lb.Adapter.load(tmp_path / "run" / "default"))
    with torch.no_grad():
        with bank.route("mine"):
            one = first(pixel_values=x)
        with again.route("mine"):
            other = second(pixel_values=x)
    assert one.logits.shape[-1] == 2 + extra_outputs(first)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.pred_boxes, other.pred_boxes)


def test_average_precision_is_cocos(tmp_path: Path) -> None:
    """A perfect answer, half of one, a shifted one (IoU 2/3), none; nothing that is wanted."""
    picture: Picture = Image.new("RGB", (64, 64))
    boxes = (Box("a", 4.0, 4.0, 20.0, 20.0), Box("b", 30.0, 30.0, 20.0, 20.0))
    row = DetectionRow(picture=picture, upright=True, digest="", width=64, height=64, boxes=boxes, origin="one", image_id=1)
    labels = ["a", "b"]
    assert coco_scores([row], [[(0.9, boxes[0]), (0.8, boxes[1])]], labels) == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert coco_scores([row], [[(0.9, boxes[0])]], labels) == pytest.approx(dict.fromkeys(METRICS, 0.5))
    shifted = [(0.9, box._replace(x=box.x + 4)) for box in boxes]
    assert coco_scores([row], [shifted], labels) == pytest.approx({"mAP": 0.4, "mAP50": 1.0, "mAP75": 0.0})
    assert coco_scores([row], [[]], labels)["mAP"] == 0.0
    assert math.isnan(coco_scores([row], [[(0.9, boxes[0])]], ["c"])["mAP"])


def test_what_cannot_be_trained_is_refused_before(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    data = str(files["two"])
    with pytest.raises(ConfigError, match=r"^eval\.metrics: expected some of loss, mAP, mAP50, mAP75, got 'map'"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "eval": {"metrics": ["map"]}})
    with pytest.raises(ConfigError, match=r"eval\.best: validation of object-detection has no metric 'mAP90'"):
        lb.train(model=str(base), data=data, **{**SETTINGS, "eval": {"best": "mAP90"}})
    with pytest.raises(ConfigError, match=r"object-detection is for detectors of the type .*, got 'Linear'"):
        lb.train(model=torch.nn.Linear(2, 2), tokenizer=processor(), data=table_rows(4), **SETTINGS)
    empty = [{"image": row["image"], "objects": {"bbox": [], "category": []}} for row in table_rows(3)]
    with pytest.raises(DataError, match="none of the 3 held-out pictures"):
        lb.train(model=tiny_detector(), tokenizer=processor(), data={"train": table_rows(4), "validation": empty}, **SETTINGS)
    with pytest.raises(DataError, match=r"none of the 3 pictures has a box.*\n.*4 × of category 'blue', none of the 2 known"):
        out = tmp_path / "run"
        lb.train(model=str(base), output=str(out), data=data, **{**SETTINGS, "max_steps": 1})
        other = coco_folder(tmp_path / "blue", 3, ("blue",))
        api.evaluate(out, DataConfig(test=str(other)), metrics=["mAP"])


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_an_adapter_alone_and_a_merged_model_make_pictures_of_the_runs_size(
    kind: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's own processor gives 32 pixels a side; the adapter was trained at 64, where a picture that isn't square fits."""
    base = saved_detector(tmp_path / "base", kind)
    if kind == "rt_detr":  # whose own stretches pictures and pads nothing
        RTDetrImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(base)
        with pytest.raises(ConfigError, match=r"detection\.image_size: RTDetr.* takes no pictures of 48 × 48 pixels"):
            lb.train(model=str(base), data=str(files["two"]), **{**SETTINGS, "detection": {"image_size": 48}})
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "detection": {"image_size": 64}}
    lb.train(model=str(base), data=str(files["two"]), output=str(tmp_path / "run"), **settings)
    adapter, data = tmp_path / "run" / "default", files["two"].parent
    shutil.copytree(adapter, tmp_path / "alone")
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--device", "cpu"]) == 0
    assert "pictures are made to fit 64 × 64 pixels and padded to that, as in training" in capsys.readouterr().out
    merged = processor_class(tmp_path / "merged").from_pretrained(tmp_path / "merged")
    wide = merged(Image.new("RGB", (96, 40)), return_tensors="pt")
    assert wide["pixel_values"].shape == (1, 3, 64, 64)
    with torch.no_grad():
        AutoModelForObjectDetection.from_pretrained(tmp_path / "merged")(**wide)
    boxes = []
    for source, name in (("run", "default"), ("alone", "alone"), ("merged", "base")):
        out, options = tmp_path / f"{source}.json", {"draw": 0}
        api.predict(tmp_path / source, data, out, [name], task="object-detection", device="cpu", options=options)
        boxes.append([(each["category"], *each["bbox"], each["score"]) for each in json.loads(out.read_text())])
    assert boxes[0] and boxes[1] == boxes[0]
    assert len(boxes[2]) == len(boxes[0])
    for mine, theirs in zip(boxes[2], boxes[0], strict=True):
        assert mine[0] == theirs[0] and mine[1:] == pytest.approx(theirs[1:], abs=0.02)
