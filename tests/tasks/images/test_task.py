"""Image classification from folders to predictions: alone, jointly with other label sets, resumed, loaded again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

import lorabank as lb
from lorabank import api
from lorabank.cli.main import main
from lorabank.config.images import ImagesConfig
from lorabank.config.train import DataConfig
from lorabank.errors import ConfigError, DataError, FingerprintError, OutputError
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.images.preprocess import plain_processor
from tests.tasks.images.made import folder, picture
from tests.training.children import SignalAt
from tests.training.tiny import assert_same_run

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS: dict[str, Any] = {
    "task": "image-classification",
    "rank": 4,
    "learning_rate": 1e-2,
    "batch_size": 6,
    "max_steps": 6,
    "val_split": 0.25,
    "eval": {"every": 3, "samples": 1},
    "save": {"every": 3},
}
CONVOLUTIONS = ["all-linear", "all-conv"]
FAMILIES: dict[str, Any] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ),
    "efficientnet": lambda: hf.EfficientNetForImageClassification(
        hf.EfficientNetConfig(
            image_size=16,
            width_coefficient=0.2,
            depth_coefficient=0.2,
            hidden_dim=256,
            kernel_sizes=[3, 3],
            in_channels=[32, 16],
            out_channels=[16, 24],
            depthwise_padding=[],
            strides=[1, 2],
            num_block_repeats=[1, 1],
            expand_ratios=[1, 4],
        )
    ),
}


class Net(nn.Module):
    """A net of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.depthwise(self.stem(x).relu())).relu().mean((2, 3)))


def saved(where: Path, family: str = "vit") -> Path:
    """A tiny model's folder, without an image processor."""
    torch.manual_seed(0)
    with quiet_transformers():
        FAMILIES[family]().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sets of labels."""
    root = tmp_path_factory.mktemp("pictures")
    return {
        "three": folder(root / "three", each=8),
        "two": folder(root / "two", each=8, classes=("red", "grey")),
        "four": folder(root / "four", each=4, classes=("red", "green", "blue", "grey")),
    }


def tensors(adapter: lb.Adapter) -> list[Tensor]:
    found = [tensor for path in sorted(adapter.layers) for tensor in (adapter.layers[path].A, adapter.layers[path].B)]
    return found + [values[key] for _, values in sorted(adapter.modules.items()) for key in sorted(values)]


def processor() -> Any:
    return plain_processor(ImagesConfig(image_size=16))


def test_it_learns_is_scored_shown_loaded_and_predicts(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    settings = {**SETTINGS, "max_steps": 40, "eval": {"every": 20, "metrics": ["loss", "accuracy"], "best": "accuracy"}}
    result = lb.train(model=str(base), output=str(tmp_path / "run"), data=str(data["three"]), **settings)
    assert result.adapters["default"].best_metrics["accuracy"] == 1.0
    assert "top5_accuracy" not in result.adapters["default"].best_metrics
    evals = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    during = [row["metrics"] for row in evals if row["event"] == "eval"]
    assert during and {"loss", "accuracy", "f1_macro"} <= set(during[0])
    for file in ("confusion-default.png", "samples-default.png"):
        with Image.open(tmp_path / "run" / file) as image:
            assert min(image.size) > 150
        assert file in (tmp_path / "run" / "samples.md").read_text()
    new = tmp_path / "new"
    new.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        picture(colour, 900 + number).save(new / f"{number}.png")
    (new / "3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 of 4 pictures can't be used:\n  - 1 × no picture .*3\.png"):
        api.predict(tmp_path / "run", str(new), tmp_path / "out.jsonl", options={"bad_rows": "stop"})
    with pytest.raises(OutputError, match=r"out\.csv: expected a name for JSON lines, got \.csv\. Name it out\.jsonl\."):
        api.predict(tmp_path / "run", str(new), tmp_path / "out.csv")
    told = api.predict(tmp_path / "run", str(new), tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["default"]["label"] for line in lines[:3]] == ["red", "green", "blue"]
    assert lines[3] == {"image": str(new / "3.png"), "error": "no picture that can be read (another format, or damaged)"}
    assert "3 pictures labelled by default, 1 couldn't be read" in told
    assert (tmp_path / "out.png").is_file()
    scores = api.evaluate(tmp_path / "run", DataConfig(test=str(data["three"])), metrics=["accuracy"])
    assert scores["default"]["accuracy"] == 1.0
    few = api.evaluate(tmp_path / "run", DataConfig(test=str(data["three"])), metrics=["accuracy"], max_rows=2)
    assert few["default"]["loss"] != scores["default"]["loss"]
    with pytest.raises(DataError, match=r"its label 'grey' is none of the 3 that 'default' has|'grey' is none of the 3 known"):
        api.evaluate(tmp_path / "run", DataConfig(test=str(folder(tmp_path / "g", each=2, classes=("grey",)))), metrics=[])


@pytest.mark.parametrize("family", FAMILIES)
def test_three_label_sets_train_jointly_as_they_do_alone(family: str, data: dict[str, Path]) -> None:
    """Law 3, with augmentation: one pass serves heads of two, three and four labels; each adapter ends where it ends alone."""
    torch.manual_seed(1)
    model = FAMILIES[family]()
    settings = {
        **SETTINGS,
        "images": {"augment": ["crop", "flip", "rotate", "colour", "erase"], "image_size": 16},
        "max_steps": 3,
    }
    targets = "all-linear" if family in ("vit", "swin") else CONVOLUTIONS
    three = {name: {"data": str(path), "targets": targets, "seed": 5 + i} for i, (name, path) in enumerate(data.items())}
    joint = lb.train(model=model, tokenizer=processor(), adapters=three, **settings)
    for name in three:
        alone = lb.train(model=model, tokenizer=processor(), adapters={name: three[name]}, **settings)
        for one, other in zip(tensors(joint.trained[name]), tensors(alone.trained[name]), strict=True):
            torch.testing.assert_close(one, other, atol=3e-5, rtol=3e-4)
    widths = {
        name: next(v["weight"] for v in map(flat, adapter.modules.values())).shape[0] for name, adapter in joint.trained.items()
    }
    assert widths == {"three": 3, "two": 2, "four": 4}


def flat(values: Any) -> dict[str, Tensor]:
    """A head's values, whether or not its layer lies in a Sequential."""
    return {key.rpartition(".")[2]: value for key, value in values.items()}


def test_windows_that_swin_folds_keep_each_rows_adapter() -> None:
    """Law 2: rows of several adapters in one batch are those of batches of their own, and their gradients too."""
    torch.manual_seed(0)
    model = FAMILIES["swin"]().eval()
    bank = lb.attach(model)
    for name, labels in (("a", 3), ("b", 5)):
        bank.add(name, lb.AdapterConfig(rank=2), num_labels=labels, seed=labels)
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.1)
    x = torch.randn(5, 3, 16, 16)
    rows: list[Any] = ["a", lb.BASE, "b", "a", "b"]
    weights = torch.randn(5, 2)

    def run(chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        for p in bank.parameters():
            p.grad = None
        with bank.route([rows[i] for i in chosen]):
            y = model(pixel_values=x[chosen]).logits
            loss = (y[:, :2] * weights[chosen]).sum()
            if loss.requires_grad:  # the base's rows alone have nothing to train
                loss.backward()
        return y.detach(), {k: p.grad.clone() for k, p in bank.named_parameters() if p.grad is not None}

    mixed, gradients = run([0, 1, 2, 3, 4])
    total: dict[str, Tensor] = {}
    for i in range(5):
        alone, own = run([i])
        torch.testing.assert_close(alone[0], mixed[i, : alone.shape[1]], rtol=1e-4, atol=1e-5)
        for key, value in own.items():
            total[key] = total.get(key, torch.zeros_like(value)) + value
    for key, value in gradients.items():  # small elements round by parts of the large ones
        assert (value - total[key]).norm() <= 1e-3 * total[key].norm(), key


def test_several_adapters_of_a_base_without_names_predict(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    adapters = {name: {"data": str(data[name])} for name in ("three", "two")}
    lb.train(model=str(base), adapters=adapters, output=str(tmp_path / "run"), **{**SETTINGS, "max_steps": 1})
    told = api.predict(tmp_path / "run", str(data["two"]), tmp_path / "out.jsonl")
    assert told.startswith("16 pictures labelled by three, two: ")
    assert "; the first of them in " in told and all((tmp_path / f"out-{name}.png").is_file() for name in ("three", "two"))
    assert not (tmp_path / "out.png").exists()  # whose answers would these be?
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {len(line["three"]["top"]) for line in lines} == {3} and {len(line["two"]["top"]) for line in lines} == {2}


def test_a_net_of_ones_own_gets_its_head_found_and_made_anew(data: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    adapters = {name: {"data": str(data[name]), "targets": CONVOLUTIONS} for name in ("three", "four")}
    settings = {**SETTINGS, "max_steps": 3, "output": str(tmp_path / "run")}
    result = lb.train(model=net, tokenizer=processor(), adapters=adapters, **settings)
    assert {name: adapter.modules["fc"]["weight"].shape for name, adapter in result.trained.items()} == {
        "three": (3, 8),
        "four": (4, 8),
    }
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    bank = lb.attach(net, head="fc")
    bank.load("four", lb.Adapter.load(tmp_path / "run" / "four"))
    with bank.route("four"):
        assert net(torch.randn(2, 3, 16, 16)).shape == (2, 4)


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    runs = {"data": str(data["four"]), "output": str(tmp_path / "run"), **SETTINGS}
    lb.train(model=str(base), **runs)
    (tmp_path / "run").rename(tmp_path / "whole")  # the same output, which is in config.yaml
    halved = lb.train(model=str(base), listeners=[SignalAt(("step", 4), signal.SIGINT)], **runs)
    assert halved.interrupted and halved.adapters["default"].steps == 4
    lb.train(model=str(base), resume=True, **runs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    for file in ("samples-default.png", "confusion-default.png", "samples.md"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_training_goes_on_with_the_labels_of_init_from(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    lb.train(model=str(base), output=str(tmp_path / "one"), data=str(data["four"]), **SETTINGS)
    more = lb.train(
        model=str(base),
        adapters={"more": {"data": str(data["three"]), "init_from": str(tmp_path / "one" / "default")}},
        **SETTINGS,
    )
    assert more.trained["more"].modules["classifier"]["weight"].shape[0] == 4
    assert json.loads(more.trained["more"].metadata["labels"]) == ["blue", "green", "grey", "red"]
    said = json.loads((tmp_path / "one" / "default" / "lorabank.json").read_text())
    said["metadata"] = {"task": "text-classification", "labels": '["neg", "pos"]', "labels.kind": "single"}
    said["fingerprint"]["tensors"] = {f"bert.{path}": value for path, value in said["fingerprint"]["tensors"].items()}
    (tmp_path / "one" / "default" / "lorabank.json").write_text(json.dumps(said))
    with pytest.raises(FingerprintError, match="was trained on another base model"):  # not that red isn't among neg and pos
        lb.train(model=str(base), data=str(data["three"]), init_from=str(tmp_path / "one" / "default"), **SETTINGS)


def test_the_models_own_head_is_kept_where_asked(data: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=4, id2label={0: "red", 1: "blue", 2: "green"})
    with quiet_transformers():
        hf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    result = lb.train(model=str(tmp_path / "vit"), data=str(data["three"]), modules_to_save=[], **SETTINGS)
    assert not result.trained["default"].modules
    assert "accuracy" in result.base_metrics
    assert json.loads(result.trained["default"].metadata["labels"]) == ["red", "blue", "green"]


def test_a_merged_model_has_the_labels_names(base: Path, data: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for name in ("two", "four"):  # the base has two labels of its own, called by their numbers
        lb.train(model=str(base), output=str(tmp_path / name), data=str(data[name]), **{**SETTINGS, "max_steps": 2})
        assert main(["merge", str(tmp_path / name / "default"), "--output", str(tmp_path / f"{name}-merged")]) == 0
    assert "labels: blue, green, grey, red" in capsys.readouterr().out
    with quiet_transformers():
        merged = [hf.AutoModelForImageClassification.from_pretrained(tmp_path / f"{name}-merged") for name in ("two", "four")]
    assert merged[0].config.id2label == {0: "grey", 1: "red"}
    assert merged[1].config.label2id == {"blue": 0, "green": 1, "grey": 2, "red": 3}
    of_task = ["--task", "image-classification", "--data", str(data["four"])]
    for source, name in ((tmp_path / "four" / "default", "adapter"), (tmp_path / "four-merged", "merged")):
        assert main(["predict", str(source), *of_task, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
    by_adapter, by_merged = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("adapter", "merged")
    )
    assert [line["base"]["label"] for line in by_merged] == [line["default"]["label"] for line in by_adapter]
    assert main(["eval", str(tmp_path / "four-merged"), *of_task]) == 0
    one = ["--task", "image-classification", "--data", str(folder(tmp_path / "one", each=2, classes=("red",)))]
    assert main(["eval", str(tmp_path / "four-merged"), *one]) == 0  # two classes are for training
    assert "labels without a training picture" not in capsys.readouterr().err
    for command in (["eval", str(base), *of_task], ["predict", str(base), *of_task, "--output", str(tmp_path / "x.jsonl")]):
        assert main(command) == 2  # a random head says nothing
        assert "a base model without adapters, whose head has no names of labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eval": {"metrics": ["bleu"]}}, ConfigError, r"eval\.metrics: expected some of loss, accuracy"),
        ({"eval": {"best": "acuracy"}, "data": "none.csv"}, ConfigError, r"no metric 'acuracy' \(did you mean 'accuracy'\?\)"),
        ({"images": {"bad_rows": "stop"}}, ConfigError, r"images\.bad_rows: is `data\.bad_rows` now"),
        ({"images": {"imagesize": 3}}, ConfigError, r"image_size"),
        ({"images": {"label_column": "kind"}, "data": "a.csv"}, DataError, r"no file or folder"),
        (
            {"images": {"image_size": 20}},
            ConfigError,
            r"images\.image_size: ViT\w+ takes no pictures of 20 × 20 pixels",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    base: Path, data: dict[str, Path], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lb.train(model=str(base), **{**SETTINGS, "data": str(data["three"]), **settings})


def test_what_five_labels_have_not_is_refused(
    base: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "max_steps": 1, "eval": {"every": 1, "samples": 0}}
    few = r"eval\.metrics: top5_accuracy is for more than 5 labels, and there are 3\. Leave it out"
    with pytest.raises(ConfigError, match=few):
        asked = {**settings, "eval": {"metrics": ["top5_accuracy"]}}
        lb.train(model=str(base), output=str(tmp_path / "run"), data=str(data["three"]), **asked)
    assert not (tmp_path / "run").exists()
    lb.train(model=str(base), output=str(tmp_path / "run"), data=str(data["three"]), **settings)
    words = ["eval", str(tmp_path / "run"), "--device", "cpu", "--metrics"]
    assert main([*words, "top5_accuracy"]) == 2
    assert "--metrics: top5_accuracy is for more than 5 labels, and there are 3." in capsys.readouterr().err
    assert main([*words, "acuracy"]) == 2
    assert "--metrics: expected some of loss, accuracy" in (said := capsys.readouterr().err)
    assert "did you mean 'accuracy'" in said


def test_a_convolutional_nets_all_linear_is_its_head_alone_and_refused(data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.default\.targets: .* are its head's.* 'all-conv'"):
        lb.train(model=FAMILIES["resnet"](), tokenizer=processor(), data=str(data["three"]), **SETTINGS)
