"""Dropout in blocks with the LoRA products compiled into them: what the plain engine drops, by the same code at every step.

As in test_fused_block.py: on a CPU, through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine import replaying as replaying_module
from lorabank.engine import step as step_module
from lorabank.engine.compiled import fused_blocks
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.step import Engine
from tests.engine.test_fused_block import (
    MIXED,
    TWO,
    assert_same,
    bank_of,
    calls,  # noqa: F401
    fuse,
    graphs,
    one_thread_and_shared_code,  # noqa: F401
    torch_attention,  # noqa: F401
)
from tests.engine.test_fused_block import pytestmark as _marks
from tests.engine.tiny import add, backward, batch_of, difference

pytestmark = [*_marks, pytest.mark.filterwarnings("ignore:adapter .* has dropout .*, which is drawn only inside")]
LENGTHS = (5, 9, 7, 12)


def pair(family: str = "llama", chances: Sequence[float] = (0.5, 0.0), *, targets: Any = TWO) -> tuple[AdapterBank, AdapterBank]:
    """The same model twice, with plain blocks and with fused ones; adapters "a", "b", … with these chances of dropout."""
    banks = bank_of(family, (), targets=targets), bank_of(family, (), targets=targets)
    for bank in banks:
        for i, chance in enumerate(chances):
            add(bank, "abc"[i], rank=2 + 2 * i, targets=targets, dropout=chance)
    fuse(banks[1])
    return banks


@pytest.mark.variants(1)
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_the_plain_engines(recompute: bool, calls: list[nn.Module]) -> None:  # noqa: F811
    plain, fused = pair(chances=(0.5, 0.2))
    engines = Engine(plain), Engine(fused, gradient_checkpointing=recompute)
    losses = []
    for step, lengths in enumerate((LENGTHS, (6, 4, 8, 5))):
        batch, steps = batch_of(lengths, MIXED), {"a": step, "b": 3 + step}
        mine = backward(fused, batch, engines[1], steps=steps)
        assert_same(mine, backward(plain, batch, engines[0], steps=steps))
        losses.append(mine[0]["a"].loss_sum)
    assert len(calls) == 2 * 2
    dry = backward(fused, batch, engines[1])  # without steps nothing drops
    assert_same(dry, backward(plain, batch, engines[0]))
    assert abs(dry[0]["a"].loss_sum - losses[-1]) > 1e-3 * losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_families_and_layers_that_read_one_input(family: str, calls: list[nn.Module]) -> None:  # noqa: F811
    """OPT folds rows and tokens into one dimension: each token is an example of its own there."""
    plain, fused = pair(family, targets="all-linear")
    engines = Engine(plain), Engine(fused)
    assert engines[0].folded() == (family == "opt")
    for step, lengths in enumerate((LENGTHS, (6, 4, 8, 5))):
        batch, steps = batch_of(lengths, MIXED), {"a": step, "b": 0}
        assert_same(backward(fused, batch, engines[1], steps=steps), backward(plain, batch, engines[0], steps=steps))
    assert {*calls} == {*repeated_blocks(fused.model)}


@pytest.mark.slow
@pytest.mark.parametrize("borders", [False, True])
def test_an_adapter_without_dropout_gets_the_same_beside_one_that_has_it(borders: bool) -> None:
    """Borders have no place for masks: a pass in which something drops does without them. Without borders what is left is the
    processor's own: to the bit on most, by roundings on some."""
    _, fused = pair()
    if not borders:
        for block in fused_blocks(fused):
            block.borders = False
            block.release()
    engine, batch = Engine(fused), batch_of(LENGTHS, MIXED)
    losses, found = backward(fused, batch, engine, steps={"a": 3, "b": 1})
    dry_losses, dry = backward(fused, batch, engine)
    if borders:
        assert losses["b"].loss_sum == pytest.approx(dry_losses["b"].loss_sum, rel=1e-5)
        assert difference(found["b"], dry["b"]) < 1e-4
    else:
        assert losses["b"].loss_sum == pytest.approx(dry_losses["b"].loss_sum, rel=1e-6)
        assert difference(found["b"], dry["b"]) < 5e-5
    assert losses["a"] != dry_losses["a"]
    assert difference(found["a"], dry["a"]) > 0.1


@pytest.mark.slow
def test_law3_an_adapter_drops_the_same_alone_and_in_company() -> None:
    _, fused = pair(chances=(0.5, 0.3))
    engine, whole, steps = Engine(fused), batch_of(LENGTHS, MIXED, examples=[0, 0, 0, 1]), {"a": 4, "b": 2}
    losses, found = backward(fused, whole, engine, steps=steps)
    for name, rows in (("a", [3, 0]), ("b", [1])):
        alone, expected = backward(fused, whole.select(rows), engine, steps=steps)
        assert losses[name].loss_sum == pytest.approx(alone[name].loss_sum, rel=1e-6)
        assert difference(found[name], expected[name]) < 1e-5


@pytest.mark.slow
def test_other_steps_examples_adapters_and_chances_compile_nothing() -> None:
    torch._dynamo.reset()
    plain, fused = pair()
    engines = Engine(plain), Engine(fused)
    backward(fused, batch_of(LENGTHS, MIXED), engines[1])
    before = graphs()
    backward(fused, batch_of(LENGTHS, MIXED), engines[1], steps={"a": 0, "b": 0})
    backward(fused, batch_of(LENGTHS, MIXED), engines[1], steps={"a": 0, "b": 0})
    made = graphs()
    assert made == before + 1
    for bank in (plain, fused):
        bank.remove("b")
        add(bank, "c", rank=5, targets=TWO, dropout=0.9)
    rounds: list[tuple[tuple[int, ...], list[RowRoute], dict[str, int]]] = [
        (LENGTHS, ["a", "c", BASE, "a"], {"a": 1, "c": 8}),
        ((21, 3, 40), ["c", BASE, "c"], {"c": 2**31 + 5}),
        ((6, 4, 8, 5, 4), ["c", "c", "a", "a", "a"], {"a": 2, "c": 9}),
    ]
    for lengths, routes, steps in rounds:
        batch = batch_of(lengths, routes)
        assert_same(backward(fused, batch, engines[1], steps=steps), backward(plain, batch, engines[0], steps=steps))
    assert graphs() == made


class Replaying:
    """Stands in for `PassGraphs`: what was computed first is computed again from other tensors, as a graph's replay does."""

    refused = None

    def __init__(self) -> None:
        self.compute: Callable[[Sequence[Tensor]], Tensor] | None = None
        self.runs = 0

    def forget(self) -> None:
        pass

    def run(self, key: Any, tensors: Sequence[Tensor], leaves: Any, compute: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        self.runs += 1
        self.compute = self.compute or compute
        return self.compute([tensor.clone() for tensor in tensors])


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_a_captured_pass_draws_from_what_it_is_given(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = "all-linear" if family == "opt" else TWO
    plain, fused = pair(family, (0.5, 0.2), targets=targets)
    engines = Engine(plain), Engine(fused)
    backward(fused, batch_of(LENGTHS, MIXED), engines[1])  # every layer has been reached
    replaying = Replaying()
    engines[1].graphs = replaying  # type: ignore[assignment]
    for step, routes in enumerate((MIXED, ["b", "a", "a", BASE])):
        batch, steps = batch_of(LENGTHS, routes, examples=[step, 1 + step, 5, 6]), {"a": step, "b": 7 * step}
        expected = backward(plain, batch, engines[0], steps=steps)
        with monkeypatch.context() as patch:
            patch.setattr(step_module, "_graphed", lambda engine, batch, routing, reference: engine.all_fused(routing))
            patch.setattr(replaying_module, "capturing", lambda: True)
            assert_same(backward(fused, batch, engines[1], steps=steps), expected)
    assert replaying.runs == 2
