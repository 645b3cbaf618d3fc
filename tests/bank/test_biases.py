"""Trained biases and lora_B's: what they compute, how they train, where they are refused. The laws are in test_laws.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabank import BASE, Adapter, AdapterConfig, attach, combine, merge
from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.errors import AdapterFileError, ConfigError, MergeError, RoutingError, TargetError
from tests.bank.tiny import EXTRAS, TARGETS, add, bert, gpt2, gradients, ids, llama, make, mixtral, outputs, state_bytes, two

BIASED = [kind for kind in EXTRAS if "biased" in kind]


def biases(bank: AdapterBank, name: str = "a") -> dict[str, nn.Parameter]:
    return {key: leaf for key, leaf in bank.named_parameters(name) if key.endswith(".bias")}


@pytest.mark.parametrize("kind", BIASED)
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    model = make(kind)
    bank, x = attach(model), ids(3)
    bank.add("a", AdapterConfig(rank=2, targets=TARGETS.get(kind, "all-linear"), **EXTRAS[kind]))
    with bank.route(BASE):
        expected = outputs(model, x)
    with bank.route(["a", BASE, "a"]):
        found = outputs(model, x)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for key, leaf in biases(bank).items():
        assert torch.equal(leaf, model.get_parameter(key))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("make_model", [gpt2, bert])
def test_all_trains_as_the_models_own_biases_do(make_model: Any, decay: float) -> None:
    """Law 3's twin: plain torch that trains the biases themselves, by AdamW, whose decay is of the bias, not of a difference."""
    torch.manual_seed(0)
    model = make_model().eval()
    twin = copy.deepcopy(model).requires_grad_(False)
    bank, x = attach(model), ids(3)
    bank.add("a", AdapterConfig(rank=2, targets="all-linear", bias="all"))
    bank.add("other", AdapterConfig(rank=2, targets="all-linear", bias="all"), seed=1)
    leaves = biases(bank)
    own = {key: p.requires_grad_(True) for key, p in twin.named_parameters() if key.endswith(".bias")}
    assert leaves.keys() == own.keys()
    ours, theirs = (torch.optim.AdamW(list(p.values()), lr=1e-2, weight_decay=decay, eps=1e-4) for p in (leaves, own))
    for _ in range(3):
        with bank.route(["a", "a", "other"]):
            outputs(model, x)[:2].square().sum().backward()
        outputs(twin, x[:2]).square().sum().backward()
        for key, leaf in leaves.items():
            scale = max(1e-3, float(own[key].grad.abs().max()))
            torch.testing.assert_close(
                leaf.grad, own[key].grad, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, key=key: f"{key}: {m}"
            )
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.detach(), own[key].detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(leaf.detach(), make_state(make_model)[key])


def make_state(make_model: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make_model().state_dict()


@pytest.mark.parametrize("kind", EXTRAS)
def test_what_starts_again_starts_where_it_did(kind: str) -> None:
    _, bank = two(kind)
    bank.add("new", bank.config("a"))
    for layer in all_layers(bank):
        if "a" in layer.slots and not layer.slots["a"].shared:
            layer.write("a", layer.fresh(bank.config("a"), layer.slots["a"].rank, layer.slots["a"].scaling, 0))
    fresh = dict(bank.named_parameters("new"))
    for key, leaf in bank.named_parameters("a"):
        assert torch.equal(leaf, fresh[key]), key


def test_groups_and_summary() -> None:
    _, bank = two("biased gpt2")
    groups = bank.parameter_groups("a", 1e-3, loraplus_ratio=16)
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]
    fast = {id(p) for p in groups[1]["params"]}
    assert {key.rpartition(".")[2] for key, p in bank.named_parameters("a") if id(p) in fast} == {"B"}
    assert sum(len(group["params"]) for group in groups) == len(bank.parameters("a"))
    assert bank.summary().adapters["a"].layers == 8
    assert "ln_f" not in bank.summary().adapters["a"].kinds


def test_lora_bias_is_added_times_scaling_and_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    bank = attach(model)
    add(bank, "a", targets="0", rank=2, alpha=6, lora_bias=True)
    layer = bank.adapter("a").layers["0"]
    assert layer.lora_bias is not None
    assert layer.scaling == 3
    x = torch.randn(5, 4)
    change = 3 * (x @ layer.A.t() @ layer.B.t() + layer.lora_bias)
    weights = [1.0, 0.0, -0.5, 0.25, 2.0]
    with bank.route([{"a": weight} for weight in weights]):
        found = model(x)
    torch.testing.assert_close(found, x @ model[0].get_parameter("weight").t() + torch.tensor(weights)[:, None] * change)


def test_which_biases_are_meant() -> None:
    bank = attach(gpt2())
    bank.add("only", AdapterConfig(rank=1, targets=["c_attn"], bias="lora_only"))
    assert set(biases(bank, "only")) == {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    bank.add("all", AdapterConfig(rank=1, targets=["c_attn"], bias="all"))
    assert set(biases(bank, "all")) == {key for key, _ in gpt2().named_parameters() if key.endswith(".bias")}
    bank.add("some", AdapterConfig(rank=1, targets=["c_attn"], bias="all", exclude=["ln_1", "mlp.*"]))
    assert set(biases(bank, "all")) - set(biases(bank, "some")) == {
        f"transformer.h.{i}.{part}.bias" for i in range(2) for part in ("ln_1", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize("tokens", [["a", BASE, "b", "b", "a", BASE], [{"a": 0.5, "b": 2.0}] * 6])
def test_tokens_are_routed_one_by_one(tokens: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    bank = attach(model)
    for name in ("a", "b"):
        add(bank, name, targets=["0", "2"], bias="all", lora_bias=True)
    x = torch.randn(2, 3, 6)
    with bank.route(tokens=tokens):
        packed = model(x)
    with bank.route(tokens):
        torch.testing.assert_close(packed.view(6, 4), model(x.view(6, 6)))
    for i, token in enumerate(tokens):
        with bank.route(token):
            torch.testing.assert_close(packed.view(6, 4)[i], model(x.view(6, 6)[i : i + 1])[0])


class Norms(nn.Module):
    """Norms whose channels come behind the rows, a layer norm over two dimensions, and one that has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.batch, self.group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.layer, self.plain = nn.LayerNorm([5, 5]), nn.LayerNorm([5, 5], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.layer(torch.tanh(self.group(torch.tanh(self.batch(self.conv(x))))))))


def test_norms_of_every_shape() -> None:
    torch.manual_seed(0)
    model, x = Norms().eval(), torch.randn(4, 3, 5, 5)
    bank = attach(model)
    add(bank, "a", targets="conv", bias="all")
    add(bank, "b", targets="conv", bias="all")
    adapter = bank.adapter("a")
    assert set(adapter.biases) == {"conv", "batch", "group", "layer"}
    with bank.route(BASE):
        expected = model(x)
    with bank.route(["a", BASE, "b", "a"]):
        found = model(x)
    assert torch.equal(found[1], expected[1])
    found.square().sum().backward()
    merged = Norms().eval()
    merged.load_state_dict(bank.detach().state_dict())
    merge(merged, adapter, say=None)
    torch.testing.assert_close(merged(x)[[0, 3]], found[[0, 3]], rtol=1e-4, atol=1e-5)


def test_a_bias_that_goes_nan_touches_no_other_row() -> None:
    results = []
    for poisoned in (False, True):
        model, bank = two("biased gpt2")
        if poisoned:
            with torch.no_grad():
                for leaf in biases(bank).values():
                    leaf.fill_(math.nan)
        with bank.route(["a", "b", BASE, "b"]):
            y = outputs(model, ids(4))
        y.flatten(1).square().mean(1).sum().backward()
        results.append((y.detach(), gradients(bank)))
    (clean_y, clean), (sick_y, sick) = results
    assert sick_y[0].isnan().all()
    assert torch.equal(sick_y[1:], clean_y[1:])
    assert all(torch.equal(sick[key], clean[key]) for key in clean if key.startswith("b:"))


@pytest.mark.parametrize("kind", ["biased gpt2", "biased bert", "decomposed biased gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law5_merged_equals_unmerged_and_comes_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    _, bank = two(kind, dtype=dtype)
    adapter, x = bank.adapter("a"), ids(3)
    with bank.route("a"):
        expected = outputs(bank.model, x).float().detach()
    model = make(kind).to(dtype)
    before = state_bytes(model)
    handle = merge(model, adapter, say=None, inputs={"input_ids": x}, force=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(outputs(model, x).float().detach(), expected, rtol=tolerance, atol=tolerance)
    assert handle.logits is not None
    assert handle.logits.difference < min(tolerance, handle.logits.change / 10)
    assert {f"{path}.bias" for path in adapter.biases} <= set(handle.report.extras)
    if dtype == torch.float32:
        if not EXTRAS[kind].get("lora_bias"):  # which is added to the layer's own
            assert all(torch.equal(model.get_parameter(f"{path}.bias"), bias) for path, bias in adapter.biases.items())
        if "decomposed" not in kind:
            half = make(kind)
            merge(half, adapter, say=None, strength=0.5)
            with bank.route({"a": 0.5}):
                torch.testing.assert_close(outputs(half, x), outputs(bank.model, x), rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert state_bytes(model) == before


def test_lora_bias_without_a_bias_to_merge_into_is_named() -> None:
    model = llama()
    bank = attach(model)
    add(bank, "a", lora_bias=True)
    adapter = bank.adapter("a")
    before = state_bytes(bank.detach())
    with pytest.raises(MergeError, match=r"layers\.0\.\S+ has no bias, and the adapter's lora_B has one there"):
        merge(model, adapter)
    assert state_bytes(model) == before


def test_law7_lora_biases_add_up_and_biases_need_weights_of_one() -> None:
    model, bank = two("biased gpt2")
    a, b = bank.adapter("a"), bank.adapter("b")
    bank.load("sum", combine([(a, 0.7), (b, 0.3)]))
    x = ids(2)
    with bank.route("sum"):
        found = outputs(model, x)
    with bank.route({"a": 0.7, "b": 0.3}):
        torch.testing.assert_close(found, outputs(model, x), rtol=1e-4, atol=1e-5)
    message = r"the bias of '\S+' is trained as a whole.* sum to 1; they are 0\.7 of adapter 0, 0\.7 of adapter 1\. Choose"
    with pytest.raises(MergeError, match=message):
        combine([(a, 0.7), (b, 0.7)])
    with pytest.raises(MergeError, match="'svd' is about changes of weights"):
        combine([(a, 0.7), (b, 0.3)], method="svd", rank=2)
    plain = attach(make("gpt2"))
    add(plain, "c")
    add(plain, "d", lora_bias=True)
    with pytest.raises(MergeError, match=r"have this sum to 1; they are 0\.5 of adapter 0\. Choose"):
        combine([(a, 0.5), (plain.adapter("c"), 0.5)])
    path, alone = next(iter(plain.adapter("d").layers.items()))
    twice = combine([(plain.adapter("d"), 2.0), (plain.adapter("c"), -1.0)]).layers[path]
    assert alone.lora_bias is not None
    torch.testing.assert_close(twice.lora_bias, 2.0 * alone.scaling * alone.lora_bias)


def test_loading_gives_the_same_outputs_and_order_of_leaves() -> None:
    model, bank = two("biased gpt2")
    adapter, x = bank.adapter("a"), ids(2)
    turned = Adapter(**{**vars(adapter), "biases": dict(reversed(list(adapter.biases.items())))})
    bank.load("again", turned)
    with bank.route("a"):
        expected = outputs(model, x)
    with bank.route("again"):
        assert torch.equal(outputs(model, x), expected)
    keys = [key for key, _ in bank.named_parameters("a")]
    assert keys == [key for key, _ in bank.named_parameters("again")]
    bank.remove("a")
    assert not any(key.endswith("_a") for key, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("make_model", "config", "said"),
    [
        (mixtral, {"lora_bias": True}, "lora_bias: 'model.layers.0.mlp.experts.gate_up_proj' is a stack of experts"),
        (gpt2, {"targets": ["wte"], "lora_bias": True}, "lora_bias: 'transformer.wte' is an embedding"),
        (llama, {"bias": "lora_only"}, "bias: 'lora_only': no module of the adapted layers has a bias"),
        (llama, {"bias": "all"}, "bias: 'all': no module of the model has a bias"),
    ],
)
def test_what_has_no_bias_to_train_is_named(make_model: Any, config: dict[str, Any], said: str) -> None:
    model = make_model()
    bank = attach(model)
    with pytest.raises(TargetError, match=said):
        bank.add("a", AdapterConfig(rank=1, **config))
    assert bank.names == ()
    bank.add("a", AdapterConfig(rank=1))


class Own(nn.Module):
    """A module of one's own with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.own = nn.Module()
        self.own.register_parameter("bias", nn.Parameter(torch.zeros(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.own.bias


def test_a_bias_whose_use_isnt_known_is_named_with_the_way_out() -> None:
    bank = attach(Own())
    with pytest.raises(
        TargetError, match=r"'all' means own\.bias, which can't be trained: what a Module does with it isn't known"
    ):
        bank.add("a", AdapterConfig(rank=1, targets="first", bias="all"))
    bank.add("a", AdapterConfig(rank=1, targets="first", bias="all", exclude="own"))
    assert set(biases(bank)) == {"first.bias"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bias": "yes"}, r"bias: expected one of none, all, lora_only, got 'yes'"),
        ({"lora_bias": True, "use_dora": True}, r"lora_bias: goes with plain LoRA only"),
    ],
)
def test_settings_that_mean_nothing(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**config)


def test_an_adapter_whose_biases_dont_fit_loads_nothing() -> None:
    adapter = two("biased gpt2")[1].adapter("a")
    bank = attach(gpt2())
    for change, said in (
        ({"transformer.h.0.ln_3": torch.zeros(16)}, r"transformer\.h\.0\.ln_3\.bias: the model has no such bias"),
        ({"transformer.ln_f": torch.zeros(15)}, r"transformer\.ln_f\.bias: made for \(15,\), the model's is \(16,\)"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            bank.load("a", Adapter(**{**vars(adapter), "biases": {**adapter.biases, **change}}), force=True)
    assert bank.names == ()
    layer = next(iter(adapter.layers.values()))
    with pytest.raises(AdapterFileError, match=r"expected a lora_bias for each of \d+ outputs, got \(3,\)"):
        Adapter(config=adapter.config, layers={"x": type(layer)(layer.A, layer.B, 1.0, lora_bias=torch.zeros(3))})


def test_rows_that_a_norm_cant_tell_apart_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.LayerNorm(4))
    bank = attach(model)
    add(bank, "a", targets="0", bias="all")
    with (
        pytest.raises(RoutingError, match="layer '2': the route names 2 rows, but the layer's input has 6"),
        bank.route(["a", BASE]),
    ):
        model(torch.randn(2, 3, 4))
    with bank.route("a"):
        model(torch.randn(2, 3, 4))


def test_detach_gives_the_model_back() -> None:
    model, bank = two("biased gpt2")
    types = {path: type(m) for path, m in gpt2().named_modules()}
    with bank.route(["a", "b"]):
        outputs(model, ids(2)).square().sum().backward()
    bank.detach()
    assert {path: type(m) for path, m in model.named_modules()} == types
    assert state_bytes(model) == state_bytes(make("gpt2"))


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_those_of_torchs_attention_are_refused_by_name(setting: dict[str, Any]) -> None:
    bank = attach(make("torch encoder"))
    with pytest.raises(TargetError, match=r"nn\.MultiheadAttention"):
        bank.add("a", AdapterConfig(targets="all-linear", **setting))
    if "bias" in setting:
        bank.add("a", AdapterConfig(targets=["linear1"], exclude=["self_attn"], **setting))
        assert not any("attn" in key for key, _ in bank.named_parameters("a"))
