"""Slots as ranges of ranks in one buffer: growth, reuse, and what a change between forward and backward does (traps 1 and 2)."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.storage import GRANULE, RankStore
from lorabank.errors import RoutingError
from tests.bank.tiny import add, ids, make, outputs, two


def _linear(features: int = 8) -> tuple[nn.Module, AdapterBank]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features))
    return model, attach(model)


def test_trap1_leaves_are_views_of_one_buffer() -> None:
    _, bank = _linear()
    add(bank, "a", rank=3)
    add(bank, "b", rank=5)
    for layer in all_layers(bank):
        a_buffer, b_buffer = layer.store.buffers
        for slot in layer.store.slots.values():
            for leaf, buffer in ((slot.A_RI, a_buffer), (slot.B_RO, b_buffer)):
                assert leaf.is_leaf
                assert leaf.requires_grad
                assert leaf.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
                assert torch.equal(leaf, buffer[slot.start : slot.stop])
        assert layer.store.ranks_in_use == 8
        assert layer.store.capacity == GRANULE


def test_trap1_growth_keeps_leaf_identity_optimizer_state_and_gradient() -> None:
    model, bank = _linear()
    add(bank, "a", rank=3)
    leaves = bank.parameters("a")
    optimizer = torch.optim.AdamW(leaves, lr=0.1)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    values = [p.detach().clone() for p in leaves]
    state = {id(p): {k: v.clone() for k, v in optimizer.state[p].items()} for p in leaves}
    grads = [p.grad for p in leaves]
    before = [layer.store.buffers[0].data_ptr() for layer in all_layers(bank)]
    for i in range(4):
        bank.add(f"more{i}", AdapterConfig(rank=8))
    assert all(layer.store.buffers[0].data_ptr() != old for layer, old in zip(all_layers(bank), before, strict=True))
    for layer in all_layers(bank):
        slot, (a_buffer, b_buffer) = layer.store.slots["a"], layer.store.buffers
        assert (slot.A_RI.data_ptr(), slot.B_RO.data_ptr()) == (a_buffer.data_ptr(), b_buffer.data_ptr()), (
            "the old buffer is held"
        )
    assert all(p is q for p, q in zip(bank.parameters("a"), leaves, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(leaves, values, strict=True))
    assert all(p.grad is g for p, g in zip(leaves, grads, strict=True))
    for p in leaves:
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state[id(p)].items())
    # and the next step goes on from it: as in a bank that never grew
    other_model, other = _linear()
    add(other, "a", rank=3)
    other_optimizer = torch.optim.AdamW(other.parameters("a"), lr=0.1)
    for m, b, o, steps in ((other_model, other, other_optimizer, 2), (model, bank, optimizer, 1)):
        for _ in range(steps):
            o.zero_grad()
            with b.route("a"):
                m(torch.ones(2, 8)).square().sum().backward()
            o.step()
    for mine, alone in zip(bank.parameters("a"), other.parameters("a"), strict=True):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize("change", ["add", "grow", "remove another", "remove and add"])
def test_trap1_a_change_between_forward_and_backward_is_an_error(change: str) -> None:
    model, bank = two("handwritten")
    with bank.route(["a", BASE]):
        loss = outputs(model, ids(2)).square().sum()
    if change in ("add", "grow"):
        bank.add("c", AdapterConfig(rank=2 if change == "add" else 16))
    else:
        bank.remove("b")
        if change == "remove and add":
            bank.add("b", AdapterConfig(rank=5))
    with pytest.raises(RoutingError, match=r"added or removed between this forward pass and its backward"):
        loss.backward()
    assert all(p.grad is None for p in bank.parameters("a"))
    with bank.route(["a", BASE]):
        outputs(model, ids(2)).square().sum().backward()
    assert all(p.grad is not None for p in bank.parameters("a"))


def test_an_optimizer_step_between_forward_and_backward_is_an_error() -> None:
    model, bank = two("handwritten")
    with bank.route("a"):
        outputs(model, ids(2)).sum().backward()
        loss = outputs(model, ids(2)).square().sum()
    torch.optim.SGD(bank.parameters("a"), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_memory_doesnt_grow_over_200_add_and_remove_cycles() -> None:
    _, bank = _linear()
    rng = random.Random(0)
    bank.add("stays", AdapterConfig(rank=4))
    capacities = []
    for i in range(200):
        bank.add(f"a{i}", AdapterConfig(rank=4))
        bank.add(f"b{i}", AdapterConfig(rank=rng.choice([1, 2, 8])))
        bank.remove(f"a{i}")
        bank.remove(f"b{i}")
        capacities.append([layer.store.capacity for layer in all_layers(bank)])
    assert capacities[-1] == capacities[0] == [GRANULE, GRANULE]
    assert bank.names == ("stays",)
    assert len(list(bank.model.parameters())) == 4 + 4


def test_a_store_reuses_gaps_and_grows_logarithmically() -> None:
    store = RankStore(4, 4, torch.device("cpu"))
    a, b = store.allocate("a", 6), store.allocate("b", 6)
    assert (a.start, a.stop, b.start, b.stop) == (0, 6, 6, 12)
    store.free("a")
    assert store.allocate("c", 7).start == 12  # the gap is too small
    assert store.allocate("d", 4).start == 0
    assert store.allocate("e", 2).start == 4
    growths, last = 0, store.capacity
    for i in range(100):
        store.allocate(f"s{i}", 8)
        growths, last = growths + (store.capacity != last), store.capacity
    assert growths < 10
    assert store.capacity < 2 * store.ranks_in_use
    spans = sorted((slot.start, slot.stop) for slot in store.slots.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans)), "slots overlap"


def test_trap2_cost_follows_the_ranks_in_use() -> None:
    """A rank-2 slot beside a rank-64 slot saves and multiplies two ranks: told by what its backward keeps."""
    model = nn.Sequential(nn.Linear(32, 32))
    bank = attach(model)
    add(bank, "small", rank=2)
    add(bank, "large", rank=32)
    kept: list[torch.Size] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t),
        bank.route(["small", BASE]),
    ):
        model(torch.ones(2, 5, 32))
    assert any(shape.numel() == 5 * 2 for shape in kept), "xA of the small slot's one row"
    assert not any(shape.numel() == 5 * 32 for shape in kept)
    assert all(32 not in shape[:-1] or shape == torch.Size([32, 32]) for shape in kept), (
        "only the base weight is as large as that"
    )


@pytest.mark.filterwarnings("ignore:.*have one weight")
@pytest.mark.parametrize("between", [{"bias": "all"}, {"trainable_token_indices": [3, 7]}])
def test_an_adapter_without_ranks_in_a_layer_gives_no_others_ranks_away(between: dict[str, Any]) -> None:
    """What trains a bias or rows alone takes no room there; the next one mustn't begin where it stands."""
    bank = attach(make("gpt2"))
    targets = ["c_fc", "wte"]
    bank.add("a", AdapterConfig(rank=3, targets=targets))
    bank.add("b", AdapterConfig(rank=3, targets=["c_attn"], **between))
    bank.add("c", AdapterConfig(rank=3, targets=targets))
    before = {key: p.detach().clone() for key, p in bank.named_parameters("a")}
    with torch.no_grad():
        for p in bank.parameters("c"):
            p.fill_(7.0)
    assert all(torch.equal(p, before[key]) for key, p in bank.named_parameters("a"))


def test_places_without_ranks_anywhere_in_a_store_never_overlap() -> None:
    generator = random.Random(0)
    store = RankStore(4, 4, torch.device("cpu"))
    for number in range(300):
        if store.slots and generator.random() < 0.4:
            store.free(generator.choice(list(store.slots)))
        store.allocate(str(number), generator.choice([0, 0, 1, 2, 5]))
        taken = [place for slot in store.slots.values() for place in range(slot.start, slot.stop)]
        assert len(taken) == len(set(taken))
