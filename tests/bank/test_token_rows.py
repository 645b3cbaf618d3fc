"""Rows of an embedding that an adapter trains as its own: lookups, tied heads, grown vocabularies, what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lorabank import BASE, Adapter, AdapterConfig, attach, combine, merge
from lorabank.bank.bank import AdapterBank
from lorabank.errors import AdapterFileError, ConfigError, MergeError, TargetError
from lorabank.formats.token_rows import TokenRows
from tests.bank.tiny import VOCABULARY, Handwritten, Pictures, add, gpt2, gradients, ids, llama, outputs, state_bytes, t5, two

IDS = [30, 7, 12]


def tied(tie: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model: Any = llama(tie_word_embeddings=tie)
    return model.to(dtype).eval()


def rows(bank: AdapterBank, name: str = "a") -> dict[str, nn.Parameter]:
    return {key: leaf for key, leaf in bank.named_parameters(name) if key.endswith(".rows")}


def with_ids(count: int = 3) -> Tensor:
    """Rows with each of the trained ids in them, and others."""
    x = ids(count)
    x[:, :3] = torch.tensor(IDS)
    return x


@pytest.mark.parametrize("tie", [True, False])
def test_a_fresh_adapter_changes_nothing(tie: bool) -> None:
    model = tied(tie)
    x = with_ids()
    expected = outputs(model, x).detach()
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2, trainable_token_indices=IDS))
    with bank.route(["a", BASE, "a"]):
        found = outputs(model, x)
    assert torch.equal(found, expected)
    assert {key: leaf.shape for key, leaf in rows(bank).items()} == {"model.embed_tokens.rows": (3, 16)}
    assert torch.equal(rows(bank)["model.embed_tokens.rows"], model.get_parameter("model.embed_tokens.weight")[IDS])


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("tie", [True, False])
def test_rows_train_as_the_tables_own_do(tie: bool, decay: float) -> None:
    """Law 3's twin: plain torch that trains the table itself, gradients of other rows zeroed; decay is of these rows alone."""
    model, x = tied(tie), with_ids()
    twin = copy.deepcopy(model).requires_grad_(False)
    bank = attach(model)
    for name in ("a", "other"):
        bank.add(name, AdapterConfig(rank=2, trainable_token_indices=IDS))
    leaf = rows(bank)["model.embed_tokens.rows"]
    table = twin.get_parameter("model.embed_tokens.weight").requires_grad_(True)
    ours = torch.optim.AdamW([leaf], lr=1e-2, weight_decay=decay, eps=1e-4)
    own = nn.Parameter(table.detach()[IDS].clone())
    theirs = torch.optim.AdamW([own], lr=1e-2, weight_decay=decay, eps=1e-4)
    for _ in range(3):
        with bank.route(["a", "other", "a"]):
            outputs(model, x)[[0, 2]].square().sum().backward()
        outputs(twin, x[[0, 2]]).square().sum().backward()
        assert leaf.grad is not None
        assert table.grad is not None
        torch.testing.assert_close(leaf.grad, table.grad[IDS], rtol=1e-3, atol=1e-5)
        own.grad = table.grad[IDS]
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            table[IDS] = own
        table.grad = None
    torch.testing.assert_close(leaf, own, rtol=1e-4, atol=1e-5)


def test_logits_of_a_tied_head_change_for_these_ids_alone() -> None:
    model = tied()
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2, trainable_token_indices=IDS))
    head, h = model.get_submodule("lm_head"), torch.randn(2, 5, 16)
    with torch.no_grad():
        rows(bank)["model.embed_tokens.rows"].add_(torch.randn(3, 16))
        with bank.route(BASE):
            expected = head(h)
        with bank.route([{"a": 0.5}, "a"]):
            found = head(h)
        change = h @ (rows(bank)["model.embed_tokens.rows"] - head.get_parameter("weight")[IDS]).t()
    others = [i for i in range(VOCABULARY) if i not in IDS]
    assert torch.equal(found[..., others], expected[..., others])
    torch.testing.assert_close(found[..., IDS], expected[..., IDS] + torch.tensor([0.5, 1.0])[:, None, None] * change)


@pytest.mark.parametrize("tie", [True, False])
def test_a_vocabulary_that_grew(tie: bool) -> None:
    model = tied(tie)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    bank = attach(model)
    new = [VOCABULARY, VOCABULARY + 3]
    add(bank, "a", trainable_token_indices=new)
    add(bank, "b", trainable_token_indices=[VOCABULARY + 1])
    x = ids(3)
    x[:, 2], x[:, 4] = new[0], new[1]
    with bank.route(["a", BASE, "b"]):
        y = outputs(model, x)
    with bank.route(BASE):
        assert torch.equal(outputs(model, x)[1], y[1])
    y.square().mean().backward()
    assert (rows(bank)["model.embed_tokens.rows"].grad != 0).any(1).all()
    adapter = bank.adapter("a")
    assert adapter.token_rows["model.embed_tokens"].ids == tuple(new)
    small = attach(tied(tie))
    with pytest.raises(AdapterFileError, match=r"id 51 is outside of its 48 rows.*call model\.resize_token_embeddings"):
        small.load("a", adapter, force=True)
    assert small.names == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model, bank = two("rows of tied llama")
        assert isinstance(model, PreTrainedModel)
        model.train(checkpointing)
        if checkpointing:
            new = "activation_checkpointing_enable" in vars(PreTrainedModel)
            arguments = {"use_reentrant": reentrant}
            getattr(model, "activation_checkpointing_enable" if new else "gradient_checkpointing_enable")(arguments)
        with bank.route(["a", "b", BASE]):
            outputs(model, with_ids()).square().mean().backward()
        results.append(gradients(bank))
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, msg=lambda m, key=key: f"{key}: {m}")


def test_tokens_are_routed_one_by_one() -> None:
    model = Handwritten()
    bank = attach(model)
    for name in ("a", "b"):
        add(bank, name, trainable_token_indices={"embed": list(range(20))})
    x = ids(2)
    routes: list[Any] = ["a", BASE, {"a": 0.5, "b": -1.0}, "b", "a", "b"] * 2
    with bank.route(tokens=routes):
        packed = model(x).view(12, -1)
    for i, route in enumerate(routes):
        with bank.route(route):
            torch.testing.assert_close(packed[i], model(x.view(-1)[i : i + 1])[0])


@pytest.mark.parametrize("kind", ["rows of tied llama", "rows of handwritten"])
def test_rows_that_go_nan_touch_no_other_row_nor_other_tokens(kind: str) -> None:
    results = []
    for poisoned in (False, True):
        model, bank = two(kind)
        if poisoned:
            with torch.no_grad():
                for leaf in rows(bank).values():
                    leaf[0].fill_(math.nan)
        x = with_ids(4)
        x[x == next(iter(bank.adapter("a").token_rows.values())).ids[0]] = 40
        with bank.route(["a", "b", BASE, "b"]):
            y = outputs(model, x)
        y[1:].flatten(1).square().mean(1).sum().backward()
        results.append((y.detach(), gradients(bank)))
    (clean_y, clean), (sick_y, sick) = results
    assert torch.equal(sick_y[1:], clean_y[1:])
    assert sick_y[0].isnan().any() == (kind == "rows of tied llama")  # only a head gives logits of an id that isn't there
    first = 5
    others = [i for i in range(VOCABULARY) if i != first]
    assert torch.equal(sick_y[0][:, others], clean_y[0][:, others])
    assert all(torch.equal(sick[key], clean[key]) for key in clean if key.startswith("b:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_law5_merged_equals_unmerged_and_comes_back_bit_for_bit(tie: bool, dtype: torch.dtype) -> None:
    bank = attach(tied(tie, dtype))
    add(bank, "a", trainable_token_indices=IDS)
    adapter, x = bank.adapter("a"), with_ids()
    with torch.no_grad():
        expected = outputs(bank.model, x).float()
    model = tied(tie, dtype)
    before = state_bytes(model)
    handle = merge(model, adapter, say=None, inputs={"input_ids": x}, force=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs(model, x).float().detach(), expected, rtol=tolerance, atol=tolerance)
    weight = model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(weight[IDS], adapter.token_rows["model.embed_tokens"].rows.to(dtype))
    assert set(handle.report.extras) == {"model.embed_tokens.weight"}
    handle.unmerge()
    assert state_bytes(model) == before


def test_rows_of_a_head_alone() -> None:
    model, x = tied(False), with_ids()
    bank = attach(model)
    add(bank, "a", trainable_token_indices={"lm_head": IDS})
    with bank.route("a"):
        expected = outputs(model, x).detach()
    adapter = bank.adapter("a")
    merged = tied(False)
    merge(merged, adapter, say=None)
    torch.testing.assert_close(outputs(merged, x), expected, rtol=1e-4, atol=1e-5)
    bound = tied()
    attach(bound).load("a", adapter, force=True)
    outputs(bound, x)
    with pytest.raises(
        MergeError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight: merging rows would change both"
    ):
        merge(tied(), adapter, force=True)


def test_both_ends_that_arent_tied_have_rows_of_their_own() -> None:
    both = {"embed_tokens": IDS, "lm_head": IDS}
    bank = attach(tied(False))
    bank.add("a", AdapterConfig(rank=1, trainable_token_indices=both))
    assert set(rows(bank)) == {"model.embed_tokens.rows", "lm_head.rows"}
    bank = attach(tied())
    bank.add("a", AdapterConfig(rank=1, trainable_token_indices=both))
    assert set(rows(bank)) == {"model.embed_tokens.rows"}
    with pytest.raises(TargetError, match="have one weight, and other ids are named for each"):
        bank.add("b", AdapterConfig(rank=1, trainable_token_indices={"embed_tokens": IDS, "lm_head": [3]}))


def test_rows_of_t5s_table_are_read_by_encoder_decoder_and_head() -> None:
    """`shared`, which nothing calls, is the table that the model names; PEFT's rows are read by all that have its weight."""
    torch.manual_seed(0)
    model: Any = t5().eval()
    before, x = state_bytes(model), with_ids()
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2, targets=["q"], trainable_token_indices=IDS))
    bank.add("same", AdapterConfig(rank=2, targets=["q"], trainable_token_indices={"shared": IDS, "decoder.embed_tokens": IDS}))
    assert set(rows(bank)) == set(rows(bank, "same")) == {"shared.rows"}
    with torch.no_grad():
        rows(bank)["shared.rows"].add_(torch.randn(3, 16))
    with bank.route(["a", BASE, "a"]):
        found = outputs(model, x).detach()
    twin: Any = t5().eval()
    twin.load_state_dict(model.state_dict())
    assert len({id(twin.get_submodule(path).weight) for path in ("shared", "encoder.embed_tokens", "lm_head")}) == 1
    with torch.no_grad():
        torch.testing.assert_close(found[1], outputs(twin, x)[1], rtol=1e-4, atol=1e-5)
        twin.shared.weight[IDS] = rows(bank)["shared.rows"].detach()
        torch.testing.assert_close(found[0], outputs(twin, x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(TargetError, match=r"'encoder\.embed_tokens' and 'shared' have one weight, and other ids"):
        bank.add("b", AdapterConfig(rank=2, trainable_token_indices={"shared": IDS, "encoder.embed_tokens": [3]}))
    adapter = bank.adapter("a")
    assert state_bytes(bank.detach()) == before
    merge(model, adapter, say=None)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, x)[0], found[0], rtol=1e-4, atol=1e-5)


def test_law7_combined_rows() -> None:
    model, bank = two("rows of tied llama")
    a, b = bank.adapter("a"), bank.adapter("b")
    bank.load("sum", combine([(a, 1.5), (b, -0.5)]))
    x = with_ids()
    with bank.route("sum"):
        found = outputs(model, x)
    with bank.route({"a": 1.5, "b": -0.5}):
        torch.testing.assert_close(found, outputs(model, x), rtol=1e-3, atol=1e-4)
    message = r"token rows of 'model\.embed_tokens' are trained as a whole.* they are 1 of adapter 0, 1 of adapter 1\. "
    with pytest.raises(MergeError, match=message):
        combine([(a, 1.0), (b, 1.0)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([3, -1], r"expected token ids ≥ 0, got -1\. tokenizer\.convert_tokens_to_ids"),
        ([3, 4, 3], r"id 3 stands there twice"),
        ({"embed_tokens": [4, 4]}, r"\['embed_tokens'\]: id 4 stands there twice"),
        ([True], r"expected token ids ≥ 0, got True"),
        (["<tool>"], r"expected token ids ≥ 0, got '<tool>'"),
        ({3: [4]}, r"expected names of embeddings with ids.*got 3"),
        ("5", r"expected a list of token ids, got '5'"),
    ],
)
def test_ids_that_arent(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"trainable_token_indices.*{said}"):
        AdapterConfig(trainable_token_indices=given)


@pytest.mark.parametrize(
    ("make_model", "config", "said"),
    [
        (
            tied,
            {"trainable_token_indices": [48]},
            r"'model\.embed_tokens': id 48 is outside of its 48 rows.*resize_token_embeddings",
        ),
        (tied, {"trainable_token_indices": {"embed_token": [1]}}, "'embed_token' names no module of the model"),
        (tied, {"trainable_token_indices": {"norm": [1]}}, r"'model\.norm': a LlamaRMSNorm has no rows"),
        (
            Pictures,
            {"targets": "head", "trainable_token_indices": [1]},
            "which embedding holds the tokens isn't known of this model",
        ),
        (
            tied,
            {"targets": "all-embedding", "trainable_token_indices": [1]},
            r"'model\.embed_tokens' has A and B of the adapter as well",
        ),
        (tied, {"targets": "lm_head", "trainable_token_indices": [1]}, "'lm_head' has A and B of the adapter as well"),
    ],
)
@pytest.mark.filterwarnings("ignore:adapter 'a'")
def test_what_isnt_a_table_is_named(make_model: Any, config: dict[str, Any], said: str) -> None:
    bank = attach(make_model())
    with pytest.raises(TargetError, match=f"trainable_token_indices: .*{said}|trainable_token_indices: {said}"):
        bank.add("a", AdapterConfig(rank=1, **config))
    assert bank.names == ()


def test_a_table_that_trains_beside_the_base_has_no_rows_of_an_adapter() -> None:
    model = llama().eval()
    adapter: dict[str, Any] = {"rank": 2, "targets": ["q"], "trainable_token_indices": {"lm_head": [4]}}
    plain = attach(model)
    plain.add("a", AdapterConfig(**adapter))
    loaded = plain.adapter("a")
    model = plain.detach().requires_grad_(False)
    model.get_submodule("lm_head").requires_grad_(True)
    bank = attach(model, keep_trainable=["lm_head"])
    said = r"trainable_token_indices: the weight of 'lm_head' trains beside the base already \(keep_trainable\)"
    with pytest.raises(TargetError, match=said):
        bank.add("a", AdapterConfig(**adapter))
    with pytest.raises(TargetError, match=said):
        bank.load("a", loaded, force=True)
    assert bank.names == ()


def test_rows_that_dont_fit_load_nothing() -> None:
    adapter = two("rows of tied llama")[1].adapter("a")
    bank = attach(tied())
    for own, said in (
        ({"model.embed_tokens": TokenRows((1,), torch.zeros(1, 15))}, "made for 15 features, the model's table has 16"),
        ({"model.embed": TokenRows((1,), torch.zeros(1, 16))}, "token rows of model.embed: the model has no such module"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            bank.load("a", Adapter(**{**vars(adapter), "token_rows": own}), force=True)
    assert bank.names == ()
    for own in (TokenRows((-1, 2), torch.zeros(2, 16)), TokenRows((), torch.zeros(0, 16))):
        with pytest.raises(AdapterFileError, match=r"expected one row .* different ids ≥ 0"):
            Adapter(**{**vars(adapter), "token_rows": {"x": own}})
    with pytest.raises(AdapterFileError, match=r"expected one row .* for each of 2 different ids"):
        Adapter(**{**vars(adapter), "token_rows": {"x": TokenRows((1, 2), torch.zeros(3, 16))}})


def test_rows_that_another_end_changes_apart_load_nothing() -> None:
    """Such an adapter comes of `combine`, and of PEFT, whose head has the rows and A and B."""
    bank = attach(tied())
    bank.add("rows", AdapterConfig(rank=2, targets=["q_proj"], trainable_token_indices=[3, 7]))
    bank.add("head", AdapterConfig(rank=2, targets=["lm_head"]))
    both = combine([(bank.adapter("rows"), 1.0), (bank.adapter("head"), 1.0)])
    with pytest.raises(AdapterFileError, match=r"token rows of model\.embed_tokens: lm_head has its weight .*, and it has"):
        bank.load("both", both)
    assert bank.names == ("rows", "head")
    whole = replace(both, layers=bank.adapter("rows").layers, modules={"lm_head": {"weight": torch.zeros(48, 16)}})
    with pytest.raises(AdapterFileError, match="it is trained in full there too"):
        attach(tied()).load("both", whole)


def test_detach_gives_the_model_back_and_a_saved_model_is_without_rows() -> None:
    bank = attach(gpt2())
    before = state_bytes(bank.model)
    add(bank, "a", trainable_token_indices=IDS)
    assert state_bytes(bank.model) == before
    types = {path: type(m) for path, m in gpt2().named_modules()}
    assert {path: type(m) for path, m in bank.detach().named_modules()} == types
