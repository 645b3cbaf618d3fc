"""Modules that adapters train in full (`modules_to_save`): the laws for each kind of module, heads of new labels, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank, saved_modules
from lorabank.bank.layers import LoRALayer
from lorabank.errors import ConfigError, LorabankError, RoutingError, TargetError, UnreachedLayerError
from tests.bank.tiny import VOCABULARY, Handwritten, clear, fill, gradients, ids, llama, state_bytes

_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS: dict[str, Any] = {**_SIZES, "vocab_size": VOCABULARY, "num_labels": 3}


class NormedHead(Handwritten):
    """Its head is a norm and a linear map in a module of nobody's library, which returns two things."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.out = nn.Linear(16, VOCABULARY, bias=False)
            self.register_buffer("scale", torch.tensor(1.5))

        def forward(self, h: Tensor, *, gate: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            normed = self.norm(h * gate)
            return self.out(normed) * self.scale, {"normed": normed}

    def __init__(self) -> None:
        super().__init__()
        self.head = NormedHead.Head()

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        y, more = self.head(h, gate=torch.tanh(h))
        return torch.cat([y, more["normed"]], -1)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_WORDS))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_WORDS, max_position_embeddings=32))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_heads=2, n_layers=1)
    return hf.DistilBertForSequenceClassification(config)


def scored() -> nn.Module:
    config = hf.LlamaConfig(**_WORDS, num_key_value_heads=1, pad_token_id=0)
    return hf.LlamaForSequenceClassification(config)


KINDS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a classifier's linear head": (bert, {}),
    "a classifier's head of several layers": (roberta, {}),
    "a decoder's head for each token": (scored, {"targets": "all-linear"}),
    "output head": (llama, {"modules_to_save": ["lm_head"]}),
    "embedding and norms": (llama, {"modules_to_save": ["embed_tokens", "layernorm"]}),
    "a block's mlp": (llama, {"modules_to_save": ["layers.1.mlp"]}),
    "a whole block": (llama, {"modules_to_save": ["model.layers.0"]}),
    "handwritten": (NormedHead, {"modules_to_save": ["head", "blocks.1"]}),
}
ROUTES = ["a", BASE, "b", {"a": 0.7, "b": -0.4}, BASE, "a"]


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    if "Llama" in type(model).__name__:
        return model(x, use_cache=False).logits
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def add(bank: AdapterBank, name: str, **config: Any) -> None:
    """An adapter whose LoRA and copies both do something."""
    bank.add(name, AdapterConfig(**{"rank": 3, "alpha": 6, **config}))
    fill(bank, name)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for _, leaf in saved_modules(bank).leaves(name):
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.2)


def two(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, AdapterBank]:
    model = made(kind, dtype)
    bank = attach(model)
    add(bank, "a", **KINDS[kind][1])
    add(bank, "b", **{**KINDS[kind][1], "rank": 5})
    return model, bank


def by_hand(kind: str, bank: AdapterBank, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A plain model with the adapter's copies in place and its ΔW in the weights: what the adapter must compute."""
    model, adapter = made(kind, dtype), bank.adapter(name)
    with torch.no_grad():
        for path, module in adapter.modules.items():
            model.get_submodule(path).load_state_dict(module)
        for path, layer in adapter.layers.items():
            model.get_submodule(path).get_parameter("weight").add_(layer.delta())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_goes_through_its_adapters_own_copy(kind: str) -> None:
    model, bank = two(kind)
    x = ids(6)
    with torch.no_grad(), bank.route(ROUTES):
        found = outputs(model, x)
    assert bank.summary().adapters["a"].saved
    for name, rows in {"a": [0, 5], "b": [2]}.items():
        expected = outputs(by_hand(kind, bank, name), x[rows])
        torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), bank.route("b"):
        torch.testing.assert_close(outputs(model, x)[2], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_law1_a_base_row_is_the_base_bit_for_bit_in_a_mixed_batch(kind: str, dtype: torch.dtype) -> None:
    model, bank = two(kind, dtype)
    x, plain = ids(6), made(kind, dtype)
    with torch.no_grad():
        expected = outputs(plain, x)
        with bank.route(ROUTES):
            found = outputs(model, x)
        with bank.route(BASE):
            assert torch.equal(outputs(model, x), expected)
    assert torch.equal(found[[1, 4]], expected[[1, 4]])
    for row in (0, 2, 3, 5):
        assert not torch.allclose(found[row], expected[row])


@pytest.mark.parametrize("kind", KINDS)
def test_law1_a_detached_model_is_the_old_model_bit_for_bit(kind: str) -> None:
    model = made(kind)
    types, before, x = {path: type(m) for path, m in model.named_modules()}, state_bytes(model), ids(4)
    expected = outputs(model, x).detach()
    inner = next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Dropout | nn.Linear)).train()
    modes = {path: m.training for path, m in model.named_modules()}
    bank = attach(model)
    add(bank, "a", **KINDS[kind][1])
    with bank.route(["a", "a", BASE, BASE]):
        outputs(model, x).square().sum().backward()
    assert state_bytes(model) == before
    assert bank.detach() is model
    assert {path: type(m) for path, m in model.named_modules()} == types
    assert {path: m.training for path, m in model.named_modules()} == modes
    inner.eval()
    assert state_bytes(model) == before
    assert torch.equal(outputs(model, x), expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_law2_a_mixed_batch_equals_the_separate_batches(kind: str) -> None:
    model, bank = two(kind)
    x, results = ids(6), []
    for batches in ([list(range(6))], [[i] for i in range(6)]):
        clear(bank)
        found: dict[int, Tensor] = {}
        for rows in batches:
            with bank.route([ROUTES[i] for i in rows]):
                y = outputs(model, x[rows])
            found.update(zip(rows, y.detach(), strict=True))
            if y.requires_grad:
                (y.flatten(1).square().mean(1) * (1 + torch.tensor(rows))).sum().backward()
        results.append((torch.stack([found[i] for i in range(6)]), gradients(bank)))
    (mixed_y, mixed), (apart_y, apart) = results
    torch.testing.assert_close(mixed_y, apart_y, rtol=1e-4, atol=2e-5)
    copies = {f"{name}:{key}" for name in "ab" for key, _ in saved_modules(bank).leaves(name)}
    assert all(apart[key].any() for key in copies)
    for key, expected in apart.items():
        assert (mixed[key] - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max())), key


@pytest.mark.parametrize("kind", KINDS)
def test_law4_a_step_leaves_the_other_copy_byte_identical_and_a_nan_stays_in_its_rows(kind: str) -> None:
    results = []
    for poisoned in (False, True):
        model, bank = two(kind)
        if poisoned:
            with torch.no_grad():
                for _, leaf in saved_modules(bank).leaves("a"):
                    leaf.view(-1)[-1] = math.nan
        with bank.route(["a", "b", BASE, "b"]):
            y = outputs(model, ids(4))
        y.flatten(1).square().mean(1).sum().backward()
        results.append((y.detach(), gradients(bank)))
    (clean_y, clean), (sick_y, sick) = results
    assert sick_y[0].isnan().any()
    assert torch.equal(sick_y[1:], clean_y[1:])
    assert all(torch.equal(sick[key], clean[key]) for key in clean if key.startswith("b:"))
    before = [p.detach().clone() for p in bank.parameters("b")]
    torch.optim.AdamW(bank.parameters("a"), lr=0.1, weight_decay=0.5).step()
    assert all(torch.equal(p, old) for p, old in zip(bank.parameters("b"), before, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["handwritten", "embedding and norms"])
def test_recomputation_sends_rows_to_the_copies_that_forward_sent_them_to(kind: str, reentrant: bool) -> None:
    x, found = ids(4), []
    for recomputed in (False, True):
        model, bank = two(kind)
        paths = [path for path in ("blocks.1", "model.layers.1") if path in dict(model.named_modules())]
        if recomputed:
            for path in paths:
                block = model.get_submodule(path)
                _checkpointed(
                    block, {"use_reentrant": reentrant} | ({} if reentrant else {"context_fn": bank.checkpoint_context})
                )
        with bank.route(["a", "b", BASE, "a"]):
            loss = outputs(model, x).square().mean()
            if reentrant:
                loss.backward()
        if not reentrant:
            loss.backward()
        found.append(gradients(bank))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, msg=lambda m, key=key: f"{key}: {m}")


def _checkpointed(block: nn.Module, arguments: dict[str, Any]) -> None:
    """Recompute a module in backward, as a library does that calls it through torch's checkpoint."""
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *given: plain(*given, **kwargs), *args, **arguments)

    vars(block)["forward"] = forward


def test_rows_that_were_multiplied_and_packed_tokens() -> None:
    model, bank = two("output head")
    x = ids(2)
    with torch.no_grad():
        with bank.route(["a", "b"]):
            expected = outputs(model, x)
        with bank.route(["a", "b"], repeat=("interleave", 2)):
            found = outputs(model, x.repeat_interleave(2, 0))
        with bank.route(tokens=["a"] * 6 + ["b"] * 6):
            tokens = outputs(model, x)
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0))
    torch.testing.assert_close(tokens, expected)
    model, bank = two("a block's mlp")
    says = r"'model.layers.1.mlp' \(LlamaMLP\) isn't known to compute each token by itself"
    with pytest.raises(RoutingError, match=says), bank.route(tokens=["a"] * 6 + ["b"] * 6):
        outputs(model, x)


def test_what_cant_be_split_into_rows_is_said_and_one_route_for_all_is_right() -> None:
    model, bank = two("a whole block")
    x = ids(6)
    says = r"'model.layers.0' gets a DynamicCache, which can't be split into rows"
    with pytest.raises(RoutingError, match=says), bank.route(["a", "b", "a", "b", "a", "b"]):
        model(x, use_cache=True)
    with torch.no_grad(), bank.route("a"):
        cached = model(x, use_cache=True)
        torch.testing.assert_close(cached.logits, outputs(by_hand("a whole block", bank, "a"), x), rtol=1e-4, atol=1e-5)


def test_the_leaves_begin_as_the_base_in_fp32_and_their_names_are_paths() -> None:
    model = made("a classifier's linear head", torch.bfloat16)
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2))
    leaves = dict(bank.named_parameters("a"))
    assert [key for key in leaves if not key.endswith((".A", ".B"))] == ["classifier.weight", "classifier.bias"]
    assert "classifier.A" not in leaves
    weight = leaves["classifier.weight"]
    assert (weight.dtype, weight.is_leaf, weight.requires_grad) == (torch.float32, True, True)
    assert torch.equal(weight, model.get_parameter("classifier.weight").float())
    x = ids(2)
    with torch.no_grad(), bank.route("a"):
        assert torch.equal(outputs(model, x), outputs(made("a classifier's linear head", torch.bfloat16), x))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == len(leaves)
    assert "classifier.lora.weight_a" in names


def test_adapters_come_and_go_and_are_extracted_and_loaded() -> None:
    model, bank = two("handwritten")
    x, adapter = ids(3), bank.adapter("a")
    assert set(adapter.modules) == {"head", "blocks.1"}
    assert set(adapter.modules["head"]) == {"norm.weight", "norm.bias", "out.weight", "scale"}
    with torch.no_grad(), bank.route("a"):
        expected = outputs(model, x)
    bank.remove("a")
    assert not any("_a" in name for name, _ in model.named_parameters() if ".lora." in name)
    bank.load("again", adapter)
    with torch.no_grad(), bank.route("again"):
        assert torch.equal(outputs(model, x), expected)
    assert all(torch.equal(v, adapter.modules[p][k]) for p, m in bank.adapter("again").modules.items() for k, v in m.items())
    for value in (v for module in adapter.modules.values() for v in module.values()):
        assert value.untyped_storage().nbytes() == value.nbytes
    assert adapter.num_parameters == sum(p.numel() for p in bank.parameters("again")) + 1  # the buffer


def test_copies_stay_fp32_where_the_base_changes_its_dtype_and_move_with_it() -> None:
    model, bank = two("handwritten")
    model.to(torch.bfloat16)
    assert model.get_parameter("head.out.weight").dtype == torch.bfloat16
    leaves = dict(saved_modules(bank).leaves("a"))
    assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}
    with bank.route(["a", BASE]):
        y = outputs(model, ids(2))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())


class _Prompted(Handwritten):
    """A module of it makes something out of nothing but its parameter."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.zeros(16))

        def forward(self) -> Tensor:
            return self.vector

    def __init__(self) -> None:
        super().__init__()
        self.prompt = _Prompted.Prompt()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) + self.prompt())


def _plain_head(model: nn.Module) -> nn.Module:
    head = model.get_submodule("head")
    assert isinstance(head, LoRALayer)
    return head.base


def test_a_module_without_inputs_has_one_route_for_all_rows() -> None:
    model = _Prompted()
    bank = attach(model)
    for name, value in (("a", 1.0), ("b", 3.0)):
        bank.add(name, AdapterConfig(rank=2, targets=["head"], modules_to_save=["prompt"]))
        with torch.no_grad():
            dict(bank.named_parameters(name))["prompt.vector"].fill_(value)
    x = ids(2)
    with torch.no_grad():
        for route, value in (("a", 1.0), (BASE, 0.0), ({"a": 0.5, "b": 0.25}, 1.25)):
            with bank.route(route):
                torch.testing.assert_close(model(x), _plain_head(model)(model.embed(x) + value))
        with pytest.raises(RoutingError, match="'prompt' can't tell the rows apart: it gets no tensor"), bank.route(["a", "b"]):
            model(x)


def test_what_goes_on_training_beside_the_base_has_no_copies() -> None:
    model = made("handwritten")
    bank = attach(model, keep_trainable=["head"])
    with pytest.raises(TargetError, match=r"'head' trains beside the base already \(keep_trainable\)"):
        bank.add("a", AdapterConfig(rank=2, modules_to_save=["head"]))


def test_a_copied_model_is_the_plain_base() -> None:
    model, _ = two("handwritten")
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied, ids(2)), outputs(made("handwritten"), ids(2)))


def test_a_module_that_is_never_called_is_said() -> None:
    model = made("output head")
    model.add_module("spare", nn.Linear(4, 4))
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=2, targets=["q"], modules_to_save=["spare"]))
    with pytest.raises(UnreachedLayerError, match=r"never called 'spare' \(Linear\)"):
        outputs(model, ids(1))


# ---- heads of classifiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "heads", "task"),
    [
        (bert, {"classifier"}, "SEQ_CLS"),
        (roberta, {"classifier"}, "SEQ_CLS"),
        (scored, {"score"}, "SEQ_CLS"),
        (distilbert, {"pre_classifier", "classifier"}, "SEQ_CLS"),
        (lambda: hf.BertForTokenClassification(hf.BertConfig(**_WORDS)), {"classifier"}, "TOKEN_CLS"),
        (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**_WORDS, "num_labels": 2})), {"qa_outputs"}, "QUESTION_ANS"),
        (lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, image_size=16, patch_size=4)), {"classifier"}, None),
        (lambda: hf.BertForMaskedLM(hf.BertConfig(**_WORDS)), set(), None),
    ],
)  # fmt: skip
def test_a_classifiers_head_is_in_every_adapter_unasked(make: Callable[[], nn.Module], heads: set[str], task: str | None) -> None:
    bank = attach(make())
    bank.add("a", AdapterConfig(rank=2))
    assert set(saved_modules(bank).paths("a")) == heads
    assert not any(path.startswith(tuple(heads)) for path in bank.adapter("a").layers if heads)
    assert bank.adapter("a").task_type == task
    bank.remove("a")


def test_it_is_said_once_that_a_head_is_trained_and_how_not_to() -> None:
    class OnceSaidForSequenceClassification(hf.BertForSequenceClassification):
        pass

    bank = attach(OnceSaidForSequenceClassification(hf.BertConfig(**_WORDS)))
    with pytest.warns(UserWarning, match=r"each adapter trains a head of its own in full \(classifier\).*modules_to_save=\[\]"):
        bank.add("a", AdapterConfig(rank=2))
    bank = attach(OnceSaidForSequenceClassification(hf.BertConfig(**_WORDS)))
    bank.add("named", AdapterConfig(rank=2, modules_to_save=["pooler"]))
    assert saved_modules(bank).paths("named") == ("bert.pooler", "classifier")


def test_without_a_head_of_its_own_an_adapter_has_lora_there() -> None:
    bank = attach(bert())
    bank.add("none", AdapterConfig(rank=2, modules_to_save=[]))
    assert "classifier" in bank.adapter("none").layers
    assert not bank.adapter("none").modules
    with pytest.raises(TargetError, match=r"'classifier' would be trained in full, and layer 'classifier' has another adapter's"):
        bank.add("full", AdapterConfig(rank=2))
    assert bank.names == ("none",)
    bank.detach()
    bank = attach(bert())
    bank.add("asked", AdapterConfig(rank=2, targets=["query", "classifier"]))
    assert "classifier" in bank.adapter("asked").layers
    bank.remove("asked")


def test_adapters_of_several_numbers_of_labels_in_one_pass() -> None:
    model = made("a classifier's head of several layers")
    bank = attach(model)
    add(bank, "three")
    bank.add("five", AdapterConfig(rank=2), num_labels=5, seed=3)
    bank.add("two", AdapterConfig(rank=2), num_labels=2)
    leaves = dict(bank.named_parameters("five"))
    assert leaves["classifier.out_proj.weight"].shape == (5, 16)
    assert not leaves["classifier.out_proj.bias"].any()
    assert torch.equal(leaves["classifier.dense.weight"], model.get_parameter("classifier.dense.weight"))
    x = ids(4)
    with bank.route(["two", "five", BASE, "three"]):
        y = outputs(model, x)
    assert y.shape == (4, 5)
    widths = [int(row.isfinite().sum()) for row in y]
    assert widths == [2, 5, 3, 3]
    assert bool((y[0, 2:] == -math.inf).all())
    nn.functional.cross_entropy(y, torch.tensor([1, 4, 0, 2])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for n in bank.names for p in bank.parameters(n))
    with torch.no_grad(), bank.route("two"):
        torch.testing.assert_close(outputs(model, x[:1]), y[:1, :2].detach())
    with pytest.raises(RoutingError, match="outputs of 5 and 3 labels can't be mixed"), bank.route([{"five": 0.5}] * 4):
        outputs(model, x)
    bank.load("again", bank.adapter("five"))
    with torch.no_grad(), bank.route("again"):
        torch.testing.assert_close(outputs(model, x)[1], y[1].detach())


def test_a_fresh_head_depends_on_the_seed_alone() -> None:
    found = []
    for seed in (1, 1, 2):
        bank = attach(made("a classifier's linear head"))
        bank.add("a", AdapterConfig(rank=2), num_labels=4, seed=seed)
        found.append(bank.adapter("a").modules["classifier"]["weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_adapter_of_a_classifier_loads_over_a_head_that_is_newly_random() -> None:
    """Its own head comes along, and the base's isn't part of what the base is."""
    model, bank = two("a classifier's linear head")
    adapter = bank.adapter("a")
    with torch.no_grad(), bank.route("a"):
        expected = outputs(model, ids(2))
    other = made("a classifier's linear head")
    with torch.no_grad():
        other.get_parameter("classifier.weight").normal_()
    bank = attach(other)
    bank.load("a", adapter)
    with torch.no_grad():
        torch.testing.assert_close(outputs(other, ids(2)), expected)


# ---- bad input --------------------------------------------------------------------------------------------------------


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.counted = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.act = nn.ReLU()
        self.named = nn.Module()
        self.named.B = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.counted(self.blocks[0](self.lin(x))))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"modules_to_save": ["countedd"]},
            r"modules_to_save: 'countedd' names no module of the model \(did you mean 'counted'\?\)",
        ),
        (
            {"modules_to_save": ["counted"]},
            r"'counted' can't be trained in full: its '1' is a BatchNorm1d, whose running statistics",
        ),
        ({"modules_to_save": ["blocks"]}, "'blocks' can't be trained in full: a ModuleList isn't called"),
        ({"modules_to_save": ["named"]}, "'named' can't be trained in full: its parameter 'B' is called as LoRA's B is"),
        ({"modules_to_save": ["act"]}, "'act' can't be trained in full: a ReLU has no parameters"),
        ({"targets": ["lin"], "modules_to_save": ["lin"]}, r"every layer that they name \('lin'\) is in modules_to_save"),
    ],
)
def test_what_cant_be_saved_is_refused_by_name(config: dict[str, Any], says: str) -> None:
    model = _Counting()
    bank = attach(model)
    before = {path: type(m) for path, m in model.named_modules()}
    with pytest.raises(TargetError, match=says):
        bank.add("a", AdapterConfig(**{"rank": 2, **config}))
    assert bank.names == ()
    assert {path: type(m) for path, m in model.named_modules()} == before


@pytest.mark.parametrize("value", ["lm_head", [""], [3]])
def test_names_are_a_list_of_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="modules_to_save: expected a list of module names"):
        AdapterConfig(modules_to_save=value)


def test_one_module_isnt_trained_in_full_and_with_lora_in_one_bank() -> None:
    bank = attach(made("handwritten"))
    add(bank, "a", modules_to_save=["head"])
    with pytest.raises(
        TargetError, match=r"layer 'head.out' is in 'head', which another adapter trains in full.*exclude=\['head'\]"
    ):
        bank.add("b", AdapterConfig(rank=2))
    with pytest.raises(TargetError, match=r"'head\.norm' and another adapter's 'head' are one in the other"):
        bank.add("b", AdapterConfig(rank=2, exclude=["out"], modules_to_save=["head.norm"]))
    assert bank.names == ("a",)
    bank.add("b", AdapterConfig(rank=2, exclude=["out"]))  # adapters beside one another, with and without
    with torch.no_grad(), bank.route(["a", "b"]):
        found = outputs(bank.model, ids(2))
    assert torch.equal(found[1], outputs(made("handwritten"), ids(2))[1])  # b is untrained


def test_what_stands_against_a_saved_head_is_said_as_it_is() -> None:
    """The other end of a tied weight, which `exclude` doesn't leave out, and a place whose adapter is gone."""
    torch.manual_seed(0)
    bank = attach(llama(tie_word_embeddings=True).eval())
    with pytest.warns(UserWarning, match="have one weight"):
        add(bank, "a", targets=["q"], modules_to_save=["lm_head"])
    tied: list[dict[str, Any]] = [
        {"targets": ["all-embedding"], "ensure_weight_tying": True},
        {"targets": ["q"], "trainable_token_indices": [5]},
    ]
    for each in tied:
        with pytest.raises(
            TargetError, match=r"'lm_head' is in 'lm_head', which another adapter trains.*leave out what means it"
        ):
            bank.add("b", AdapterConfig(rank=2, **each))
    bank.remove("a")
    with pytest.raises(TargetError, match="'lm_head', which an adapter that was removed trained in full"):
        bank.add("b", AdapterConfig(rank=2, **tied[0]))
    assert bank.names == ()


def test_a_restart_is_the_start_of_copies_and_new_heads_too() -> None:
    bank = attach(bert())
    bank.add("a", AdapterConfig(rank=2), num_labels=5, seed=3)
    before = {key: p.detach().clone() for key, p in bank.named_parameters("a")}
    with torch.no_grad():
        for p in bank.parameters("a"):
            p.add_(1.0)
    bank.restart("a")
    assert all(torch.equal(p, before[key]) for key, p in bank.named_parameters("a"))
    bank.load("again", bank.adapter("a"))
    with pytest.raises(LorabankError, match="'again' was loaded, and its first values are its file's"):
        bank.restart("again")


def test_num_labels_needs_a_head_that_is_saved() -> None:
    bank = attach(made("output head"))
    with pytest.raises(ConfigError, match="num_labels: the adapter saves no linear layer with an output a label"):
        bank.add("a", AdapterConfig(rank=2), num_labels=4)
    bank = attach(bert())
    with pytest.raises(ConfigError, match=r"num_labels: expected a whole number ≥ 1, got 0"):
        bank.add("a", AdapterConfig(rank=2), num_labels=0)
    assert bank.names == ()
    answers = attach(hf.BertForQuestionAnswering(hf.BertConfig(**_WORDS)))  # its outputs are a start and an end
    with pytest.raises(ConfigError, match="num_labels: the adapter saves no linear layer with an output a label"):
        answers.add("a", AdapterConfig(rank=2), num_labels=5)


def test_a_tied_head_leaves_the_embedding_alone_and_says_so() -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval()
    bank = attach(model)
    with pytest.warns(UserWarning, match=r"'lm_head' and 'model.embed_tokens' have one weight.* changes the first alone"):
        add(bank, "a", targets=["q"], modules_to_save=["lm_head"])
    embedded = model.get_submodule("model.embed_tokens").get_parameter("weight").detach().clone()
    with bank.route("a"):
        outputs(model, ids(2)).square().mean().backward()
    torch.optim.SGD(bank.parameters("a"), lr=1.0).step()
    assert torch.equal(model.get_submodule("model.embed_tokens").get_parameter("weight"), embedded)
    assert not torch.equal(dict(bank.named_parameters("a"))["lm_head.weight"], embedded)
    with pytest.raises(TargetError, match=r"ensure_weight_tying: 'lm_head' is trained in full"):
        bank.add("b", AdapterConfig(rank=2, targets=["q"], modules_to_save=["lm_head"], ensure_weight_tying=True))


def test_a_module_whose_layers_are_wrapped_already_is_refused() -> None:
    bank = attach(made("handwritten"))
    add(bank, "a", modules_to_save=[])
    bank.remove("a")
    with pytest.raises(LorabankError, match="'head' is, or holds, a layer that was wrapped for LoRA"):
        bank.add("b", AdapterConfig(rank=2, modules_to_save=["head"]))
    assert bank.names == ()
