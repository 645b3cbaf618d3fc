"""Which rows use which adapter: names, mixtures, tokens, multiplied rows, threads, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.errors import AdapterNameError, LorabankError, RoutingError
from tests.bank.tiny import TorchEncoder, add, clear, fill, gradients, ids, make, outputs, t5, two


def _each(model: nn.Module, bank: AdapterBank, x: torch.Tensor, routes: list[Any]) -> torch.Tensor:
    rows = []
    for i, route in enumerate(routes):
        with bank.route([route]):
            rows.append(outputs(model, x[i : i + 1]).detach())
    return torch.cat(rows)


def test_a_mixture_is_the_weighted_sum_of_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    bank = attach(model)
    add(bank, "a")
    add(bank, "b", rank=2)
    x = torch.randn(1, 8)
    with torch.no_grad():
        base, y = (_apply(bank, model, x, route) for route in (BASE, {"a": 0.7, "b": -2.0}))
        a, b = (_apply(bank, model, x, route) - base for route in ("a", "b"))
    torch.testing.assert_close(y, base + 0.7 * a - 2.0 * b)


def _apply(bank: AdapterBank, model: nn.Module, x: torch.Tensor, route: Any) -> torch.Tensor:
    with bank.route(route):
        return model(x)


def test_a_weight_of_zero_doesnt_visit_the_slot() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    bank = attach(model)
    add(bank, "a")
    add(bank, "sick")
    with torch.no_grad():
        bank.parameters("sick")[1].fill_(float("nan"))
        expected = _apply(bank, model, torch.ones(2, 8), "a")
        assert torch.equal(_apply(bank, model, torch.ones(2, 8), {"a": 1.0, "sick": 0.0}), expected)
        assert torch.equal(_apply(bank, model, torch.ones(2, 8), ["a", {"a": 1, "sick": 0}]), expected)
    with pytest.raises(AdapterNameError, match=r"'sikc'.*did you mean 'sick'"), bank.route({"a": 1.0, "sikc": 0.0}):
        pass


def test_one_route_for_all_rows_takes_any_number_of_rows_and_shape() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    bank = attach(model)
    add(bank, "a")
    with bank.route("a"):
        one = model(torch.ones(8))
        for shape in ((3, 8), (2, 3, 8), (2, 1, 3, 8)):
            torch.testing.assert_close(model(torch.ones(*shape)), one.expand(*shape[:-1], 6))
    assert model(torch.ones(0, 8)).shape == (0, 6)


def test_per_token_routes_equal_separate_rows() -> None:
    model, bank = two("handwritten")  # without attention, tokens of a packed row are apart
    x = ids(1, tokens=6)
    routes = ["a", "a", BASE, "b", {"a": 0.5, "b": 2.0}, "a"]
    with bank.route(tokens=routes):
        packed = outputs(model, x)[0]
    torch.testing.assert_close(packed.detach(), _each(model, bank, x[0][:, None], routes)[:, 0])
    packed.square().sum().backward()
    mixed = gradients(bank)
    clear(bank)
    with bank.route(routes):
        outputs(model, x[0][:, None]).square().sum().backward()
    for key, expected in gradients(bank).items():
        torch.testing.assert_close(mixed[key], expected)
    message = r"'blocks.0.0'.*names 5 tokens, but the layer's input has 6.*one entry a token"
    with pytest.raises(RoutingError, match=message), bank.route(tokens=routes[:5]):
        outputs(model, x)


def test_the_innermost_route_wins_then_use_then_the_only_adapter() -> None:
    model = make("handwritten")
    bank = attach(model)
    x = ids(2)
    plain = outputs(model, x)
    assert torch.equal(outputs(model, x), plain)  # no adapter: the base
    add(bank, "a")
    only = outputs(model, x)
    assert not torch.allclose(only, plain)
    add(bank, "b")
    with pytest.raises(RoutingError, match=r"2 adapters \(a, b\) and no route is in force.*bank.route.*bank.use"):
        outputs(model, x)
    bank.use("b")
    sticky = outputs(model, x)
    with bank.route("a"):
        assert torch.equal(outputs(model, x), only)
        with bank.route(BASE):
            assert torch.equal(outputs(model, x), plain)
        assert torch.equal(outputs(model, x), only)
    assert torch.equal(outputs(model, x), sticky)
    bank.use(None)
    with pytest.raises(RoutingError, match=r"no route is in force"):
        outputs(model, x)
    bank.use("b")
    bank.remove("b")  # takes the sticky route back; one adapter is left
    assert torch.equal(outputs(model, x), only)


def test_a_route_is_taken_back_when_its_block_fails() -> None:
    model, bank = two("handwritten")
    with pytest.raises(ZeroDivisionError), bank.route("a"):
        raise ZeroDivisionError
    with pytest.raises(RoutingError, match=r"no route is in force"):
        outputs(model, ids(1))


def test_a_routing_can_be_built_once_and_used_often() -> None:
    model, bank = two("handwritten")
    routing = bank.routing(["a", BASE])
    with bank.route(routing):
        first = outputs(model, ids(2))
    with bank.route(routing) as same:
        assert same is routing
        assert torch.equal(outputs(model, ids(2)), first)
    bank.remove("a")
    with pytest.raises(RoutingError, match=r"names a, which was removed"), bank.route(routing):
        outputs(model, ids(2))
    with pytest.raises(RoutingError, match=r"a Routing is complete"), bank.route(routing, repeat=("tile", 2)):
        pass


@pytest.mark.parametrize(
    ("route", "error", "message"),
    [
        ("fromal", AdapterNameError, r"no adapter 'fromal' in the bank; it has: formal, terse \(did you mean 'formal'\?\)"),
        (["formal", "ters"], AdapterNameError, "did you mean 'terse'"),
        ({"formal": 1, "x": 2}, AdapterNameError, "no adapter 'x'"),
        ({}, RoutingError, "a mixture is {adapter name: finite weight}"),
        ({"formal": "1"}, RoutingError, "a mixture is"),
        ({"formal": True}, RoutingError, "a mixture is"),
        ({"formal": float("nan")}, RoutingError, "a mixture is"),
        ([], RoutingError, "an empty list of rows"),
        ([None], RoutingError, "expected an adapter's name, BASE or"),
        (3, RoutingError, "expected an adapter's name, BASE or"),
        (None, RoutingError, "either rows .* or tokens"),
    ],
)
def test_a_bad_route_says_what_was_expected(route: Any, error: type[Exception], message: str) -> None:
    bank = attach(make("handwritten"))
    for name in ("formal", "terse"):
        bank.add(name, AdapterConfig(rank=2))
    with pytest.raises(error, match=message), bank.route(route):
        pass


def test_routes_that_contradict_themselves() -> None:
    _, bank = two("handwritten")
    with pytest.raises(RoutingError, match=r"either rows .* or tokens"), bank.route("a", tokens=["a"]):
        pass
    with pytest.raises(RoutingError, match=r"'interleaf' is unknown.*did you mean 'interleave'"):
        bank.routing(["a"], repeat=("interleaf", 2))  # type: ignore[arg-type]
    for bad in (("tile", 0), ("tile", 1.5), ("tile", True)):
        with pytest.raises(RoutingError, match=r"whole number of copies"):
            bank.routing(["a"], repeat=bad)  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match=r"repeat=4; expected"):
        bank.routing(["a"], repeat=4)  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match=r"need a list with one entry a row"):
        bank.routing("a", repeat=("tile", 2))
    with pytest.raises(RoutingError, match=r"use: one route for all rows"):
        bank.use(["a", "b"])  # type: ignore[arg-type]


def test_trap4_a_batch_of_another_size_is_an_error_that_names_the_way_out() -> None:
    model, bank = two("llama")
    for rows in (1, 4):
        message = rf"q_proj'.*names 2 rows.*has {rows} .*repeat=\(\"interleave\", k\).*\"tile\""
        with pytest.raises(RoutingError, match=message), bank.route(["a", "b"]):
            outputs(model, ids(rows))


def test_trap4_tiled_rows_as_guidance_makes_them() -> None:
    model, bank = two("handwritten")
    x = ids(2)
    with bank.route(["a", "b"], repeat=("tile", 2)):
        tiled, plain = outputs(model, torch.cat([x, x])), outputs(model, x)
    torch.testing.assert_close(tiled[:2], plain)
    torch.testing.assert_close(tiled[2:], plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("how", ["beams", "sequences", "beams and sequences", "greedy"])
def test_trap4_generate_keeps_each_rows_adapter_through_beams_and_sequences(kind: str, how: str) -> None:
    model, bank = two(kind)
    for name in bank.names:
        fill(bank, name, size=3.0)  # enough to change BART's tokens too
    x = ids(3, tokens=4)
    arguments: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        "beams and sequences": {"num_beams": 3, "num_return_sequences": 2},
        "greedy": {},
    }[how]
    copies = max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1))
    arguments |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": arguments.get("do_sample", False), "pad_token_id": 0}

    def generate(rows: torch.Tensor) -> torch.Tensor:
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **arguments)

    routes = ["b", BASE, "a"]
    with bank.route(routes, repeat=("interleave", copies)):
        together = generate(x)
    apart = []
    for i, route in enumerate(routes):
        with bank.route(route):
            apart.append(generate(x[i : i + 1]))
    assert torch.equal(together, torch.cat(apart))
    with bank.route(BASE):
        assert not torch.equal(together, generate(x)), "adapters that change no token would prove nothing"
    if copies > 1:
        with pytest.raises(RoutingError, match=r"repeat="), bank.route(routes):
            generate(x)


def test_two_models_with_two_banks_dont_see_each_other() -> None:
    (one, bank_one), (other, bank_other) = two("handwritten", seed=0), two("handwritten", seed=1)
    x = ids(2)
    expected_one, expected_other = _each(one, bank_one, x, ["a", "b"]), _each(other, bank_other, x, ["b", BASE])
    with bank_one.route(["a", "b"]):
        with pytest.raises(RoutingError, match=r"no route is in force"):
            outputs(other, x)
        with bank_other.route(["b", BASE]):
            torch.testing.assert_close(outputs(one, x).detach(), expected_one)
            torch.testing.assert_close(outputs(other, x).detach(), expected_other)
    bank_one.use("a")
    with pytest.raises(RoutingError, match=r"no route is in force"):
        outputs(other, x)
    before = [p.detach().clone() for p in bank_other.parameters()]
    outputs(one, x).sum().backward()
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(bank_other.parameters(), before, strict=True))


def test_trap4_another_thread_doesnt_see_route_and_sees_use() -> None:
    model, bank = two("handwritten")
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(outputs(model, ids(1)).detach())
        except LorabankError as error:
            results.append(error)

    def in_thread() -> Any:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return results.pop()

    with bank.route("a"):
        expected = outputs(model, ids(1)).detach()
        assert isinstance(in_thread(), RoutingError)
    bank.use("a")
    with bank.route("b"):
        assert torch.equal(in_thread(), expected)


def test_threads_route_apart() -> None:
    model, bank = two("handwritten")
    x = ids(1)
    expected = {route: _each(model, bank, x, [route]) for route in ("a", "b")}
    wrong: list[str] = []

    def work(route: str) -> None:
        for _ in range(20):
            with bank.route([route]), torch.no_grad():
                if not torch.equal(outputs(model, x), expected[route]):
                    wrong.append(route)

    threads = [threading.Thread(target=work, args=(route,)) for route in ("a", "b", "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layers_that_dont_have_rows_first_take_one_route_only() -> None:
    torch.manual_seed(0)
    model = TorchEncoder(batch_first=False).eval()
    bank = attach(model)
    add(bank, "a", targets=["linear1", "linear2"])
    x = ids(4, tokens=4)  # as many tokens as rows: nothing but the layer's own word tells them apart
    with bank.route("a"):
        model(x)
    message = r"encoder.layers.0.linear1.*\(tokens, rows, features\).*batch_first=True"
    with pytest.raises(RoutingError, match=message), bank.route(["a", BASE, "a", BASE]):
        model(x)


def test_experts_in_a_list_take_one_route_only() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, 1)
            chosen = flat.sum(-1) > 0
            y = torch.empty_like(flat)
            for i, expert in enumerate(self.experts):
                y[chosen == bool(i)] = expert(flat[chosen == bool(i)])
            return y.view_as(x)

    model = Experts()
    bank = attach(model)
    add(bank, "a")
    x = torch.stack([torch.ones(2, 8), -torch.ones(2, 8)])  # each expert sees two tokens, and the batch has two rows
    bank.use("a")
    model(x)
    with pytest.raises(RoutingError, match=r"experts.0.*tokens of all rows in an order of its own"), bank.route(["a", BASE]):
        model(x)


def test_an_encoder_decoder_routes_both_sides() -> None:
    torch.manual_seed(0)
    model = t5().eval()
    bank = attach(model)
    add(bank, "a")
    assert {path.split(".")[0] for path in bank.adapter("a").layers} == {"encoder", "decoder"}
