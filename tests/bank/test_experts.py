"""Stacked experts: what a route, a hook, another weight or another file may do to them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lorabank as lb
from lorabank import BASE
from lorabank.bank.adaptable import unsupported_linear_maps
from lorabank.bank.stacked.experts import LoRAExperts
from lorabank.errors import AdapterFileError, LorabankError, MergeError, RoutingError, UnreachedLayerError
from tests.bank.tiny import add, gpt_oss, ids, mixtral

STACK = "model.layers.0.mlp.experts.down_proj"


def _model() -> Any:
    torch.manual_seed(0)
    return mixtral().eval()


def _bank(model: nn.Module, *names: str) -> lb.AdapterBank:
    bank = lb.attach(model)
    for name in names or ("a", "b"):
        add(bank, name, targets=["experts"])
    return bank


@pytest.mark.parametrize("route", [["a", "b", "a", "b"], ["a"], ["a", "b", BASE]])
def test_a_route_that_doesnt_fit_the_batch_is_an_error(route: list[Any]) -> None:
    model = _model()
    bank = _bank(model)
    with pytest.raises(RoutingError, match=rf"got 12 tokens of 2 rows, and the route has {len(route)} rows"), bank.route(route):
        model(ids(2))


@pytest.mark.parametrize(("how", "order"), [("interleave", [0, 0, 1, 1]), ("tile", [0, 1, 0, 1])])
def test_rows_that_a_library_multiplies(how: Any, order: list[int]) -> None:
    model, x = _model(), ids(2)
    bank = _bank(model)
    with torch.no_grad():
        with bank.route(["a", "b"]):
            apart = model(x).logits
        with bank.route(["a", "b"], repeat=(how, 2)):
            torch.testing.assert_close(model(x[order]).logits, apart[order])
            torch.testing.assert_close(model(x).logits, apart)


def test_hooks_from_before_are_named_and_later_ones_run() -> None:
    model, seen = _model(), list[int]()
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_hook(lambda *_: seen.append(1))
    bank = _bank(model, "a")
    with pytest.raises(LorabankError, match=r"experts 'model.layers.0.mlp.experts' carry hooks"):
        model(ids(2))
    with bank.route(BASE):
        model(ids(2))
    assert seen == [1]
    hook.remove()
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: seen.append(2))
    model(ids(2))
    assert seen == [1, 2]


def test_a_forward_of_its_own_is_not_a_registered_one() -> None:
    model = _model()
    kind = type(model.model.layers[0].mlp.experts)

    class Louder(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            return 3 * super().forward(*args)

    model.model.layers[0].mlp.experts.__class__ = Louder
    assert "forward of its own" in unsupported_linear_maps(model)["model.layers.0.mlp.experts"]


class _PackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.zeros(3, 4, 2, 16, dtype=torch.uint8), requires_grad=False)


def test_experts_in_fewer_bits_are_said_to_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _PackedExperts())
    assert "blocks" in unsupported_linear_maps(model)["1"]


def test_another_weight_in_the_stacks_place_is_the_one_that_counts() -> None:
    model, x = _model(), ids(2)
    bank = _bank(model, "a")
    other = {key: value * 1.5 if "experts" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    found = model(x).logits.detach()
    fresh = _model()
    fresh.load_state_dict(other)
    beside = lb.attach(fresh)
    beside.load("a", bank.adapter("a"), force=True)
    torch.testing.assert_close(found, fresh(x).logits.detach())


def test_a_merge_isnt_taken_back_from_a_converted_model() -> None:
    model = _model()
    bank = _bank(model, "a")
    adapter = bank.adapter("a")
    bank.detach()
    handle = lb.merge(model, adapter, say=None)
    with pytest.raises(MergeError, match="convert the model back first"):
        model.to(torch.float64)
        handle.unmerge()


def test_an_adapter_of_another_number_of_experts_is_refused() -> None:
    bank = _bank(_model(), "a")
    taken = bank.adapter("a")
    for count, said in ((8, "8"), (0, "no")):
        layers = {path: replace(layer, stack=count) for path, layer in taken.layers.items()}
        with pytest.raises(AdapterFileError, match=f"made for one of {said} stacked experts, the model has 3 there"):
            bank.load("b", replace(taken, layers=layers))


def test_a_module_that_passes_its_experts_is_found_out() -> None:
    model = _model()
    block = model.model.layers[0].mlp
    block.forward = lambda hidden: hidden
    _bank(model, "a")
    with pytest.raises(UnreachedLayerError, match="never called"):
        model(ids(1))


def test_a_kept_routing_follows_slots_that_changed_places() -> None:
    model, x = _model(), ids(2)
    bank = _bank(model)
    kept = bank.routing(["a", "b"], exact=False)
    adapters = {name: bank.adapter(name) for name in "ab"}
    with torch.no_grad(), bank.route(kept):
        expected = model(x).logits
    for name in "ab":
        bank.remove(name)
    for name in "ba":
        bank.load(name, adapters[name])
    with torch.no_grad(), bank.route(kept):
        torch.testing.assert_close(model(x).logits, expected)


def test_detach_gives_the_memory_back() -> None:
    model = _model()
    bank = _bank(model, "a")
    store = weakref.ref(next(m for m in model.modules() if isinstance(m, LoRAExperts)).carriers["down_proj"].store)
    gc.disable()
    try:
        bank.detach()
        del bank
        assert store() is None
    finally:
        gc.enable()


def test_experts_whose_matrices_lie_the_other_way_have_biases() -> None:
    torch.manual_seed(0)
    model = gpt_oss().eval()
    bank = lb.attach(model)
    add(bank, "a", targets=["experts"])
    with bank.route(["a", BASE]):
        model(ids(2)).logits.sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
