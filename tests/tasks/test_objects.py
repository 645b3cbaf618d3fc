"""Models given as objects, for every task: trained over, scored and asked without a name that the command line could load."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import lorabank as lb
from lorabank.config.images import ImagesConfig
from lorabank.errors import AdapterNameError, ConfigError, DataError, FingerprintError, MergeError, OutputError
from lorabank.tasks import task_kind
from lorabank.tasks.images.preprocess import plain_processor
from lorabank.training.task import BaseRequest
from tests.tasks.every import EVERY
from tests.tasks.images.made import folder
from tests.training.test_joint import Recorder
from tests.training.tiny import tiny_tokenizer

FEW: dict[str, Any] = {"rank": 2, "max_steps": 1, "learning_rate": 1e-3, "batch_size": 2, "device": "cpu", "threads": 1}
FEW |= {"eval": {"samples": 0, "max_new_tokens": 3}}
MORE: Mapping[str, Mapping[str, Any]] = {
    "translation": {"seq2seq": {"source_lang": "en", "target_lang": "de"}},
    "image-classification": {"images": {"augment": []}},
    "object-detection": {"detection": {"augment": []}},
    "automatic-speech-recognition": {"speech": {"timestamps": "keep"}},
    "text-to-image": {"diffusion": {"resolution": 64, "cache": "none", "sample_steps": 1}},
}
OUTPUTS = {"text-to-speech": "out", "object-detection": "out", "text-to-image": "out"}
"""Folders; others write JSON lines."""
SHORT: Mapping[str, Mapping[str, Any]] = {
    task: {"max_new_tokens": 3} for task in ("text-generation", "summarization", "translation", "text2text-generation")
}


def looks(modules: Iterable[nn.Module]) -> list[Any]:
    """What a user could see of modules: classes, modes, hooks, attributes' names, and each tensor's bytes and flag."""
    seen: list[Any] = []
    for module in modules:
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        seen.append((type(module), module.training, hooks, sorted(vars(module)), list(module._modules)))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                seen.append((name, type(tensor), tensor.requires_grad, tensor.dtype, hashlib.sha256(raw).hexdigest()))
    return seen


def objects(task: str, folder: Path) -> tuple[Any, Any, list[nn.Module]]:
    """(model, processor, all modules of the model in training mode), without a name."""
    if task == "text-to-image":
        from diffusers import StableDiffusionPipeline

        model: Any = StableDiffusionPipeline.from_pretrained(str(folder))
        processor, parts = None, (model.unet, model.text_encoder, model.vae)
    else:
        base = task_kind(task).load(BaseRequest(model=str(folder), device="cpu", dtype="fp32"), lambda line: None)
        model, processor, parts = base.model, base.processor, (base.model,)
        model.config._name_or_path = ""
    for part in parts:
        part.train()
    return model, processor, [module for part in parts for module in part.modules()]


def rows_in(data: Path) -> list[dict[str, Any]]:
    """The rows that the data of `every.py` are, as dicts."""
    if data.suffix == ".jsonl":
        return [json.loads(line) for line in data.read_text().splitlines()]
    if data.suffix == ".json":
        coco = json.loads(data.read_text())
        names = {each["id"]: each["name"] for each in coco["categories"]}
        return [
            {
                "image": str(data.parent / image["file_name"]),
                "objects": [
                    {"bbox": note["bbox"], "category": names[note["category_id"]]}
                    for note in coco["annotations"]
                    if note["image_id"] == image["id"]
                ],
            }
            for image in coco["images"]
        ]
    if (data / "metadata.csv").is_file():
        with (data / "metadata.csv").open() as file:
            return [
                {"audio": str(data / row["file_name"]), "transcription": row["transcription"]} for row in csv.DictReader(file)
            ]
    texts = sorted(data.glob("*.txt"))
    if texts:
        return [{"image": str(text.with_suffix(".png")), "text": text.read_text()} for text in texts]
    return [{"image": str(file), "label": file.parent.name} for file in sorted(data.glob("*/*.png"))]


@pytest.mark.parametrize("task", EVERY)
def test_a_run_over_an_object_is_scored_and_asked_with_it(task: str, tmp_path: Path) -> None:
    where, data = EVERY[task](tmp_path)
    model, processor, modules = objects(task, where)
    before, run = looks(modules), tmp_path / "run"
    settings = {**FEW, **MORE.get(task, {})}
    adapters = {"own": {"data": str(data)}}
    result = lb.train(model=model, tokenizer=processor, task=task, adapters=adapters, output=str(run), **settings)
    assert looks(modules) == before
    (title, lines) = result.next_lines[0]
    assert title and lines and all(line.startswith(f"lorabank.predict({str(run)!r}, ") for line in lines), lines

    rows = rows_in(data)
    scored = lb.evaluate(run, str(data), ["own"], model=model)["own"]
    assert looks(modules) == before
    assert scored["loss"] > 0
    of_rows = lb.evaluate(result.trained, rows, model=model, tokenizer=processor, max_new_tokens=3)["own"]
    assert of_rows == pytest.approx(scored, rel=1e-6)
    assert looks(modules) == before

    asked = [{"prompt": f"a cat {row['text'][-1]}"} for row in rows] if task == "text-to-image" else rows[:2]
    output = tmp_path / OUTPUTS.get(task, "out.jsonl")
    told = lb.predict(run, asked[:2], output, ["own"], model=model, options=SHORT.get(task))
    assert looks(modules) == before
    assert output.exists() and str(output) in told
    if output.suffix:
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(answers) == 2 and all(answer["own"] is not None for answer in answers), answers
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(asked * 2), test=datasets.Dataset.from_list(asked[:1]))
    told = lb.predict(run, splits, output.with_stem("of_splits"), ["own"], model=model, options=SHORT.get(task))
    assert re.match(r"1 (row|picture|recording|text)\b", told), told


# ---- one small model of one's own -------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    **FEW,
    "task": "image-classification",
    "targets": "all-conv",
    "images": {"image_size": 16, "augment": []},
}


def own_net(labels: int = 10, seed: int = 0) -> nn.Sequential:
    """Convolutions and a head that no library knows."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, labels))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return folder(tmp_path / "pictures", each=4)


def test_a_plain_processor_is_made_and_used_again(pictures: Path, tmp_path: Path) -> None:
    net, heard = own_net(), Recorder()
    before = looks(net.modules())
    images = {**SMALL["images"], "mean": [0.1, 0.2, 0.3]}
    result = lb.train(
        model=net, data=str(pictures), output=str(tmp_path / "run"), listeners=[heard], **{**SMALL, "images": images}
    )
    assert any("no image processor given" in notice.text for notice in heard.notices)
    rows = rows_in(pictures)
    of_run = lb.evaluate(tmp_path / "run", rows, model=net)
    of_values = lb.evaluate(result.trained["default"], datasets.Dataset.from_list(rows), model=net)
    assert of_run["default"] == of_values["default"]
    other = ViTImageProcessor(size={"height": 16, "width": 16})
    assert lb.evaluate(result.trained, rows, model=net, tokenizer=other) != of_values
    assert looks(net.modules()) == before


def test_values_that_a_processor_was_made_for_ask_for_it(pictures: Path) -> None:
    net, processor = own_net(), ViTImageProcessor(size={"height": 16, "width": 16})
    result = lb.train(model=net, tokenizer=processor, data=str(pictures), **SMALL)
    with pytest.raises(ConfigError, match=r"tokenizer: missing\. the adapters given: trained on what a ViTImageProcessor"):
        lb.evaluate(result.trained, str(pictures), model=net)
    assert lb.evaluate(result.trained, {"train": [], "test": rows_in(pictures)}, model=net, tokenizer=processor)


def test_a_model_by_itself_is_scored_on_pictures_of_one_class(pictures: Path) -> None:
    rows, told = rows_in(pictures), list[str]()
    labels = sorted({row["label"] for row in rows})
    net = ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
        )
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    (found,) = lb.evaluate(
        None, [row for row in rows if row["label"] == labels[0]], ["base"], model=net, tokenizer=processor,
        task="image-classification", say=told.append,
    ).values()  # fmt: skip
    assert found["loss"] > 0
    assert "train" not in " ".join(told)


def test_what_is_missing_is_asked_for(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = own_net()
    trained = lb.train(model=net, data=str(pictures), **SMALL).trained
    monkeypatch.chdir(pictures)  # "" as a path would be here
    for nothing in (None, ""):
        with pytest.raises(DataError, match=r"^data: missing\. Expected a path, or rows"):
            lb.predict(trained, nothing, tmp_path / "out.jsonl", model=net)
    with pytest.raises(DataError, match=r"^data: is empty\. Expected a path"):
        lb.evaluate(trained, "", model=net)
    with pytest.raises(DataError, match=r"^data\.train: is empty\. Expected a folder"):
        lb.train(model=net, data="", **SMALL)
    with pytest.raises(ConfigError, match=r"got an empty dict\. Give some \(result\.trained\)"):
        lb.evaluate({}, str(pictures), model=net)
    with pytest.raises(ConfigError, match=r"metrics: expected a list of names, got the text 'accuracy'\. Write \['accuracy'\]"):
        lb.evaluate(trained, str(pictures), model=net, metrics="accuracy")
    with pytest.raises(DataError, match=r"none of the 10 that 'base' has"):  # for the adapters' task
        lb.evaluate(trained, str(pictures), ["base"], model=net)
    told = lb.predict(trained, [rows_in(pictures)[0], {"other": 1}], tmp_path / "out.jsonl", model=net)
    assert "out.jsonl" in told
    assert "there is no column 'image'" in (tmp_path / "out.jsonl").read_text()


def test_a_test_split_without_labels_is_told_with_what_is_beside_it(pictures: Path, tmp_path: Path) -> None:
    net = own_net()
    trained = lb.train(model=net, data=str(pictures), **SMALL).trained
    rows, repo = rows_in(pictures), tmp_path / "repo"
    repo.mkdir()
    for name, labelled in (("train", True), ("validation", True), ("test", False)):
        with (repo / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *((r["image"], r["label"] if labelled else "") for r in rows)])
    wanted = r"(?s)none of the 12 pictures can .*\nThese are the split 'test' of .*such as .*validation\.csv\), or leave the data"
    with pytest.raises(DataError, match=wanted):
        lb.evaluate(trained, str(repo), model=net)
    assert lb.evaluate(trained, str(repo / "validation.csv"), model=net)


def test_an_error_leaves_the_object_as_it_was(pictures: Path, tmp_path: Path) -> None:
    net = own_net()
    result = lb.train(model=net, data=str(pictures), output=str(tmp_path / "run"), **SMALL)
    other = own_net(seed=1)
    before, before_other = looks(net.modules()), looks(other.modules())
    run, out, one = tmp_path / "run", tmp_path / "out.jsonl", str(pictures / "red")
    with pytest.raises(FingerprintError):
        lb.predict(run, one, out, model=other)
    for kind, message, call in (
        (DataError, "no file or folder", lambda: lb.evaluate(run, str(tmp_path / "none.csv"), model=net)),
        (DataError, "expected a picture|no column|expected at least one", lambda: lb.predict(run, [{"x": 1}], out, model=net)),
        (DataError, "splits with one of test, validation", lambda: lb.evaluate(run, {"a": [], "b": []}, model=net)),
        (ConfigError, "rouge", lambda: lb.evaluate(run, one, metrics=["rouge"], model=net)),
        (
            ConfigError,
            "no such setting",
            lambda: lb.evaluate(None, one, model=net, task=SMALL["task"], settings={"language": "x"}),
        ),
        (ConfigError, "settings of its own", lambda: lb.evaluate(run, one, model=net, settings={"min_size": 9})),
        (ConfigError, r"expected a list of names, got the text 'default'", lambda: lb.evaluate(run, one, "default", model=net)),  # type: ignore[arg-type]
        (ConfigError, "no run and no adapter there", lambda: lb.evaluate(str(tmp_path / "gone"), one, model=net)),
        (ConfigError, "got int", lambda: lb.evaluate(3, one, model=net)),  # type: ignore[arg-type]
        (ConfigError, "knows no option|has no option", lambda: lb.predict(run, one, out, model=net, options={"beams": 2})),
        (OutputError, "exists already", lambda: lb.predict(run, one, tmp_path, model=net)),
        (AdapterNameError, "no adapter 'other'", lambda: lb.predict(result.trained, one, out, ["other"], model=net)),
        (ConfigError, "give it in Python: lorabank.predict", lambda: lb.predict(run, one, out)),
        (ConfigError, "tokenizer: given without a model as an object", lambda: lb.predict(run, one, out, tokenizer=object())),
        (ConfigError, "expected a torch.nn.Module, or a model's name, got dict", lambda: lb.predict(run, one, out, model={})),
    ):
        with pytest.raises(kind, match=message):
            call()
        assert looks(net.modules()) == before
    assert looks(other.modules()) == before_other
    assert not out.exists()


def test_the_object_by_itself_is_scored(pictures: Path, tmp_path: Path) -> None:
    net = own_net(labels=2)
    rows = [{"image": row["image"], "label": str(i % 2)} for i, row in enumerate(rows_in(pictures))]
    scores = lb.evaluate(None, rows, ["base"], model=net, task="image-classification", metrics=["accuracy"])
    assert scores.keys() == {"base"}
    lb.predict(None, rows[:1], tmp_path / "out.jsonl", ["base"], model=net, task="image-classification")
    assert json.loads((tmp_path / "out.jsonl").read_text())["base"]["label"] in ("0", "1")


def test_it_is_merged_into_once_its_head_has_as_many_labels(pictures: Path, tmp_path: Path) -> None:
    net = own_net().eval()
    (adapter,) = lb.train(model=net, data=str(pictures), **{**SMALL, "max_steps": 5}).trained.values()
    rows = rows_in(pictures)
    scores = lb.evaluate(adapter, rows, model=net)["default"]
    with pytest.raises(MergeError, match=r"model.set_submodule\('5', torch.nn.Linear\(8, 3\)\)"):
        lb.merge(net, adapter)
    net.set_submodule("5", torch.nn.Linear(8, 3))
    lb.merge(net, adapter, say=None)
    names = json.loads(adapter.metadata["labels"])
    numbered = [{**row, "label": str(names.index(row["label"]))} for row in rows]
    how: dict[str, Any] = {"task": "image-classification", "tokenizer": plain_processor(ImagesConfig(image_size=16))}
    assert lb.evaluate(None, numbered, ["base"], model=net, **how)["base"] == pytest.approx(scores, rel=1e-4)


# ---- what prepares inputs -----------------------------------------------------------------------------------------------

EXPECTED = {
    "text-generation": "a tokenizer of transformers",
    "text-classification": "a tokenizer of transformers",
    "summarization": "a tokenizer of transformers",
    "image-classification": "an image processor of transformers",
    "object-detection": "an image processor of transformers",
    "automatic-speech-recognition": "a WhisperProcessor, which is a feature extractor and a tokenizer",
    "text-to-speech": "a SpeechT5Processor, which is a feature extractor and a tokenizer",
    "text-to-image": "no object beside the model, since a pipeline has its tokenizers itself",
}


@pytest.mark.parametrize("task", EXPECTED)
def test_another_object_as_tokenizer_is_refused_by_name(task: str) -> None:
    wrong = tiny_tokenizer() if "image" in task or "object" in task else ViTImageProcessor()
    for given, said in (("x", "the str 'x'"), (object(), "an object"), (wrong, f"an? {type(wrong).__name__}")):
        with pytest.raises(ConfigError, match=rf"tokenizer: {task} expects {re.escape(EXPECTED[task])}.*, got {said}"):
            lb.train(model=nn.Linear(2, 2), tokenizer=given, task=task, data=[{"text": "a"}], max_steps=1)
    if task not in ("image-classification", "text-to-image"):
        with pytest.raises(ConfigError, match=rf"tokenizer: missing. {task} .*needs {re.escape(EXPECTED[task])}"):
            lb.train(model=nn.Linear(2, 2), task=task, data=[{"text": "a"}], max_steps=1)


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ({}, "image-classification", "model: expected a torch.nn.Module, or a model's name, got dict"),
        (nn.ReLU(), "image-classification", "model: the ReLU given has no parameters"),
        (nn.Linear(2, 2), "text-to-image", r"expects a pipeline of diffusers \(StableDiffusionPipeline, .*\), got Linear"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lb.train(model=model, task=task, data=[{"text": "a"}], max_steps=1)
