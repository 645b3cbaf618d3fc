"""A classifier's head of an adapter's own, in every family that has one: rows stay apart, and PEFT's model computes the same."""

from __future__ import annotations

import pytest
import torch

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import saved_modules
from lorabank.bank.in_full.heads import head_paths
from tests.bank.families import FAMILIES
from tests.bank.family import MIXED, ROWS, Family, answers, check_close, made
from tests.bank.tiny import fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rank 2 is above what layer"),
    pytest.mark.filterwarnings("ignore:.*adapters get no head of their own"),  # LeViT's
]
LORA = ("efficientnet", "poolformer")
"""Families in which the head's layer is the only linear one, so that `all-linear` asks for LoRA there."""
KINDS = ("distilbert xlnet funnel vit swin resnet levit videomae vilt layoutlmv3 efficientnet poolformer").split()


@pytest.mark.parametrize("name", KINDS)
def test_rows_have_the_heads_of_their_adapters(name: str) -> None:
    family: Family = FAMILIES[name]
    model = made(family)
    heads = head_paths(model)
    assert heads, name
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2, targets=list(family.targets), exclude=list(family.exclude)))
    fill(bank, "a")
    own = set(saved_modules(bank).paths("a"))
    if name in LORA:
        assert not own
        assert all(path.startswith(tuple(heads)) for path in bank.adapter("a").layers)
    else:
        assert own == (set() if name == "levit" else set(heads))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, leaf in saved_modules(bank).leaves("a"):
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.2)
        found = {}
        for route in ("a", BASE):
            with bank.route(route):
                found[route] = answers(model, family)
        if family.apart or family.mixes:
            return
        with bank.route(MIXED):
            mixed = answers(model, family)
    for m, a, b in zip(mixed, found["a"], found[BASE], strict=True):
        if len(m) == ROWS:
            check_close([m[[0, 2]]], [a[[0, 2]]])
            check_close([m[1]], [b[1]])
