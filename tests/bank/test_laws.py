"""The design's laws that the bank alone can hold, for every kind of model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabank import BASE, Adapter, attach, merge
from lorabank.bank.bank import all_layers
from lorabank.errors import MergeError
from tests.bank.tiny import EXTRAS, MIXTURES, MODELS, TARGETS, add, clear, gradients, ids, make, outputs, state_bytes, two

KINDS = list(MODELS)
ROUTES = ["a", BASE, "b", {"a": 0.7, "b": -0.4}, BASE, "a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_law1_a_base_row_is_the_base_bit_for_bit_in_a_mixed_batch(kind: str, dtype: torch.dtype) -> None:
    model, bank = two(kind, dtype=dtype)
    x = ids(6)
    plain = make(kind).to(dtype)
    with torch.no_grad():
        expected = outputs(plain, x)
        with bank.route(ROUTES):
            found = outputs(model, x)
        with bank.route(BASE):
            assert torch.equal(outputs(model, x), expected)
    if kind in MIXTURES:
        assert torch.allclose(found[[1, 4]], expected[[1, 4]], atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(found[[1, 4]], expected[[1, 4]])
    for row in (0, 2, 3, 5):
        assert not torch.allclose(found[row], expected[row])


@pytest.mark.parametrize("kind", KINDS)
def test_law1_a_detached_model_is_the_old_model_bit_for_bit(kind: str) -> None:
    model = make(kind)
    types = {path: type(m) for path, m in model.named_modules()}
    frozen = next(iter(model.parameters())).requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before, x = state_bytes(model), ids(4)
    expected = outputs(model, x).detach()
    bank = attach(model)
    beside = EXTRAS.get(kind, {}) | {"use_dora": kind.startswith("decomposed")}
    add(bank, "a", targets=TARGETS.get(kind, "all-linear"), **beside)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora." not in name)
    with bank.route(["a", "a", BASE, BASE]):
        outputs(model, x).square().sum().backward()
    assert bank.detach() is model
    assert {path: type(m) for path, m in model.named_modules()} == types
    assert state_bytes(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not frozen.requires_grad
    assert torch.equal(outputs(model, x), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", KINDS)
def test_law2_a_mixed_batch_equals_the_separate_batches(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest entry: fp32 sums in another order, bf16 (8 bits) rounds activations and gradients on the way."""
    model, bank = two(kind, dtype=dtype)
    x = ids(6)
    weights = torch.randn(6, generator=torch.Generator().manual_seed(3))

    def loss(rows: list[int]) -> torch.Tensor:
        y = outputs(model, x[rows]).float()
        found.update(zip(rows, y.detach(), strict=True))
        return (y.flatten(1).square().mean(1) * weights[rows]).sum()

    results = []
    for batches in ([list(range(6))], [[i] for i in range(6)]):
        clear(bank)
        found: dict[int, torch.Tensor] = {}
        for rows in batches:
            with bank.route([ROUTES[i] for i in rows]):
                total = loss(rows)
            if total.requires_grad:
                total.backward()
        results.append((torch.stack([found[i] for i in range(6)]), gradients(bank)))
    (mixed_y, mixed), (apart_y, apart) = results
    assert _distance(mixed_y, apart_y) < tolerance
    for key, expected in apart.items():
        assert expected.abs().max() > 0, key
        assert _distance(mixed[key], expected) < tolerance, key


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_law4_a_slot_that_isnt_routed_gets_no_gradient_and_a_step_leaves_it_byte_identical(kind: str) -> None:
    model, bank = two(kind)
    optimizers = {name: torch.optim.AdamW(bank.parameters(name), lr=0.1, weight_decay=0.5) for name in bank.names}
    for name in ("a", "b"):  # both have optimizer state
        with bank.route(name):
            outputs(model, ids(2)).square().mean().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
    before = _bytes(bank, optimizers)
    with bank.route(["a", BASE, "a"]):
        outputs(model, ids(3)).square().mean().backward()
    assert all(p.grad is None for p in bank.parameters("b"))
    optimizers["a"].step()
    after = _bytes(bank, optimizers)
    assert after["b"] == before["b"]
    assert all(x != y for x, y in zip(after["a"], before["a"], strict=True))


def _bytes(bank, optimizers) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, optimizer in optimizers.items():
        found[name] = []
        for p in bank.parameters(name):
            found[name] += [t.detach().numpy().tobytes() for t in (p, *optimizer.state[p].values())]
    return found


def _roles(kind: str) -> list[str]:
    found = ["A", "B"]
    if kind.startswith("decomposed"):
        found.append("magnitude")
    if EXTRAS.get(kind, {}).get("bias"):
        found.append("bias")
    if EXTRAS.get(kind, {}).get("lora_bias"):
        found.append("lora_bias")
    if EXTRAS.get(kind, {}).get("trainable_token_indices"):
        found.append("rows")
    return found


@pytest.mark.parametrize(("kind", "where"), [(kind, where) for kind in KINDS for where in _roles(kind)])
def test_law4_a_slot_that_goes_nan_touches_no_other_slot_nor_a_base_row(kind: str, where: str) -> None:
    x, rows = ids(4), ["a", "b", BASE, "b"]
    x[0, 0] = 5  # an id whose row is trained, where rows are
    results = []
    for poisoned in (False, True):
        model, bank = two(kind)
        if poisoned:
            with torch.no_grad():
                for key, leaf in bank.named_parameters("a"):  # in every layer: attention gives zero, not NaN, for a NaN query
                    if key.endswith(f".{where}"):
                        leaf[..., 0] = math.nan
        with bank.route(rows):
            y = outputs(model, x)
        y.flatten(1).square().mean(1).sum().backward()
        results.append((y.detach(), gradients(bank)))
    (clean_y, clean), (sick_y, sick) = results
    assert sick_y[0].isnan().any()
    untouched: Any = torch.allclose if kind in MIXTURES else torch.equal
    assert untouched(sick_y[1:], clean_y[1:])
    assert any(g.isnan().any() for key, g in sick.items() if key.startswith("a:"))
    for key in clean:
        if key.startswith("b:"):
            assert untouched(sick[key], clean[key]), key


@pytest.mark.parametrize("kind", ["llama", "handwritten", "torch encoder"])  # heads that aren't tied to the poisoned embedding
def test_law4_an_infinite_activation_of_one_row_touches_no_other_slot(kind: str) -> None:
    """The inf is in one row's embedding, so every layer of that row sees it."""
    results = []
    for poisoned in (False, True):
        model, bank = two(kind)
        x = ids(3)
        x[0, 2] = 1  # a token of its own
        assert not (x[1:] == 1).any()
        embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        if poisoned:
            with torch.no_grad():
                embedding.weight[1] = math.inf
        with bank.route(["a", "b", BASE]):
            hidden = outputs(model, x)
        hidden.flatten(1).square().mean(1).sum().backward()
        results.append((hidden.detach(), gradients(bank)))
    (clean_y, clean), (sick_y, sick) = results
    assert not sick_y[0].isfinite().all()
    assert torch.equal(sick_y[1:], clean_y[1:])
    for key in clean:
        if key.startswith("b:"):
            assert torch.equal(sick[key], clean[key]), key


def test_law5_detach_after_training_restores_the_base_bit_for_bit() -> None:
    model, bank = two("llama")
    before, x = state_bytes(model), ids(3)
    with bank.route(BASE):
        expected = outputs(model, x).detach()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1)
    for _ in range(3):
        with bank.route(["a", "b", {"a": 1, "b": 1}]):
            outputs(model, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert state_bytes(model) == before
    bank.detach()
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_law5_merged_equals_unmerged_and_comes_back_bit_for_bit(kind: str) -> None:
    model, bank = two(kind)
    plain, x = make(kind), ids(3)
    before = state_bytes(plain)
    with torch.no_grad(), bank.route("b"):
        expected = outputs(model, x)
    if kind == "biased pictures":
        with pytest.raises(MergeError, match=r"blocks\.1 has no bias, and the adapter's lora_B has one"):
            merge(plain, bank.adapter("b"), say=None)
        assert state_bytes(plain) == before
        return
    handle = merge(plain, bank.adapter("b"), say=None)
    with torch.no_grad():
        assert _distance(outputs(plain, x), expected) < 2e-5
    handle.unmerge()
    assert state_bytes(plain) == before


@pytest.mark.parametrize("kind", KINDS)
def test_law6_save_load_save_gives_identical_bytes_and_the_same_outputs(kind: str, tmp_path: Path) -> None:
    model, bank = two(kind)
    x = ids(3)
    folders = [bank.adapter("b").save(tmp_path / "saved")]
    loaded = Adapter.load(folders[0])
    folders.append(loaded.save(tmp_path / "again"))
    bank.load("loaded", loaded)
    folders.append(bank.adapter("loaded").save(tmp_path / "through a bank"))
    first, *others = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert all(other == first for other in others)
    (folders[1] / "lorabank.json").unlink()  # what another tool would keep
    bank.load("plain", Adapter.load(folders[1]))
    with torch.no_grad():
        with bank.route("b"):
            expected = outputs(model, x)
        for name in ("loaded", "plain"):
            with bank.route(name):
                assert _distance(outputs(model, x), expected) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_law8_spare_capacity_poisoned_with_nan_leaks_nowhere(kind: str) -> None:
    results = []
    for poisoned in (False, True):
        model, bank = two(kind)
        add(bank, "gone", targets=TARGETS.get(kind, "all-linear"), rank=7)
        add(bank, "c", targets=TARGETS.get(kind, "all-linear"), rank=2)
        bank.remove("gone")  # a gap between slots, and room behind them
        if poisoned:
            for layer in all_layers(bank):
                used = torch.zeros(layer.store.capacity, dtype=torch.bool)
                for slot in layer.store.slots.values():
                    used[slot.start : slot.stop] = True
                # of a place where only a bias, rows or slices are trained there is no room
                assert not used.all() or not layer.store.capacity
                for buffer in layer.store.buffers:
                    buffer[~used] = math.nan
        with bank.route(["a", "c", {"a": 1, "b": 0.5, "c": 2}, BASE]):
            y = outputs(model, ids(4))
        y.square().mean().backward()
        add(bank, "d", targets=TARGETS.get(kind, "all-linear"), rank=6)  # takes the gap: NaN must not stay in it
        with bank.route("d"):
            y_d = outputs(model, ids(4))
        results.append((y.detach(), y_d.detach(), gradients(bank), {n: bank.adapter(n) for n in bank.names}))
    (y0, d0, g0, saved0), (y1, d1, g1, saved1) = results
    assert torch.equal(y0, y1)
    assert torch.equal(d0, d1)
    assert all(torch.equal(g0[key], g1[key]) and g1[key].isfinite().all() for key in g0)
    for name in saved0:
        for path, part in saved0[name].layers.items():
            other = saved1[name].layers[path]
            assert torch.equal(part.A, other.A)
            assert torch.equal(part.B, other.B)
            assert part.A.untyped_storage().nbytes() == part.A.nbytes, "a saved tensor must not drag the buffer along"
