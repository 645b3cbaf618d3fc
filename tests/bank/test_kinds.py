"""Convolutions and embeddings in a bank: which are chosen, how their rows are told apart, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.errors import RoutingError, TargetError
from tests.bank.tiny import VOCABULARY, add, gpt2, ids, llama, make, outputs, t5, two

PICTURES = {"embed", "positions", "along", "blocks.0", "blocks.1", "blocks.2", "head"}


def chosen(model: nn.Module, **config: Any) -> set[str]:
    """Paths that an adapter with these targets has."""
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=1, **config))
    found = set(bank.adapter("a").layers)
    bank.detach()
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"targets": "all-conv"}, {"along", "blocks.0", "blocks.1", "blocks.2"}),
        ({"targets": "all-embedding"}, {"embed", "positions"}),
        ({"targets": ["all-linear", "all-conv", "all-embedding"]}, PICTURES),
        ({"targets": "all-linear"}, {"head"}),
        ({"targets": "blocks.*"}, {"blocks.0", "blocks.1", "blocks.2"}),
        ({"targets": ["along", "embed"]}, {"along", "embed"}),
        ({"targets": "re:.*", "exclude": "all-conv"}, {"embed", "positions", "head"}),
        (
            {"targets": ["all-conv", "head"], "exclude": ["blocks.1"], "rank_pattern": {"along": 2}},
            {"along", "blocks.0", "blocks.2", "head"},
        ),
    ],
)
def test_targets(config: dict[str, Any], expected: set[str]) -> None:
    assert chosen(make("pictures"), **config) == expected


def test_roles_are_of_linear_layers() -> None:
    """A module called `mlp` may hold convolutions."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))])})
    assert chosen(model, targets="mlp") == {"layers.0.0"}


@pytest.mark.parametrize(
    ("part", "said"),
    [("all-conv", "conv of the model"), ("all-embedding", "embedding of"), ("all-embeddings", "layer .* mean 'all-embedding'")],
)
def test_what_a_model_lacks_is_an_error(part: str, said: str) -> None:
    with pytest.raises(TargetError, match=f"targets: '{part}' matches no {said}"):
        chosen(nn.Sequential(nn.Linear(4, 4)), targets=part)


def test_an_embedding_that_writes_into_its_weight_is_refused_by_name() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4, max_norm=1.0), "head": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="names table, a Embedding, which can't be adapted"):
        chosen(model, targets="table")


# ---- rows --------------------------------------------------------------------------------------------------------------------


def test_positions_that_are_given_once_are_those_of_every_row() -> None:
    model = gpt2().eval()
    bank = attach(model)
    add(bank, "a", targets="wpe")
    add(bank, "b", targets=["wpe", "wte"])
    x = ids(3)
    with bank.route(["a", BASE, "b"]):
        mixed = outputs(model, x).detach()
    for row, route in enumerate(["a", BASE, "b"]):
        with bank.route(route):
            torch.testing.assert_close(outputs(model, x[row : row + 1])[0], mixed[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(RoutingError, match="If a library multiplies the rows"), bank.route(["a", "b"], repeat=("tile", 2)):
        outputs(model, x[:2])


class Positions(nn.Module):
    """Places in a row as a vector, once for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.pos_embed(torch.arange(x.shape[1])))


def test_as_many_positions_as_rows_are_still_positions() -> None:
    torch.manual_seed(0)
    model, x = Positions(), torch.randn(3, 3, 4)
    bank = attach(model)
    add(bank, "a", targets="pos_embed")
    with bank.route("a"):
        expected = model(x)[0]
    with bank.route(["a", BASE, BASE]):
        found = model(x)
    torch.testing.assert_close(found[0], expected)
    with bank.route(BASE):
        assert torch.equal(found[1:], model(x)[1:])


def test_distances_can_not_be_routed_by_rows() -> None:
    """T5's ids are (tokens, tokens): as many rows as tokens would be taken for them."""
    model = t5().eval()
    bank = attach(model)
    add(bank, "a", rank=2, targets="relative_attention_bias")
    x = ids(6)
    assert x.shape[0] == x.shape[1]
    with (
        pytest.raises(RoutingError, match="rows apart: its ids are distances between tokens"),
        bank.route(["a"] * 6),
    ):
        outputs(model, x)
    with bank.route("a"):
        changed = outputs(model, x)
    with bank.route(BASE):
        assert not torch.allclose(outputs(model, x), changed)


def test_packed_tokens_are_routed_one_by_one_in_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, 4))
    bank = attach(model)
    add(bank, "a", targets=["0"])
    add(bank, "b", targets=["0", "1"])
    x = ids(1, tokens=5)
    routes = ["a", "a", BASE, "b", {"a": 0.5, "b": 2.0}]
    with bank.route(tokens=routes):
        mixed = model(x)
    for place, route in enumerate(routes):
        with bank.route(route):
            torch.testing.assert_close(model(x[:, place])[0], mixed[0, place])


def test_a_convolution_mixes_tokens() -> None:
    model, bank = two("pictures")
    with (
        pytest.raises(RoutingError, match="'along' is a convolution, which mixes neigh"),
        bank.route(tokens=["a"] * 6),
    ):
        outputs(model, ids(1))


def test_a_sample_without_a_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    bank = attach(model)
    add(bank, "a", targets="all-conv")
    x = torch.randn(3, 5, 5)
    with bank.route("a"):
        alone, batched = model(x), model(x[None])
    torch.testing.assert_close(alone, batched[0])
    with pytest.raises(RoutingError, match="one sample without a batch dimension"), bank.route(["a", BASE, "a"]):
        model(x)


def test_a_summary_names_them() -> None:
    bank = attach(llama())
    add(bank, "a", targets=["all-embedding", "q"])
    text = str(bank.summary())
    assert "embed_tokens × 1, q_proj × 2" in text
    bank = two("pictures")[1]
    assert "along × 1" in str(bank.summary())
