"""`SlotLoss`: numbers that are waited for when they are looked at, and not before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from lorabank.engine.results import SlotLoss, by_slot, read_later


class Reader:
    """Gives row losses, and counts how often it was asked."""

    def __init__(self, losses: Mapping[int, float]) -> None:
        self.losses, self.asked = losses, 0

    def __call__(self) -> Mapping[int, float]:
        self.asked += 1
        return self.losses


def test_the_numbers() -> None:
    loss = SlotLoss(tokens=4.0, row_losses={0: 1.5, 3: 2.5})
    assert loss.loss_sum == 4.0
    assert loss.mean == 1.0
    assert loss.row_losses == {0: 1.5, 3: 2.5}
    assert loss.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    assert not SlotLoss(tokens=1.0, row_losses={0: 1.0, 1: bad}).finite
    assert not SlotLoss(tokens=1.0, row_losses={0: math.inf, 1: bad}).finite


def test_no_tokens() -> None:
    assert SlotLoss(tokens=0.0, row_losses={0: 0.0}).mean == 0.0
    assert SlotLoss(tokens=0.0, row_losses={}).loss_sum == 0


def test_nothing_is_read_before_it_is_looked_at() -> None:
    read = Reader({1: 2.0})
    loss = SlotLoss.later(3.0, read)
    assert loss.tokens == 3.0
    assert read.asked == 0
    assert loss.loss_sum == 2.0
    assert loss.mean == pytest.approx(2 / 3)
    assert read.asked > 0


def test_equality() -> None:
    loss = SlotLoss(tokens=2.0, row_losses={0: 1.0, 2: 3.0})
    assert loss == SlotLoss.later(2.0, Reader({0: 1.0, 2: 3.0}))
    assert loss != SlotLoss(tokens=3.0, row_losses={0: 1.0, 2: 3.0})
    assert loss != SlotLoss(tokens=2.0, row_losses={0: 1.0, 2: 3.5})
    assert loss != SlotLoss(tokens=2.0, row_losses={0: 1.0, 1: 3.0})
    assert loss != 4.0


def test_what_is_equal_has_the_same_hash() -> None:
    loss = SlotLoss(tokens=2.0, row_losses={0: 1.0, 2: 3.0})
    for other in (SlotLoss.later(2.0, Reader({0: 1.0, 2: 3.0})), SlotLoss(tokens=2, row_losses={2: 3.0, 0: 1.0})):
        assert loss == other
        assert hash(loss) == hash(other)
    assert len({loss, SlotLoss(tokens=2.0, row_losses={0: 1.0, 2: 3.0})}) == 1


def test_it_shows_its_numbers() -> None:
    loss = SlotLoss.later(2.0, Reader({0: 1.0, 2: 3.0}))
    assert repr(loss) == "SlotLoss(tokens=2.0, row_losses={0: 1.0, 2: 3.0})"


def test_it_takes_no_other_attributes() -> None:
    with pytest.raises(AttributeError):
        SlotLoss(tokens=2.0, row_losses={}).note = "x"  # type: ignore[attr-defined]


NAMES: Sequence[str | None] = ["b", None, "a", "b"]


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_rows_by_adapter(device: str) -> None:
    losses_N = torch.tensor([1.0, 9.0, 2.0, 4.0], device=device)
    found = by_slot(NAMES, losses_N, [2.0, 7.0, 3.0, 1.0])
    losses_N.zero_()  # a captured pass writes its next losses there
    assert list(found) == ["b", "a"]
    assert found["b"] == SlotLoss(tokens=3.0, row_losses={0: 1.0, 3: 4.0})
    assert found["a"] == SlotLoss(tokens=3.0, row_losses={2: 2.0})
    assert found["b"].row_losses == found["b"].row_losses


def test_only_base_rows() -> None:
    assert by_slot([None, None], torch.zeros(2), [1.0, 1.0]) == {}


def test_numbers_are_read_once_and_stay() -> None:
    values_N = torch.tensor([1.0, 2.0])
    read = read_later(values_N)
    values_N.zero_()
    assert list(read()) == list(read()) == [1.0, 2.0]
