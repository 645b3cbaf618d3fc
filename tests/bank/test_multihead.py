"""`nn.MultiheadAttention` in a bank, against plain torch: a twin with ΔW in its weights, row by row, with all gradients."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lorabank import BASE, Adapter, AdapterConfig, attach, merge, merge_folder, quantize_base
from lorabank.bank.adaptable import unsupported_linear_maps
from lorabank.bank.attention import LoRAMultihead
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.bank.targets import resolve_targets
from lorabank.engine.compiling import compile_blocks
from lorabank.errors import LorabankError, MergeError, RoutingError, TargetError
from tests.bank.tiny import add, clear, gradients, ids, make, state_bytes, two
from tests.engine.tiny import VOCABULARY, Job, batch_of, difference, make_bank, tokens, train
from tests.engine.tiny import backward as one_pass

ROWS, QUERIES, KEYS, SIZE, HEADS = 4, 5, 6, 16, 2
ROUTES: Sequence[RowRoute] = ["a", BASE, "b", {"a": 0.6, "b": -0.5}]
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without biases": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other features": {"kdim": 6, "vdim": 10},
    "other features, no bias": {"kdim": 6, "bias": False, "add_zero_attn": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "self, no weights": {"need_weights": False},
    "self, all masks": {"padding": "bool", "mask": "each head", "average_attn_weights": False},
    "self, floats": {"padding": "float", "mask": "float", "need_weights": False},
    "causal": {"mask": "causal", "is_causal": True, "need_weights": False},
    "causal, padded": {"mask": "causal", "is_causal": True, "padding": "bool"},
    "cross": {"inputs": "cross", "padding": "bool", "need_weights": False},
    "three": {"inputs": "three", "mask": "float"},
    "shared query": {"inputs": "query is value", "mask": "each head", "need_weights": False},
}


class Attends(nn.Module):
    """A module of one's own with torch's attention in it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, **settings)
        for name, p in self.attn.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


def bank_over(model: nn.Module, **config: Any) -> AdapterBank:
    bank = attach(model)
    add(bank, "a", **config)
    add(bank, "b", rank=5, alpha=2, use_rslora=True, **config)
    return bank


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(kind: str, settings: Mapping[str, Any], batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value that want gradients; rows where the module has them."""
    keys = KEYS if kind in ("cross", "three") else QUERIES
    sizes = (QUERIES, SIZE), (keys, settings.get("kdim", SIZE)), (keys, settings.get("vdim", SIZE))
    q, k, v = (_random(ROWS, *size, seed=seed) for seed, size in enumerate(sizes))
    if "kdim" not in settings:
        k = {"self": q, "cross": v}.get(kind, k)
        v = {"self": q, "query is value": q}.get(kind, v)
    made = {id(x): (x if batch_first else x.transpose(0, 1)).contiguous().requires_grad_() for x in (q, k, v)}
    return made[id(q)], made[id(k)], made[id(v)]


def _call(given: Mapping[str, Any], keys: int) -> dict[str, Any]:
    """The other arguments of forward."""
    call = {name: value for name, value in given.items() if name not in ("inputs", "padding", "mask")}
    hidden = torch.arange(keys)[None] >= torch.tensor([[keys], [keys - 1], [2], [3]])
    if (padding := given.get("padding")) is not None:
        call["key_padding_mask"] = hidden if padding == "bool" else torch.where(hidden, -2.0, 0.5)
    if (mask := given.get("mask")) is not None:
        some = _random(ROWS * HEADS, QUERIES, keys, seed=9)
        call["attn_mask"] = {
            "each head": (some > 0.8) & (torch.arange(keys) > 0),
            "float": some[0],
            "causal": torch.ones(QUERIES, keys, dtype=torch.bool).triu(1),
        }[mask]
    return call


def _of_row(call: Mapping[str, Any], row: int) -> dict[str, Any]:
    mine = dict(call)
    if "key_padding_mask" in mine:
        mine["key_padding_mask"] = mine["key_padding_mask"][row : row + 1]
    if "attn_mask" in mine and mine["attn_mask"].ndim == 3:
        mine["attn_mask"] = mine["attn_mask"][row * HEADS : (row + 1) * HEADS]
    return mine


def _leaves(bank: AdapterBank) -> dict[str, Tensor]:
    return {key: p.detach().clone().requires_grad_() for key, p in bank.named_parameters()}


def _changed(model: nn.Module, bank: AdapterBank, leaves: Mapping[str, Tensor], route: RowRoute) -> dict[str, Tensor]:
    """The weights of the module with a row's changes in them."""
    weights = {name: p.detach() for name, p in model.named_parameters() if ".lora." not in name}
    mixed = {route: 1.0} if isinstance(route, str) else route if isinstance(route, Mapping) else {}
    for name, weight in mixed.items():
        for path, layer in bank.adapter(name).layers.items():
            owner = path if layer.outputs is None else path.rpartition(".")[0]
            where = f"{owner}.weight" if owner.endswith("out_proj") else f"{owner}_weight"
            A, B = leaves[f"{name}:{path}.A"], leaves[f"{name}:{path}.B"]
            change = weight * layer.scaling * (B.t() @ A)
            if layer.outputs is not None:
                change = torch.zeros_like(weights[where]).index_copy(0, layer.outputs.rows, change)
            weights[where] = weights[where] + change
    return weights


def _total(out: Tensor, weights: Tensor | None) -> Tensor:
    """A number that every element is in with a weight of its own."""
    total = (out * torch.linspace(-1, 1, out.shape[-1])).square().sum()
    return total if weights is None else total + (weights * torch.linspace(0.5, 2, weights.shape[-1])).square().sum()


def _row(x: Tensor, row: int, batch_first: bool) -> Tensor:
    return x[row : row + 1] if batch_first else x[:, row : row + 1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES.keys())
def test_law2_outputs_weights_and_every_gradient_are_those_of_changed_weights(
    settings: dict[str, Any], call: dict[str, Any], batch_first: bool
) -> None:
    _is_that_of_changed_weights(settings, call, batch_first)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_law2_of_q_and_v_alone(call: dict[str, Any], batch_first: bool) -> None:
    _is_that_of_changed_weights({}, call, batch_first, targets=["q", "v", "out_proj"], rank_pattern={"v": 4})


def _is_that_of_changed_weights(settings: dict[str, Any], call: dict[str, Any], batch_first: bool, **config: Any) -> None:
    model = Attends(batch_first=batch_first, **settings).eval()
    plain = copy.deepcopy(model)
    bank = bank_over(model, **config)
    q, k, v = inputs = _inputs(call.get("inputs", "self"), settings, batch_first)
    arguments = _call(call, k.shape[1 if batch_first else 0])
    with bank.route(ROUTES):
        out, weights = model(*inputs, **arguments)
    _total(out if batch_first else out.transpose(0, 1), weights).backward()
    found = {**gradients(bank), **{f"input {i}": x.grad.clone() for i, x in enumerate(inputs) if x.grad is not None}}

    leaves = _leaves(bank)
    for x in inputs:
        x.grad = None
    for row, route in enumerate(ROUTES):
        once = {id(x): _row(x, row, batch_first) for x in (q, k, v)}
        given = once[id(q)], once[id(k)], once[id(v)]
        changed = _changed(model, bank, leaves, route)
        out_row, weights_row = functional_call(plain, changed, given, _of_row(arguments, row))
        torch.testing.assert_close(_row(out, row, batch_first), out_row, rtol=1e-4, atol=1e-4)
        if weights is not None:
            torch.testing.assert_close(weights[row : row + 1], weights_row, rtol=1e-4, atol=1e-5)
        _total(out_row if batch_first else out_row.transpose(0, 1), weights_row).backward()
    expected = {**{key: leaf.grad for key, leaf in leaves.items()}, **{f"input {i}": x.grad for i, x in enumerate(inputs)}}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0, key
        assert float((found[key] - gradient).abs().max() / gradient.abs().max()) < 1e-3, key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("batch_first", [True, False])
def test_law1_base_rows_are_torchs_own_bit_for_bit(call: dict[str, Any], batch_first: bool, training: bool) -> None:
    model = Attends(batch_first=batch_first, dropout=0.3).train(training)
    plain = copy.deepcopy(model)
    bank = bank_over(model)
    inputs = _inputs(call.get("inputs", "self"), {}, batch_first)
    arguments = _call(call, inputs[1].shape[1 if batch_first else 0])
    for grad in (True, False):
        found: list[Any] = []
        for route, module in (("plain", plain), (BASE, model), (ROUTES, model)):
            torch.manual_seed(3)
            with torch.set_grad_enabled(grad), bank.route(BASE if route == "plain" else route):
                found.append(module(*inputs, **arguments))
        (expected, weights), (alone, alone_weights), (mixed, mixed_weights) = found
        assert torch.equal(alone, expected)
        assert torch.equal(_row(mixed, 1, batch_first), _row(expected, 1, batch_first))
        assert not torch.allclose(_row(mixed, 0, batch_first), _row(expected, 0, batch_first))
        assert (weights is None) == (alone_weights is None) == (mixed_weights is None)
        if weights is not None:
            assert torch.equal(alone_weights, weights)
            assert torch.equal(mixed_weights[1], weights[1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_the_base_is_drawn_as_torch_draws_it(need_weights: bool) -> None:
    model = Attends(dropout=0.4, batch_first=True).train()
    bank = bank_over(model)
    x = _random(ROWS, QUERIES, SIZE)
    torch.manual_seed(5)
    with bank.route("a"):
        found, weights = model(x, x, x, need_weights=need_weights)
    changed, plain = _changed(model, bank, _leaves(bank), "a"), Attends(dropout=0.4, batch_first=True).train()
    torch.manual_seed(5)
    expected, expected_weights = functional_call(plain, changed, (x, x, x), {"need_weights": need_weights})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (weights is None) == (expected_weights is None)
    model.eval()
    with bank.route("a"):
        assert not torch.allclose(model(x, x, x)[0], found)


def test_one_sample_without_a_batch() -> None:
    model = Attends(batch_first=False).eval()
    bank = bank_over(model)
    x, mask = _random(QUERIES, SIZE), _random(HEADS, QUERIES, QUERIES, seed=4)
    padding = torch.tensor([False, False, True, False, True])
    with bank.route("a"):
        found, weights = model(x, x, x, attn_mask=mask, key_padding_mask=padding)
        batch, batch_weights = model(x[:, None], x[:, None], x[:, None], attn_mask=mask, key_padding_mask=padding[None])
    assert found.shape == (QUERIES, SIZE)
    torch.testing.assert_close(found, batch[:, 0])
    torch.testing.assert_close(weights, batch_weights[0])
    said = r"attention 'attn' got \(5, 16\), one sample without a batch dimension"
    with pytest.raises(RoutingError, match=said), bank.route(["a"]):
        model(x, x, x)


def test_packed_tokens_have_routes_of_their_own() -> None:
    model = Attends(batch_first=True).eval()
    bank = bank_over(model)
    x, routes = _random(1, 7, SIZE), ["a"] * 3 + ["b"] * 4
    example = torch.tensor([0] * 3 + [1] * 4)
    with bank.route(tokens=routes):
        packed, _ = model(x, x, x, attn_mask=example[:, None] != example[None])
    for name, part in (("a", x[:, :3]), ("b", x[:, 3:])):
        with bank.route(name):
            apart, _ = model(part, part, part)
        torch.testing.assert_close(packed[:, example == (name == "b")], apart, rtol=1e-4, atol=1e-4)


class Decoder(nn.Module):
    """torch's decoder layers: attention to oneself, and to something else."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(SIZE, HEADS, 24, dropout=0.0, batch_first=batch_first)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_decoder(batch_first: bool) -> None:
    """Rows behind the tokens are told apart too, where attention alone is adapted."""
    model = Decoder(batch_first).eval()
    bank = bank_over(model, targets="all-linear" if batch_first else "attention")
    memory, x = _random(ROWS, KEYS, SIZE), _random(ROWS, QUERIES, SIZE, seed=1)
    if not batch_first:
        memory, x = memory.transpose(0, 1), x.transpose(0, 1)
    with bank.route(ROUTES):
        mixed = model(x, memory)
    for row, route in enumerate(ROUTES):
        with bank.route(route):
            alone = model(_row(x, row, batch_first), _row(memory, row, batch_first))
        torch.testing.assert_close(_row(mixed, row, batch_first), alone, rtol=1e-4, atol=1e-5)


class Turned(nn.Module):
    """A block whose rows are behind its tokens all the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.mlp = nn.MultiheadAttention(SIZE, HEADS), nn.Sequential(nn.Linear(SIZE, 8), nn.Linear(8, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.attn(x, x, x)[0])


def test_layers_beside_attention_with_rows_second_are_never_misread() -> None:
    model = Turned()
    bank = bank_over(model)
    for tokens_, said in (
        (QUERIES, "the route names 4 rows, but the layer's input has 5"),
        (ROWS, "which of two equal dimensions"),
    ):
        with pytest.raises(RoutingError, match=f"layer 'mlp.0'.*{said}"), bank.route(ROUTES):
            model(_random(tokens_, ROWS, SIZE))
    with bank.route("a"):
        model(_random(ROWS, ROWS, SIZE))


# ---- targets -----------------------------------------------------------------------------------------------------------------

_SELF = [f"decoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")]
_CROSS = [f"decoder.layers.{i}.multihead_attn.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"targets": "attention"}, _SELF + _CROSS),
        ({"targets": "cross-attention"}, _CROSS),
        ({"targets": "self_attn"}, _SELF),
        ({"targets": "decoder.layers.0.self_attn"}, _SELF[:2]),
        ({"targets": "o"}, _SELF[1::2] + _CROSS[1::2]),
        ({"targets": ["in_proj"], "layers": [1]}, [_SELF[2], _CROSS[2]]),
        ({"targets": "*.self_attn.*"}, _SELF),
        ({"targets": "re:.*multihead_attn.in_proj"}, _CROSS[::2]),
        ({"targets": "all-linear", "exclude": ["mlp", "self_attn", "out_proj"]}, _CROSS[::2]),
        ({"targets": "all-linear", "exclude": ["attention", "linear1"]}, [f"decoder.layers.{i}.linear2" for i in (0, 1)]),
    ],
)
def test_targets(config: dict[str, Any], expected: list[str]) -> None:
    model = Decoder()
    found = resolve_targets(model, AdapterConfig(rank=1, **config))
    assert set(found) == set(expected)
    assert unsupported_linear_maps(model) == {}
    bank = attach(model)
    bank.add("a", AdapterConfig(rank=1, **config))
    assert list(bank.adapter("a").layers) == list(found)
    assert list(resolve_targets(model, AdapterConfig(rank=1, **config))) == list(found)  # wrapped now


def test_attention_of_any_name_plays_its_roles() -> None:
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(SIZE, HEADS, kdim=6), "up": nn.Linear(4, 4)})
    names = {
        targets: [path.removeprefix("mix.") for path in resolve_targets(model, AdapterConfig(rank=1, targets=targets))]
        for targets in ("attention", "q", "k", "v", "o", "mix")
    }
    every = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert names == {"attention": every, "q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "o": ["out_proj"], "mix": every}


def test_patterns_may_name_the_module() -> None:
    """As PEFT's do, which adapts it whole."""
    bank = attach(Decoder())
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["self_attn", "linear1"], rank_pattern={r"0.self_attn": 5})
    bank.add("a", config)
    layers = bank.adapter("a").layers
    ranks = {path.removeprefix("decoder.layers."): layer.rank for path, layer in layers.items() if "self_attn" in path}
    assert ranks == {f"{i}.self_attn.{name}": 5 - 3 * i for i in (0, 1) for name in ("in_proj", "out_proj")}
    with pytest.raises(TargetError, match=r"alpha_pattern\['multihead_attn'\] matches none of the 4 adapted layers"):
        bank.add("b", AdapterConfig(rank=1, targets=["self_attn"], alpha_pattern={"multihead_attn": 2}))


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_a_role_means_its_part_of_the_one_projection(role: str) -> None:
    bank = attach(Decoder())
    add(bank, "a", targets=[role])
    parts = {path.rpartition("attn.")[2] for path in bank.adapter("a").layers}
    assert parts == {f"in_proj.{role}"}
    shown = {key.rpartition("lora.")[2] for key, _ in bank.model.named_parameters() if ".lora." in key}
    assert shown == {f"in_proj_{role}_A_a", f"in_proj_{role}_B_a"}


def test_q_and_v_alone_in_files_and_merged(tmp_path: Path) -> None:
    """PEFT reads them as a change of all of in_proj; they come back as they were."""
    plain = Attends(batch_first=True).eval()
    model = copy.deepcopy(plain)
    bank = bank_over(model, targets=["q", "v"])
    x = _random(2, QUERIES, SIZE)
    with bank.route("a"):
        expected = model(x, x, x)[0]
    folder = bank.adapter("a").save(tmp_path / "a")
    again = Adapter.load(folder)
    assert [path.rpartition(".")[2] for path in again.layers] == ["q", "v"]
    again.save(tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (folder / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    bank.load("again", again)
    with bank.route("again"):
        assert torch.allclose(model(x, x, x)[0], expected, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(folder)).eval()
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.allclose(theirs(x, x, x)[0], expected, atol=1e-5)
    merge(plain, again, say=None)
    assert torch.allclose(plain(x, x, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": "in_pro"}, "'in_pro' matches no layer of the model.*mean 'in_proj'"),
        ({"targets": "in_proj", "use_dora": True}, "self_attn.in_proj' is nn.MultiheadAttention's, which DoRA isn't for"),
        ({"targets": "in_proj_weight"}, "'in_proj_weight' matches no layer.*mean 'in_proj'"),
    ],
)
def test_bad_targets_are_named(config: dict[str, Any], message: str) -> None:
    bank = attach(Decoder())
    with pytest.raises(TargetError, match=message):
        bank.add("a", AdapterConfig(rank=1, **config))
    assert bank.names == ()


def test_a_model_that_is_the_attention_has_no_place_for_it() -> None:
    with pytest.raises(TargetError, match=r"the model itself is an nn.MultiheadAttention.*put it into an nn.Sequential"):
        attach(nn.MultiheadAttention(SIZE, HEADS)).add("a", AdapterConfig(rank=1))


class _Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_what_computes_in_its_own_way_is_refused_by_name() -> None:
    quantised = Attends()
    quantised.attn.out_proj = nn.Identity()
    parametrised = Attends()
    torch.nn.utils.parametrizations.weight_norm(parametrised.attn, "in_proj_weight")
    own = nn.ModuleDict({"attn": _Own(SIZE, HEADS)})
    for model, why in (
        (own, "forward of its own"),
        (quantised, "out_proj is a Identity"),
        (parametrised, "isn't a plain weight"),
    ):
        with pytest.raises(TargetError, match=f"attn.*{why}"):
            attach(model).add("a", AdapterConfig(rank=1))


def test_what_trains_beside_the_bank_is_left_out() -> None:
    model = Attends(batch_first=True)
    bank = attach(model, keep_trainable="in_proj_weight")
    add(bank, "a")
    assert list(bank.adapter("a").layers) == ["attn.out_proj"]
    x, y = _random(ROWS, QUERIES, SIZE), _random(ROWS, KEYS, SIZE, seed=1)
    gradient = {}
    for kind, inputs in (("self", (x, x, x)), ("cross", (x, y, y))):
        model.attn.in_proj_weight.grad = None
        with bank.route("a"):
            model(*inputs)[0].square().sum().backward()
        assert model.attn.in_proj_weight.grad is not None
        gradient[kind] = model.attn.in_proj_weight.grad.clone()
        changed = _changed(model, bank, _leaves(bank), "a")
        weight = changed["attn.in_proj_weight"].clone().requires_grad_()
        twin = functional_call(Attends(batch_first=True), {**changed, "attn.in_proj_weight": weight}, inputs)
        twin[0].square().sum().backward()
        torch.testing.assert_close(gradient[kind], weight.grad, rtol=1e-3, atol=1e-3)


# ---- calls that can't be -----------------------------------------------------------------------------------------------------


def test_rows_that_arent_the_routes_are_refused() -> None:
    for batch_first, shape in ((True, (3, QUERIES, SIZE)), (False, (QUERIES, 3, SIZE))):
        model = Attends(batch_first=batch_first)
        bank = bank_over(model)
        x, other = _random(*shape), _random(ROWS, ROWS, SIZE)
        said = "layer 'attn.in_proj': the route names {} rows, but the layer's input has {}"
        with pytest.raises(RoutingError, match=said.format(2, 3)), bank.route(["a", "b"]):
            model(x, x, x)
        with pytest.raises(RoutingError, match=said.format(3, 4)), bank.route(["a", "b", BASE]):
            model(x, other, other)
        with bank.route(["a", BASE, "a"]):
            assert model(x, x, x)[0].shape == x.shape


def test_a_nested_tensor_is_named_and_base_rows_still_take_it() -> None:
    model = Attends(batch_first=True).eval()
    bank = bank_over(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch: nested tensors are a prototype
        x = torch.nested.nested_tensor([_random(3, SIZE), _random(2, SIZE)])
        with pytest.raises(LorabankError, match=r"'attn' got a NestedTensor.*use_nested_tensor is False"), bank.route("a"):
            model(x, x, x)
        with bank.route(BASE):
            assert model(x, x, x, need_weights=False)[0].is_nested


def test_an_encoder_that_nests_its_rows_says_so_and_goes_on_without() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nested tensors are a prototype
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, 24, batch_first=True), 2).eval()
        bank = bank_over(model)
        x, hidden = _random(2, QUERIES, SIZE), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with pytest.raises(LorabankError, match="use_nested_tensor is False"), bank.route(["a", "b"]):
            model(x, src_key_padding_mask=hidden)
        model.use_nested_tensor = False
        with bank.route(["a", "b"]):
            mixed = model(x, src_key_padding_mask=hidden)
        with bank.route("b"):
            alone = model(x[1:, :3])
    torch.testing.assert_close(mixed[1:, :3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_padding_mask": torch.zeros(2, QUERIES, dtype=torch.bool)}, r"key_padding_mask is \(2, 5\); expected .*\(4, 5\)"),
        ({"attn_mask": torch.zeros(3, QUERIES, QUERIES)}, r"attn_mask is \(3, 5, 5\); expected .*\(8, 5, 5\)"),
        ({"attn_mask": torch.zeros(QUERIES, 4)}, r"attn_mask is \(5, 4\); expected .*\(5, 5\)"),
        ({"attn_mask": torch.zeros(QUERIES, QUERIES, dtype=torch.int64)}, r"a mask in torch.int64; expected bool"),
        ({"is_causal": True}, r"is_causal is a hint about attn_mask, which is None"),
    ],
)
def test_masks_that_dont_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, x = Attends(batch_first=True), _random(ROWS, QUERIES, SIZE)
    bank = bank_over(model)
    with pytest.raises(LorabankError, match=message), bank.route(ROUTES):
        model(x, x, x, **arguments)


def test_inputs_of_other_dimensions_are_refused() -> None:
    model, x = Attends(batch_first=True), _random(ROWS, QUERIES, SIZE)
    bank = bank_over(model)
    with pytest.raises(LorabankError, match=r"query, key and value \(4, 5, 16\), \(5, 16\), \(5, 16\)"), bank.route("a"):
        model(x, x[0], x[0])


def test_hooks_from_before_the_bank_are_refused() -> None:
    model, x = Attends(batch_first=True), _random(ROWS, QUERIES, SIZE)
    model.attn.register_forward_hook(lambda *args: None)
    bank = bank_over(model)
    with pytest.raises(LorabankError, match="'attn' carries hooks that were there before the bank"), bank.route("a"):
        model(x, x, x)
    with bank.route(BASE):
        model(x, x, x)


def test_a_captured_pass_is_followed_by_its_rows_or_refused() -> None:
    model, x = Attends(batch_first=True).eval(), _random(ROWS, QUERIES, SIZE)
    bank = bank_over(model)
    first = bank.routing(["a", BASE, "b", "b"], exact=False)
    with bank.route(["b", "a", BASE, "b"]):
        expected = model(x, x, x)[0]
    with bank.route(first.following({}, [torch.tensor([1]), torch.tensor([0, 3])])):  # of `a`, of `b`
        torch.testing.assert_close(model(x, x, x)[0], expected, rtol=1e-5, atol=1e-5)
    exact = bank.routing(["a", BASE, "b", "b"])
    for refused in (first.following({}, None), exact.following({}, exact.slot_rows(bank.device))):
        with pytest.raises(RoutingError, match="'attn' takes its plain path, which a captured"), bank.route(refused):
            model(x, x, x)


# ---- the attached model ------------------------------------------------------------------------------------------------------


def test_code_that_reads_the_module_and_copies_see_the_base() -> None:
    model = Attends(batch_first=True)
    before, names = state_bytes(model), [name for name, _ in model.named_parameters()]
    bank = bank_over(model)
    wrapper: Any = model.attn
    assert isinstance(wrapper, LoRAMultihead)
    assert (wrapper.batch_first, wrapper.num_heads, wrapper.embed_dim, wrapper._qkv_same_embed_dim) == (True, HEADS, SIZE, True)
    assert wrapper.in_proj_weight.shape == (3 * SIZE, SIZE)
    assert wrapper.out_proj.weight is wrapper.base.out_proj.weight
    assert state_bytes(model) == before
    model.eval()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made.attn) is nn.MultiheadAttention
        assert not made.attn.training
        assert [name for name, _ in made.named_parameters()] == names
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()}, assign=True)
    x = _random(ROWS, QUERIES, SIZE)
    with bank.route("b"):
        assert model(x, x, x)[0].any()  # of a base that is zero
    with bank.route(BASE):
        assert not model(x, x, x)[0].any()
    assert bank.detach() is model
    assert type(model.attn) is nn.MultiheadAttention


def test_the_model_converts_with_its_adapters_in_fp32() -> None:
    model = Attends(batch_first=True)
    bank = bank_over(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    x = _random(ROWS, QUERIES, SIZE).bfloat16()
    with bank.route(ROUTES):
        out, weights = model(x, x, x, key_padding_mask=torch.zeros(ROWS, QUERIES, dtype=torch.bool))
    assert out.dtype == weights.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bank.parameters())


def test_the_encoders_fast_path_reads_nothing_past_an_adapter() -> None:
    model, bank = two("torch encoder")
    x = ids(3)
    with bank.route("a"):
        expected = model(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), bank.route("a"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES.keys())
def test_law5_merged_equals_unmerged_and_comes_back(settings: dict[str, Any]) -> None:
    model = Attends(batch_first=True, **settings).eval()
    before = state_bytes(model)
    bank = bank_over(model)
    inputs = _inputs("self", settings, True)
    with bank.route("a"):
        expected = model(*inputs)[0].detach()
    adapter = bank.adapter("a")
    bank.detach()
    handle = merge(model, adapter, say=None)
    torch.testing.assert_close(model(*inputs)[0].detach(), expected, rtol=1e-4, atol=1e-4)
    assert set(handle.report.layers) == set(adapter.layers)
    handle.unmerge()
    assert state_bytes(model) == before


def test_a_merge_compares_a_models_outputs_through_a_bank() -> None:
    model, bank = two("torch encoder")
    said = r"of nn.MultiheadAttention, or .* are compared through a bank, and this model has one"
    with pytest.raises(MergeError, match=said), bank.route(BASE):
        merge(model, bank.adapter("a"), inputs=ids(2), say=None)
    handle = merge(make("torch encoder"), bank.adapter("a"), inputs=ids(2), say=None)
    assert handle.logits is not None
    assert handle.logits.difference < 1e-4 < handle.logits.change


def test_a_folder_is_merged_tensor_by_tensor_as_in_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "base")
    bank = attach(model)
    add(bank, "a", targets=["head.attention"])
    adapter = bank.adapter("a")
    bank.detach()
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    merge(model, adapter, say=None)
    found, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items() if name in found)
    changed = {name for name, value in found.items() if not torch.equal(value, base[name])}
    assert {name.rpartition("attention.")[2] for name in changed} == {"in_proj_weight", "out_proj.weight"}


def test_a_quantised_base_leaves_its_weights_as_they_are() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "up": nn.Linear(32, 32)})
    before = {name: p.clone() for name, p in model["attn"].named_parameters()}
    said: list[str] = []
    done = quantize_base(model, "fp8", emulate=True, say=said.append)
    assert done.layers == ("up",)
    assert set(done.kept) == {"attn.in_proj", "attn.out_proj"}
    assert "nn.MultiheadAttention reads their weight itself" in said[0]
    assert all(torch.equal(p, before[name]) for name, p in model["attn"].named_parameters())


# ---- training ----------------------------------------------------------------------------------------------------------------


class Speaks(nn.Module):
    """A small language model of torch's own layers; `recompute` says how its blocks are checkpointed."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, SIZE), nn.Linear(SIZE, VOCABULARY)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(SIZE, HEADS, 24, dropout=0.3, batch_first=batch_first) for _ in range(2)
        )
        self.recompute: dict[str, Any] | None = None
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor) -> Tensor:
        h, length = self.embed(input_ids), input_ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        h = h if self.batch_first else h.transpose(0, 1)
        for block in self.blocks:
            h = block(h, mask) if self.recompute is None else checkpoint(block, h, mask, use_reentrant=False, **self.recompute)
        return self.head(h if self.batch_first else h.transpose(0, 1))


JOBS = (
    Job(name="long", rank=4, rows=tokens([9, 12, 5, 7], 1), dropout=0.2, steps=6),
    Job(name="single", rank=2, rows=tokens([4, 6, 5], 2), batch_size=1, accumulation=2, learning_rate=1e-3, steps=6),
    Job(name="attention", rank=3, rows=tokens([11, 3, 7], 3), batch_size=3, steps=4, targets=["in_proj"]),
)


def test_law3_joint_training_equals_training_alone() -> None:
    joint = train(Speaks, JOBS)
    for job in JOBS:
        alone = train(Speaks, [job])[job.name]
        assert difference(joint[job.name], alone) < 5e-5, job.name
        assert all(bool(tensor.any()) for key, tensor in alone.items() if key.endswith(".B"))


def test_law3_where_rows_lie_behind_tokens() -> None:
    """Attention alone: other layers of such blocks can't tell the rows apart, and say so."""
    jobs = [Job(name=name, rank=2, rows=tokens([5, 7, 6], n), steps=3, targets=["attention"]) for n, name in enumerate("ab")]
    joint = train(lambda: Speaks(batch_first=False), jobs)
    for job in jobs:
        alone, first = (train(lambda: Speaks(batch_first=b), [job])[job.name] for b in (False, True))  # noqa: B023
        assert difference(joint[job.name], alone) < 5e-5
        assert difference(first, alone) < 5e-5


def test_activation_checkpointing_recomputes_under_the_same_route() -> None:
    found = []
    for recompute in (False, True):
        model = Speaks().eval()
        bank = bank_over(model)
        if recompute:
            model.recompute = {"context_fn": bank.checkpoint_context}
        with bank.route(ROUTES):
            y = model(ids(ROWS))
        y.square().mean().backward()
        found.append(gradients(bank))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, msg=key)
    model.recompute = {}
    clear(bank)
    with bank.route(ROUTES):
        y = model(ids(ROWS))
    with pytest.raises(RoutingError, match="no route was captured"):
        y.square().mean().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
def test_compiled_blocks_leave_it_out_and_compute_the_same() -> None:
    found = []
    for compiled in (False, True):
        bank = make_bank(model=Speaks().eval())
        if compiled:
            assert len(compile_blocks(bank.model)) == 2
        batch = batch_of([6, 4, 7], ["a", BASE, "b"])
        losses, gradient = one_pass(bank, batch)
        found.append((losses["a"].loss_sum, gradient["a"] | {f"b {key}": g for key, g in gradient["b"].items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert difference(found[1][1], found[0][1]) < 1e-4
