"""AdamW's kernels against the rule's plain functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorabank.kernels.gpu import adamw
from lorabank.optim.rules import OPTIMIZERS, RuleNumbers

CLOSE = {"rtol": 1e-6, "atol": 1e-7}
NUMBERS = adamw.SlotNumbers(
    learning_rate=1e-2, loraplus_ratio=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, tokens=1.0, max_grad_norm=1.0
)
SETTINGS = [
    NUMBERS,
    replace(NUMBERS, learning_rate=3e-3, loraplus_ratio=16.0, weight_decay=0.3, tokens=7.5, max_grad_norm=0.0),
    replace(NUMBERS, beta1=0.0, beta2=0.95, eps=1e-5, weight_decay=0.1, tokens=0.25, max_grad_norm=1e-3),
]
STEPS_BEFORE = [0, 41, 3]
SIZES = [[64, 128, 256], [1, 63, 64, 65, 203], [130, 7]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of several blocks, and more blocks than are added at once, without large tensors."""
    monkeypatch.setattr(adamw, "BLOCK", 64)
    monkeypatch.setattr(adamw, "SUM_BLOCK", 4)


@dataclass
class Slot:
    """Leaves and gradients at odd places of buffers that are NaN elsewhere."""

    leaves: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]
    first: Tensor
    second: Tensor
    count: Tensor

    def places(self) -> adamw.SlotPlaces:
        return adamw.SlotPlaces(
            leaves=[p.data_ptr() for p in self.leaves],
            sizes=[p.numel() for p in self.leaves],
            is_b=[i % 2 == 1 for i in range(len(self.leaves))],
            first=self.first.data_ptr(),
            second=self.second.data_ptr(),
            step=self.count.data_ptr(),
        )

    def bits(self) -> list[Tensor]:
        return [x.clone().view(torch.int32) for x in (*self.buffers, self.first, self.second)] + [self.count.clone()]


def _scattered(sizes: list[int], device: torch.device, shift: int) -> tuple[list[Tensor], Tensor]:
    buffer = torch.full((sum(sizes) + 8 * len(sizes) + 8,), math.nan, device=device)
    found, at = [], 4
    for i, n in enumerate(sizes):
        found.append(buffer[at + shift * i % 4 : at + shift * i % 4 + n])
        at += -(-n // 4) * 4 + 4
    return found, buffer


def _slots(device: torch.device, *, shift: int = 1) -> list[Slot]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for sizes, before in zip(SIZES, STEPS_BEFORE, strict=True):
        leaves, buffer = _scattered(sizes, device, shift)
        gradients, other = _scattered(sizes, device, 2 * shift)
        state = [torch.rand(sum(sizes), generator=generator).to(device) * (before > 0) for _ in range(2)]
        for p in leaves:
            p.copy_(torch.randn(p.shape, generator=generator))
        made.append(Slot(leaves, gradients, [buffer, other], state[0], state[1], torch.tensor([before], device=device)))
    return made


def _draw(slots: list[Slot], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for slot in slots:
        for g in slot.gradients:
            g.copy_(torch.randn(g.shape, generator=generator))


def _step(slots: list[Slot], table: adamw.AdamWTable) -> list[tuple[float, bool, int]]:
    addresses = [g.data_ptr() for slot in slots for g in slot.gradients]
    results = table.step(addresses, SETTINGS[: len(slots)])
    return [results.of(i) for i in range(len(slots))]


def _reference(slot: Slot, numbers: adamw.SlotNumbers, step: int) -> tuple[list[Tensor], Tensor, Tensor, float]:
    """What one step should give: leaves, moments and norm, by the rule's plain direction."""
    gradient = torch.cat(slot.gradients) / numbers.tokens
    norm = float(gradient.double().norm())
    if numbers.max_grad_norm:
        gradient *= min(1.0, numbers.max_grad_norm / (norm + 1e-6))
    state = [slot.first.clone(), slot.second.clone()]
    rule = RuleNumbers(beta1=numbers.beta1, beta2=numbers.beta2, eps=numbers.eps, step=step)
    OPTIMIZERS["adamw"].direction(gradient, state, rule)
    leaves = []
    for i, (p, direction) in enumerate(zip(slot.leaves, gradient.split([p.numel() for p in slot.leaves]), strict=True)):
        rate = numbers.learning_rate * (numbers.loraplus_ratio if i % 2 else 1.0)
        leaves.append(p * (1.0 - rate * numbers.weight_decay) - rate * direction)
    return leaves, state[0], state[1], norm


@pytest.mark.parametrize("shift", [0, 1])
def test_three_steps_of_three_slots_are_the_rules(shift: int, device: torch.device) -> None:
    """Odd sizes and addresses, settings and step counts of their own; what lies between leaves stays as it is."""
    slots = _slots(device, shift=shift)
    table = adamw.AdamWTable([slot.places() for slot in slots], device)
    for step in range(1, 4):
        _draw(slots, seed=step)
        expected = [
            _reference(slot, numbers, before + step) for slot, numbers, before in zip(slots, SETTINGS, STEPS_BEFORE, strict=True)
        ]
        gaps = [[b.isnan() for b in slot.buffers] for slot in slots]
        done = _step(slots, table)
        for slot, (leaves, first, second, norm), (got, finite, count), before, gap in zip(
            slots, expected, done, STEPS_BEFORE, gaps, strict=True
        ):
            assert got == pytest.approx(norm, rel=1e-6)
            assert (finite, count) == (True, before + step)
            torch.testing.assert_close(slot.first, first, **CLOSE)
            torch.testing.assert_close(slot.second, second, **CLOSE)
            for p, q in zip(slot.leaves, leaves, strict=True):
                torch.testing.assert_close(p, q, **CLOSE)
            assert all(torch.equal(b.isnan(), was) for b, was in zip(slot.buffers, gap, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_slot_that_is_not_finite_stays_as_it_is_and_touches_no_other(bad: float, device: torch.device) -> None:
    slots, alone = _slots(device), _slots(device)
    _draw(slots, seed=1)
    _draw(alone, seed=1)
    slots[1].gradients[-1][-1] = bad
    before = slots[1].bits()
    done = _step(slots, adamw.AdamWTable([slot.places() for slot in slots], device))
    assert [finite for _, finite, _ in done] == [True, False, True]
    assert not math.isfinite(done[1][0])
    assert done[1][2] == STEPS_BEFORE[1]
    assert all(torch.equal(x, y) for x, y in zip(slots[1].bits(), before, strict=True))
    for i in (0, 2):
        table = adamw.AdamWTable([alone[i].places()], device)
        table.step([g.data_ptr() for g in alone[i].gradients], [SETTINGS[i]])
        assert all(torch.equal(x, y) for x, y in zip(slots[i].bits(), alone[i].bits(), strict=True))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_a_norm_neither_overflows_nor_vanishes_in_its_squares(scale: float, device: torch.device) -> None:
    slots = _slots(device)[:1]
    _draw(slots, seed=1)
    for g in slots[0].gradients:
        g.mul_(scale)
    ((norm, finite, _),) = _step(slots, adamw.AdamWTable([slots[0].places()], device))
    assert finite
    assert norm == pytest.approx(float(torch.cat(slots[0].gradients).double().norm()), rel=1e-6)


def test_a_leaf_without_gradient_has_one_of_zeros(device: torch.device) -> None:
    slots, twins = _slots(device), _slots(device)
    for each in (slots, twins):
        _draw(each, seed=1)
        each[1].gradients[2].zero_()
    _step(twins, adamw.AdamWTable([slot.places() for slot in twins], device))
    table = adamw.AdamWTable([slot.places() for slot in slots], device)
    table.step([0 if g is slots[1].gradients[2] else g.data_ptr() for slot in slots for g in slot.gradients], SETTINGS)
    for slot, twin in zip(slots, twins, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(slot.bits(), twin.bits(), strict=True))
