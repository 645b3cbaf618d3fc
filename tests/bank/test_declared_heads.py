"""A classifier of one's own: its head is declared, and each adapter has one with its own number of labels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorabank as lb
from lorabank.bank.bank import saved_modules
from lorabank.errors import AdapterFileError, ConfigError

CONVOLUTIONS = ["all-linear", "all-conv"]


class Net(nn.Module):
    """A small convolutional net of nobody's library, whose head is of two layers."""

    def __init__(self, labels: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, labels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(self.stem(x).relu()))
        return self.head(h.mean((2, 3)))


def banked(**labels: int) -> lb.AdapterBank:
    bank = lb.attach(Net().eval(), head="head")
    for name, count in labels.items():
        bank.add(name, lb.AdapterConfig(rank=2, targets=CONVOLUTIONS), num_labels=count, seed=len(name))
    return bank


pytestmark = pytest.mark.filterwarnings("ignore:.*each adapter trains a head of its own")


def test_each_adapter_gets_a_head_with_its_own_number_of_labels() -> None:
    bank = banked(two=2, twelve=12)
    assert saved_modules(bank).paths("two") == ("head",)
    x = torch.randn(3, 3, 8, 8)
    with bank.route(["two", lb.BASE, "twelve"]):
        y = bank.model(x)
    assert [int(row.isfinite().sum()) for row in y] == [2, 10, 12]
    assert bool((y[0, 2:] == -math.inf).all())
    for row, (name, width) in enumerate((("two", 2), (lb.BASE, 10), ("twelve", 12))):
        with bank.route(name):
            torch.testing.assert_close(bank.model(x)[row], y[row, :width])


def test_the_file_of_one_loads_over_a_base_whose_head_is_another(tmp_path: Path) -> None:
    bank = banked(four=4)
    bank.adapter("four").save(tmp_path / "four")
    model = Net(labels=3).eval()
    with torch.no_grad():
        for key, value in Net().state_dict().items():
            if not key.startswith("head.2"):
                model.state_dict()[key].copy_(value)
    undeclared = lb.attach(model)
    with pytest.raises(AdapterFileError, match=r"is \(4,.*, the model has \(3,.*lorabank.attach\(model, head='head'\)"):
        undeclared.load("four", lb.Adapter.load(tmp_path / "four"))
    undeclared.detach()
    other = lb.attach(model, head="head")
    other.load("four", lb.Adapter.load(tmp_path / "four"))
    x = torch.randn(2, 3, 8, 8)
    with bank.route("four"), other.route("four"):
        torch.testing.assert_close(other.model(x), bank.model(x))


def test_a_wrong_head_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"head: the model has no module 'haed' \(did you mean 'head'\?\)"):
        lb.attach(Net(), head="haed")
    with pytest.raises(ConfigError, match="head: 'norm' is a BatchNorm2d without a linear layer"):
        lb.attach(Net(), head="norm")
