"""Where borders end by slots and by one slot's ranks: blocks right up to there, and layers by themselves beyond.

What all ranks together may be is in tests/engine/test_borders.py, whose helpers this takes.
"""

from __future__ import annotations

import pytest

from lorabank.bank.bank import AdapterBank
from lorabank.kernels.gpu import border_writing, siblings
from lorabank.notices import warn_once
from tests.engine import test_borders as borders
from tests.engine.test_fused_block import assert_same, pair
from tests.engine.tiny import add, backward, batch_of

pytestmark = borders.pytestmark
one_thread_and_shared_code, torch_attention = borders.one_thread_and_shared_code, borders.torch_attention
widened = borders.widened


def hold(fused: AdapterBank, plain: AdapterBank, last: str) -> None:
    """A pass of both."""
    batch = batch_of([9, 7, 5], ["a", "b", last])
    assert_same(backward(fused, batch), backward(plain, batch))


def test_slots(widened: list[int]) -> None:
    """Ranks would fit: 1 each, but for two adapters."""
    targets = ["o_proj"]
    plain, fused = pair(targets=targets)
    hold(fused, plain, "b")  # the first runs plainly
    names = [f"one{i}" for i in range(border_writing.MOST_SLOTS - 1)]
    for name in names[:-1]:
        for bank in (plain, fused):
            add(bank, name, rank=1, targets=targets)
    hold(fused, plain, names[-2])
    assert widened
    assert borders.moved(fused) == {*targets}
    for bank in (plain, fused):
        add(bank, names[-1], rank=1, targets=targets)
    widened.clear()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="don't fit in the borders"):
        hold(fused, plain, names[-1])
    assert not widened
    assert not borders.moved(fused)


@pytest.mark.filterwarnings("ignore:adapter 'large'. rank .* is above what layer")  # 32 → 32
def test_ranks_of_one_slot_beside_joined_layers(widened: list[int]) -> None:
    """All ranks together would fit."""
    plain, fused = pair(targets=["o_proj"])
    for bank in (plain, fused):
        add(bank, "large", rank=siblings.WIDEST + 1, targets=["o_proj"])
    for _ in range(2):
        hold(fused, plain, "large")
    assert not widened
    assert not borders.moved(fused)
