"""Any architecture: rows of a batch stay apart, and what can't be done is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.errors import RoutingError, TargetError, UnreachedLayerError
from tests.bank.families import FAMILIES
from tests.bank.family import MIXED, ROWS, Family, answers, bank_of, check_close, check_gradients, loss, made
from tests.bank.tiny import clear, gradients

pytestmark = [pytest.mark.filterwarnings("ignore:.*rank 2 is above what layer")]  # gates of one feature, and the like
PARTS = [name for name, family in FAMILIES.items() if family.left]
APART = [name for name, family in FAMILIES.items() if not family.apart and not family.mixes]
TOGETHER = [name for name, family in FAMILIES.items() if family.apart]


def _under(
    bank: AdapterBank, family: Family, route: object, rows: list[int] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    clear(bank)
    with bank.route(route):  # pyright: ignore[reportArgumentType]
        found = answers(bank.model, family)
        if route is not BASE:
            loss(found, rows).backward()
    return [t.detach() for t in found if len(t) == ROWS], gradients(bank)


@pytest.mark.parametrize("name", APART)
def test_laws_1_and_2_a_mixed_batch_is_the_adapter_alone_and_the_base_alone(name: str) -> None:
    family = FAMILIES[name]
    bank = bank_of(family)
    alone, grads = _under(bank, family, "a", [0, 2])
    base, _ = _under(bank, family, BASE)
    mixed, mixed_grads = _under(bank, family, MIXED, [0, 2])
    assert mixed
    for m, a, b in zip(mixed, alone, base, strict=True):
        check_close([m[[0, 2]]], [a[[0, 2]]])
        check_close([m[1]], [b[1]])
    assert any(not torch.allclose(a[1], b[1], rtol=1e-3, atol=0) for a, b in zip(alone, base, strict=True))
    check_gradients(mixed_grads, grads)


@pytest.mark.parametrize("name", TOGETHER)
def test_where_rows_cant_be_told_apart_it_is_said(name: str) -> None:
    family = FAMILIES[name]
    bank = bank_of(family)
    with pytest.raises(RoutingError, match=family.apart), bank.route(MIXED):
        answers(bank.model, family)


@pytest.mark.parametrize("name", PARTS)
def test_what_all_linear_cant_mean_is_said(name: str) -> None:
    family = FAMILIES[name]
    bank = attach(made(family))
    with pytest.raises((TargetError, UnreachedLayerError), match=f"(?s){family.left}"):
        bank.add("a", AdapterConfig(rank=2))
        answers(bank.model, family)
