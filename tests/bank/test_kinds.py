"""Convolutions and embeddings in a bank: which are chosen, how their rows are told apart, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, AdapterConfig, attach
from lorabank.engine.rows import folds_tokens
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
    for targets in ("table", "all-embedding"):
        with pytest.raises(TargetError, match=r"table.*with max_norm it writes into its weight as it is called"):
            chosen(model, targets=targets)


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
    with pytest.raises(RoutingError, match="rows may come multiplied"), bank.route(["a", "b"], repeat=("tile", 2)):
        outputs(model, x[:2])


class Looked(nn.Module):
    """An embedding of one name, looked up with ids that are given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, nn.Embedding(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        looked = self.get_submodule(self.name)(ids)
        return self.head(x + (looked if looked.ndim == 3 or len(looked) != len(x) else looked[:, None]))


@pytest.mark.parametrize("name", ["pos_embed", "position_embeddings", "wpe", "positional"])
def test_positions_as_a_vector(name: str) -> None:
    """Once for all rows; a vector of as many as rows could be either, which is an error and no guess."""
    model, x = Looked(name), torch.randn(3, 5, 4)
    bank = attach(model)
    add(bank, "a", targets=name)
    places = torch.arange(5)
    with bank.route("a"):
        expected = model(x, places)[0]
    with bank.route(["a", BASE, BASE]):
        found = model(x, places)
    torch.testing.assert_close(found[0], expected)
    with bank.route(BASE):
        assert torch.equal(found[1:], model(x, places)[1:])
    with (
        pytest.raises(RoutingError, match="3 ids in one dimension, which may be one a row or one a token"),
        bank.route(["a"] * 3),
    ):
        model(x[:, :3], torch.arange(3))
    with pytest.raises(RoutingError, match="rows may come multiplied"), bank.route(["a"], repeat=("tile", 3)):
        model(x, places)
    with bank.route(["a"]):
        torch.testing.assert_close(model(x[:1], places)[0], expected)


@pytest.mark.parametrize("name", ["row_embeddings", "frame_embed", "purpose_embedding", "time_embed"])
def test_a_vector_of_ids_without_a_meaning_is_an_error(name: str) -> None:
    model = Looked(name)
    bank = attach(model)
    add(bank, "a", targets=name)
    for ids_T in (torch.arange(5), torch.tensor([2, 0, 1])):
        with pytest.raises(RoutingError, match="ids in one dimension"), bank.route(["a", BASE, "a"]):
            model(torch.randn(3, 5, 4), ids_T)
        with bank.route("a"):
            model(torch.randn(3, 5, 4), ids_T)


def test_a_vector_of_labels_is_one_a_row() -> None:
    model = Looked("label_embedding")
    bank = attach(model)
    add(bank, "a", targets="label_embedding")
    x, labels = torch.randn(3, 5, 4), torch.tensor([2, 0, 1])
    with bank.route("a"):
        everywhere = model(x, labels)
    with bank.route(["a", BASE, "a"]):
        mixed = model(x, labels)
    assert mixed.shape == everywhere.shape
    torch.testing.assert_close(mixed[[0, 2]], everywhere[[0, 2]])
    assert not torch.allclose(mixed[1], everywhere[1])


@pytest.mark.parametrize("name", ["distance_embedding", "pe_k", "rel_embeddings", "relative_attention_bias"])
def test_embeddings_of_distances_by_their_names(name: str) -> None:
    model = Looked(name)
    bank = attach(model)
    add(bank, "a", targets=name)
    with pytest.raises(RoutingError, match="its ids are distances between tokens"), bank.route(["a", BASE, "a"]):
        model(torch.randn(3, 3, 4), torch.zeros(3, 3, dtype=torch.int64))


def test_a_linear_layer_of_such_a_name_is_none() -> None:
    model = nn.Sequential()
    model.add_module("rel_pos_proj", nn.Linear(4, 4))
    bank = attach(model)
    add(bank, "a", targets="rel_pos_proj")
    with bank.route(["a", BASE]):
        model(torch.randn(2, 4))


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


def test_what_comes_out_may_be_changed_in_place() -> None:
    """As a network does whose convolution is followed by ReLU(inplace=True)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    bank = attach(model)
    add(bank, "a", rank=2, targets="all-conv")
    x = torch.randn(2, 3, 4, 4)
    with bank.route(["a", BASE]):
        model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.parameters("a"))


class Standardised(nn.Conv1d):
    """A convolution that does more than its class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std(), bias)


def test_what_a_kind_can_not_adapt_is_not_left_out_in_silence() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv1d(2, 2, 1),
            "up": nn.ConvTranspose1d(2, 2, 1),
            "own": Standardised(2, 2, 1),
            "bag": nn.EmbeddingBag(3, 2),
        }
    )
    with pytest.raises(
        TargetError, match=r"'all-conv' would leave 2 unadapted: up \(a ConvTranspose1d .*\); own \(it has a conv"
    ):
        chosen(model, targets="all-conv")
    assert chosen(model, targets="all-conv", exclude=["up", "own"]) == {"plain"}
    for name, said in (("up", "a ConvTranspose1d isn't supported yet"), ("own", "it has a convolution of its own")):
        with pytest.raises(TargetError, match=f"names {name}, which can't be adapted: {said}"):
            chosen(model, targets=["plain", name])
    with pytest.raises(TargetError, match="'all-embedding' would leave 1 unadapted: bag"):
        chosen(model, targets="all-embedding")


def test_roles_in_exclude_are_of_every_kind() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(2, 2), "dw": nn.Conv1d(2, 2, 1)}), "up": nn.Conv1d(2, 2, 1)})
    assert chosen(model, targets="re:.*", exclude="attention") == {"up"}


def test_a_part_that_is_in_none_of_the_blocks_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"'embed_tokens' is in none of the blocks \[0\]"):
        chosen(llama(), targets=["q", "embed_tokens"], layers=[0])


def test_folded_rows_are_seen_in_linear_layers_alone() -> None:
    """Positions as a vector have as many entries as a row has tokens."""
    bank = attach(gpt2().eval())
    add(bank, "a", targets=["all-embedding", "mlp"])
    assert not folds_tokens(bank)
