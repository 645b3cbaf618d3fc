"""Laws 3, 5, 6 and 7 on a GPU: compiled blocks, fp32 and bf16, with CUDA graphs and without. Tolerances are stated where used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lorabank as lb
from lorabank import BASE
from lorabank.bank.bank import AdapterBank
from lorabank.engine.batch import make_batch
from lorabank.engine.compiling import uncompile_blocks
from lorabank.engine.state import load_state, save_state
from lorabank.engine.step import Engine, forward_backward, logprobs, optim_step
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer
from tests.engine.tiny import clear, difference, tokens, values
from tests.gpu.laws import Setting, add, content, distance, mixed_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:compile. LlamaDecoderLayer doesn't take"),  # said once: see test_fallbacks.py
]


# ---- law 3 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One adapter's training: two rows a pass, always the next two of its own."""

    name: str
    rank: int
    learning_rate: float
    accumulation: int
    weight_decay: float
    rows: Sequence[Sequence[int]]


JOBS = [
    Job(
        name=f"job{i}",
        rank=(1, 2, 4, 7, 8, 12, 16, 3)[i],
        learning_rate=(3e-3, 4e-3, 5e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3)[i],
        accumulation=(1, 2, 1, 3, 1, 2, 1, 1)[i],
        weight_decay=0.1 * (i % 2),
        rows=tokens([20] * 4, 100 + i),
    )
    for i in range(8)
]


@dataclass(frozen=True)
class Trained:
    """Each adapter's mean loss on its own rows before and after, and how many graphs were captured."""

    before: dict[str, float]
    after: dict[str, float]
    captured: int


def _weighted(rows: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], list[float]]]:
    return [(ids, [0.0, *[1.0] * (len(ids) - 1)]) for ids in rows]


def _scores(engine: Engine, jobs: Sequence[Job]) -> dict[str, float]:
    return {
        job.name: -float(logprobs(engine, make_batch(_weighted(job.rows), job.name)).sum()) / sum(len(r) - 1 for r in job.rows)
        for job in jobs
    }


def trained(setting: Setting, jobs: Sequence[Job], steps: int = 12) -> Trained:
    """All jobs in joint passes, until each has made its steps."""
    bank = setting.bank({job.name: job.rank for job in jobs}, filled=False)
    optimizer, engine = SlotOptimizer(bank), setting.engine(bank)
    for job in jobs:
        optimizer.add(job.name, OptimizerConfig(weight_decay=job.weight_decay, max_grad_norm=0.5))
    before = _scores(engine, jobs)
    seen, weights = dict.fromkeys(before, 0), dict.fromkeys(before, 0.0)
    while running := [job for job in jobs if optimizer.steps(job.name) < steps]:
        rows, routes = [], []
        for job in running:
            rows += _weighted([job.rows[(2 * seen[job.name] + i) % len(job.rows)] for i in range(2)])
            routes += [job.name] * 2
        losses = forward_backward(engine, make_batch(rows, routes))
        for job in running:
            seen[job.name] += 1
            weights[job.name] += losses[job.name].tokens
        due = [job for job in running if seen[job.name] % job.accumulation == 0]
        rates = {job.name: job.learning_rate * (1 - optimizer.steps(job.name) / (2 * steps)) for job in due}
        optim_step(optimizer, rates, {job.name: weights[job.name] for job in due})
        weights |= {job.name: 0.0 for job in due}
    assert engine.graphs.refused is None
    return Trained(before, _scores(engine, jobs), len(engine.graphs._captured))


LAW3 = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Of the loss at the end, relative. AdamW enlarges differences in the last bits of small gradients, step after step."""


def test_law3_eight_adapters_jointly_end_where_each_ends_alone(setting: Setting) -> None:
    joint = trained(setting, JOBS)
    assert (joint.captured > 0) == setting.graphs
    for job in JOBS:
        alone = trained(setting, [job])
        assert alone.after[job.name] == pytest.approx(joint.after[job.name], rel=LAW3[setting.dtype]), job.name
        assert (alone.captured > 0) == setting.graphs
        assert joint.after[job.name] < (1 - 2 * LAW3[setting.dtype]) * joint.before[job.name], job.name


# ---- law 5 ----------------------------------------------------------------------------------------------------------


def test_law5_merged_equals_unmerged_and_unmerge_restores_the_base(setting: Setting) -> None:
    """Merging rounds W + Δ once more, in the base's dtype."""
    bank = setting.bank()
    model = bank.model
    base, expected = setting.logits(bank, BASE), setting.logits(bank, "b")
    original = content(model.state_dict())
    handle = lb.merge(model, bank.adapter("b"), say=None)
    assert content(model.state_dict()) != original
    assert distance(setting.logits(bank, BASE), expected) < setting.tolerance < distance(base, expected)
    handle.unmerge()
    assert content(model.state_dict()) == original
    assert torch.equal(setting.logits(bank, BASE), base)
    adapter = bank.adapter("b")
    bank.detach()
    handle = lb.merge(model, adapter, say=None)  # without a bank, in blocks that are still compiled
    with torch.no_grad():
        assert distance(model(setting.ids(), use_cache=False).logits.float(), expected) < setting.tolerance
    handle.unmerge()
    uncompile_blocks(list(model.modules()))
    with torch.no_grad():
        assert torch.equal(model(setting.ids()).logits, setting.model()(setting.ids()).logits)


# ---- law 6 ----------------------------------------------------------------------------------------------------------


def _steps(setting: Setting, bank: AdapterBank, optimizer: SlotOptimizer, count: int, first: int) -> None:
    engine = setting.engine(bank)
    for i in range(count):
        losses = forward_backward(engine, mixed_batch(seed=first + i))
        optim_step(optimizer, dict.fromkeys(losses, 3e-3), {name: loss.tokens for name, loss in losses.items()})


def _optimizer(bank: AdapterBank) -> SlotOptimizer:
    optimizer = SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name)
    return optimizer


def test_law6_save_load_save_gives_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    bank = setting.bank()
    _steps(setting, bank, _optimizer(bank), 5, 0)
    for name in ("a", "b"):
        bank.adapter(name).save(tmp_path / name)
        bank.load(f"{name}2", lb.Adapter.load(tmp_path / name))
        bank.adapter(f"{name}2").save(tmp_path / f"{name}2")
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == sorted(path.name for path in (tmp_path / f"{name}2").iterdir())
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}2" / file).read_bytes(), file
    setting.reach(bank)
    found = setting.logits(bank, ["a", "b", "a2", "b2"])
    assert distance(found[[0, 1]], setting.logits(bank, ["a2", "b2", "a", "b"])[[0, 1]]) < setting.same_shape


RESUMED = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
"""Of the change that five further steps make to a leaf, relative: sums that a GPU adds in another order, enlarged by AdamW."""


def test_law6_a_loaded_state_goes_on_as_the_old_one(setting: Setting) -> None:
    bank = setting.bank()
    optimizer = _optimizer(bank)
    _steps(setting, bank, optimizer, 5, 0)
    saved = save_state(bank, optimizer)
    fresh = setting.bank()
    resumed = _optimizer(fresh)
    _steps(setting, fresh, resumed, 2, 50)  # whatever it did before is overwritten
    load_state(fresh, resumed, saved)
    again = save_state(fresh, resumed)
    assert again.values == saved.values
    assert content(again.tensors) == content(saved.tensors)
    start = {name: values(bank, name) for name in bank.names}
    for one, its in ((bank, optimizer), (fresh, resumed)):
        _steps(setting, one, its, 5, 5)
    for name in bank.names:
        moved, also = (
            torch.cat([(leaf - start[name][key]).flatten() for key, leaf in values(one, name).items()]) for one in (bank, fresh)
        )
        assert distance(also, moved) < RESUMED[setting.dtype], name
        assert resumed.steps(name) == optimizer.steps(name) == 10


# ---- law 7 ----------------------------------------------------------------------------------------------------------


def test_law7_exact_combination_is_linear_in_the_weights(setting: Setting) -> None:
    bank = setting.bank()
    a, b = bank.adapter("a"), bank.adapter("b")
    for name, (one, other) in {"c": (0.7, 0.3), "d": (-0.4, 1.5)}.items():
        both = lb.combine([(a, one), (b, other)], method="exact")
        for path, layer in both.layers.items():
            expected = one * a.layers[path].delta().double() + other * b.layers[path].delta().double()
            assert distance(layer.delta(), expected) < 1e-6
        bank.load(name, both)
        setting.reach(bank)
        # the mixture takes the plain path, layer by layer, the combined adapter the compiled one
        assert distance(setting.logits(bank, name), setting.logits(bank, {"a": one, "b": other})) < setting.tolerance
    # gradients of a combination reach it alone
    clear(bank)
    losses = forward_backward(setting.engine(bank), mixed_batch(["c", "d", BASE, "c"]))
    assert set(losses) == {"c", "d"}
    assert all(p.grad is None for name in ("a", "b") for p in bank.parameters(name))
    halves = lb.combine([(a, 0.35), (b, 0.15), (a, 0.35), (b, 0.15)], method="exact")
    add(bank, "other", 3)
    bank.load("halves", halves)
    setting.reach(bank)
    assert distance(setting.logits(bank, "halves"), setting.logits(bank, "c")) < setting.tolerance
    assert difference({"c": setting.logits(bank, "c")}, {"c": setting.logits(bank, "other")}) > setting.tolerance
