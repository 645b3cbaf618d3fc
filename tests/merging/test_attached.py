"""Merging into a model that a bank is attached to: the wrappers share the base's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lorabank.bank.attach import attach
from lorabank.bank.routing import BASE
from lorabank.formats.adapter import Adapter
from lorabank.formats.fingerprint import Fingerprint
from lorabank.merging.check import check_merged
from lorabank.merging.merge import merge

MakeAdapter = Callable[..., Adapter]
IDS = torch.arange(24).reshape(2, 12) % 64


def test_a_merge_under_a_bank_equals_the_adapter_in_its_slot(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    bank = attach(base)
    bank.load("one", adapter)
    with torch.no_grad():
        with bank.route(BASE):
            plain = base(IDS).logits
        with bank.route("one"):
            expected = base(IDS).logits
        handle = merge(base, bank.adapter("one"))
        with bank.route(BASE):
            torch.testing.assert_close(base(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        handle.unmerge()
        with bank.route(BASE):
            assert torch.equal(base(IDS).logits, plain)
        bank.detach()
        assert torch.equal(base(IDS).logits, plain)


def test_the_check_works_under_a_bank(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    bank = attach(base)
    bank.load("one", adapter)
    with bank.route(BASE):
        found = check_merged(base, adapter, IDS)
    assert found.difference < 1e-4 < 1e-2 < found.change


def test_attaching_leaves_the_fingerprint(base: nn.Module, make_adapter: MakeAdapter) -> None:
    before = Fingerprint.of(base)
    bank = attach(base)
    bank.load("one", make_adapter(base))
    assert Fingerprint.of(base) == before
