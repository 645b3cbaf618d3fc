"""Adapters in and out of a bank: names, start, configurations, loading, extraction, the base's fingerprint, the summary."""

from __future__ import annotations

import doctest
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorabank.bank.attach
from lorabank import Adapter, AdapterConfig, AdapterLayer, attach
from lorabank.bank.init import INITS, initial_A
from lorabank.errors import AdapterFileError, AdapterNameError, ConfigError, FingerprintError
from lorabank.formats.fingerprint import Fingerprint
from lorabank.formats.slices import without_slices
from tests.bank.tiny import MODELS, TARGETS, add, gpt2, ids, llama, make, outputs, two


def test_the_example_of_12_against_7_parameters() -> None:
    result = doctest.testmod(lorabank.bank.attach)
    assert result.failed == 0
    assert result.attempted >= 10


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_fresh_adapter_changes_nothing_and_learns(kind: str) -> None:
    model = make(kind)
    x = ids(3)
    expected = outputs(model, x).detach()
    bank = attach(model)
    bank.add("new", AdapterConfig(rank=2, targets=TARGETS.get(kind, "all-linear"), modules_to_save=[]))
    y = outputs(model, x)
    torch.testing.assert_close(y.detach(), expected)
    y.square().mean().backward()
    embeddings = {path for path, module in model.named_modules() if isinstance(getattr(module, "base", None), nn.Embedding)}
    for key, p in bank.named_parameters("new"):
        path, _, role = key.rpartition(".")
        learns = "A" if path in embeddings else "B"  # what is zero: the other's gradient is zero then
        assert p.grad is not None
        assert (p.abs().max() == 0) == (p.grad.abs().max() > 0) == (role == learns), key


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "a\\b", ".hidden", "-flag", "a b", "a.", "ü", "a\n", "x" * 101, "nul\0", None, 3]
)
def test_trap17_a_name_must_be_a_path_component(bad: Any) -> None:
    bank = attach(make("handwritten"))
    with pytest.raises(AdapterNameError, match=r"it becomes a folder's name"):
        bank.add(bad, AdapterConfig(rank=1))


def test_names_that_are_taken_or_unknown() -> None:
    _, bank = two("handwritten")
    for name in ("a.b", "A_1-x", "7", "x" * 100):
        bank.add(name, AdapterConfig(rank=1))
    assert bank.names == ("a", "b", "a.b", "A_1-x", "7", "x" * 100)
    with pytest.raises(AdapterNameError, match=r"already has an adapter 'a'.*bank.remove"):
        bank.add("a", AdapterConfig(rank=1))
    for reserved in ("base", "BASE", "last", "checkpoints"):
        with pytest.raises(AdapterNameError, match=r"taken by lorabank itself"):
            bank.add(reserved, AdapterConfig(rank=1))
    for call in (bank.adapter, bank.remove, bank.parameters, bank.config):
        with pytest.raises(AdapterNameError, match=r"no adapter 'A_1-y' in the bank; it has: a, b.*did you mean 'A_1-x'"):
            call("A_1-y")


def test_different_ranks_targets_alphas_and_scalings_live_side_by_side() -> None:
    model = make("llama")
    bank = attach(model)
    add(bank, "small", rank=1, alpha=4, targets=["q"])
    add(bank, "large", rank=8, alpha=4, targets="all-linear", use_rslora=True)
    add(bank, "odd", rank=3, targets=["mlp", "lm_head"], layers=None, rank_pattern={"up_proj": 5}, alpha_pattern={"up_proj": 10})
    part = {name: bank.adapter(name).layers for name in bank.names}
    assert part["small"]["model.layers.0.self_attn.q_proj"].scaling == 4.0
    assert part["large"]["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(4 / 8**0.5)
    assert part["odd"]["model.layers.1.mlp.up_proj"].rank == 5
    assert part["odd"]["model.layers.1.mlp.up_proj"].scaling == 2.0
    x = ids(3)
    with bank.route(["small", "large", "odd"]):
        mixed = outputs(model, x)
    for i, name in enumerate(bank.names):
        alone_model = make("llama")
        alone = attach(alone_model)
        alone.load(name, bank.adapter(name))
        torch.testing.assert_close(outputs(alone_model, x[i : i + 1])[0], mixed[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_products_are_the_formula(kind: str) -> None:
    """Merged by hand into the base weights: y = (W + scaling · B A) x + b, each output to its magnitude where there is one."""
    model, bank = two(kind)
    x = ids(2)
    with bank.route("b"):
        expected = outputs(model, x).detach()
    adapter = without_slices(bank.adapter("b"))
    bank.detach()
    done: set[nn.Parameter] = set()  # tied ends have one weight
    with torch.no_grad():
        for path, part in adapter.layers.items():
            stack, _, expert = path.rpartition(".")
            own = f"{path}_weight" if path.endswith("self_attn.in_proj") else f"{path}.weight"
            weight = model.get_parameter(stack)[int(expert)] if part.stack else model.get_parameter(own)
            if weight in done:
                continue
            done |= {weight} if isinstance(weight, nn.Parameter) else set()  # an expert's is a part of one
            inside = part.stack or part.attention  # of a module, not one
            turned = kind == "gpt-oss" if inside else isinstance(model.get_submodule(path), Conv1D | nn.Embedding)
            changed = (weight.t() if turned else weight) + part.delta()
            if part.magnitude is not None:  # DoRA, eq. 5
                norm = changed.flatten(1).norm(dim=1)
                changed = (changed.flatten(1) * (part.magnitude / norm)[:, None]).view_as(changed)
            weight.copy_(changed.t() if turned else changed)
        for path, bias in adapter.biases.items():
            model.get_parameter(f"{path}.bias").copy_(bias)
        for path, part in adapter.layers.items():
            if part.lora_bias is not None and f"{path}.bias" in dict(model.named_parameters()):
                model.get_parameter(f"{path}.bias").add_(part.scaling * part.lora_bias)
            elif part.lora_bias is not None:
                model.get_submodule(path).register_parameter("bias", nn.Parameter(part.scaling * part.lora_bias))
        for path, own in adapter.token_rows.items():
            model.get_parameter(f"{path}.weight")[list(own.ids)] = own.rows
    torch.testing.assert_close(outputs(model, x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_an_extracted_adapter_is_a_copy_and_loads_back_bit_for_bit() -> None:
    model, bank = two("llama")
    taken = bank.adapter("b")
    assert taken.config == bank.config("b")
    assert taken.task_type == "CAUSAL_LM"
    assert taken.num_parameters == sum(p.numel() for p in bank.parameters("b"))
    before = {path: (part.A.clone(), part.B.clone()) for path, part in taken.layers.items()}
    with torch.no_grad():
        for p in bank.parameters("b"):
            p.zero_()
    assert all(
        torch.equal(part.A, before[path][0]) and torch.equal(part.B, before[path][1]) for path, part in taken.layers.items()
    )
    bank.load("again", taken)
    again = bank.adapter("again")
    assert list(again.layers) == list(taken.layers)
    for path, part in again.layers.items():
        assert torch.equal(part.A, before[path][0])
        assert torch.equal(part.B, before[path][1])
        assert part.scaling == taken.layers[path].scaling
    with bank.route("again"):
        outputs(model, ids(1))


def test_removing_one_leaves_the_others_as_they_were() -> None:
    model, bank = two("llama")
    add(bank, "c", rank=2)
    x = ids(2)
    with bank.route(["a", "c"]):
        expected = outputs(model, x)
    bank.remove("b")
    assert bank.names == ("a", "c")
    assert not any("_b" in name for name, _ in model.named_parameters())
    with bank.route(["a", "c"]):
        assert torch.equal(outputs(model, x), expected)
    with pytest.raises(AdapterNameError), bank.route("b"):
        pass


def test_an_adapter_of_another_base_is_refused_unless_forced() -> None:
    _, bank = two("llama")
    adapter = bank.adapter("a")
    assert adapter.fingerprint == Fingerprint.of(make("llama")), "attaching doesn't change the base's fingerprint"
    other_model = make("llama", seed=1)
    other = attach(other_model)
    with pytest.raises(FingerprintError, match=r"'a' was trained on another base model: parameter .*force=True"):
        other.load("a", adapter)
    with pytest.raises(FingerprintError, match=r"another base model \(some/base\)"):
        other.load("a", replace(adapter, base_model="some/base"))
    assert other.names == ()
    other.load("a", adapter, force=True)
    outputs(other_model, ids(1))
    attach(make("llama").bfloat16()).load("a", adapter)  # the same base in another dtype passes
    bank.load("unknown", replace(adapter, fingerprint=None))


def test_an_adapter_that_doesnt_fit_names_the_layers_and_loads_nothing() -> None:
    bank = attach(llama())
    a, b = torch.zeros(2, 16), torch.zeros(16, 2)
    good = AdapterLayer(a, b, 1.0)

    def load(**layers: AdapterLayer) -> None:
        bank.load("x", Adapter(config=AdapterConfig(rank=2), layers={k.replace("__", "."): v for k, v in layers.items()}))

    q = "model__layers__0__self_attn__q_proj"
    for layers, message in (
        ({q.replace("q_proj", "q_prj"): good}, r"q_prj: the model has no such layer \(did you mean '.*q_proj'"),
        ({q: AdapterLayer(torch.zeros(2, 8), b, 1.0)}, r"q_proj: made for 8 → 16 features, the model's layer has 16 → 16"),
        (
            {q: good, "model__embed_tokens": good},
            r"model.embed_tokens: made for a linear layer, the model's layer is a Embedding",
        ),
        ({q: good, "model__norm": good}, r"model.norm: can't be adapted yet: it is a LlamaRMSNorm"),
        ({f"x{i}": good for i in range(5)}, r"… and 2 more"),
        ({"transformer__h__0__c_attn": good}, r"c_attn: the model has no such layer\. Load the model class"),  # GPT-2's
        ({f"transformer__{q}": good}, r"q_proj: the model has no transformer \(lorabank\.formats\.components\.of_component"),
        ({q: AdapterLayer(a.int(), b, 1.0)}, r"q_proj: a tensor is torch\.int32; expected floating-point numbers"),
        ({q: AdapterLayer(a, b.to("meta"), 1.0)}, r"q_proj: a tensor is on the meta device"),
        ({q: AdapterLayer(a, b, float("nan"))}, r"q_proj: its scaling is nan; expected a finite number"),
        ({q: replace(good, dense=True)}, r"q_proj: made for a convolution in groups, the model's layer has none"),
        ({q: replace(good, groups=2)}, r"q_proj: made for a kernel of none in 2 groups, the model's layer has none"),
        ({q: AdapterLayer(a[:0], b[:, :0], 1.0)}, r"of one rank of at least 1, got A \(0, 16\) and B \(16, 0\)"),
        ({}, "has no layers"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            load(**layers)
    for other in ("out/formal", {"rank": 4}, None):
        with pytest.raises(AdapterFileError, match=r"expected a lorabank\.Adapter, got .*Adapter\.load\(path\) reads one"):
            bank.load("x", other)  # type: ignore[arg-type]
    assert bank.names == ()
    assert not any(".lora." in name for name, _ in bank.model.named_parameters())


def test_configurations_may_be_ours_a_dict_or_pefts() -> None:
    bank = attach(llama())
    bank.add("ours", AdapterConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]))
    bank.add("dict", {"lora_r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]})
    bank.add("peft", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    shapes = {name: [p.shape for p in bank.parameters(name)] for name in bank.names}
    assert shapes["ours"] == shapes["dict"] == shapes["peft"]
    assert bank.config("peft").alpha == 8
    with pytest.raises(ConfigError, match=r"expected lorabank.AdapterConfig, a dict or peft.LoraConfig, got int"):
        bank.add("x", 4)
    with pytest.raises(ConfigError, match=r"rank"):
        bank.add("x", {"rank": 0})
    with pytest.raises(ConfigError, match=r"did you mean 'alpha'"):
        bank.add("x", {"alhpa": 3})


def test_a_rank_above_the_layer_is_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    bank = attach(model)
    with pytest.warns(UserWarning, match=r"'a': rank 5 is above what layer '0' \(4 → 3\) can use"):
        bank.add("a", AdapterConfig(rank=5))
    with bank.route("a"):
        model(torch.ones(1, 4)).sum().backward()
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")  # a warning made an error must not leave half an adapter behind
        bank.add("b", AdapterConfig(rank=5))
    assert bank.names == ("a",)
    model(torch.ones(1, 4))


@pytest.mark.parametrize("init", list(INITS))
def test_a_start_depends_on_seed_layer_and_shape_alone(init: str) -> None:
    one = initial_A(init, 4, 64, seed=3, path="x.y")
    assert one.shape == (4, 64)
    assert one.dtype == torch.float32
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(initial_A(init, 4, 64, seed=3, path="x.y"), one)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator isn't touched"
    for other in (initial_A(init, 4, 64, seed=4, path="x.y"), initial_A(init, 4, 64, seed=3, path="x.z")):
        assert not torch.equal(other, one)


def test_the_sizes_of_the_starts() -> None:
    uniform = initial_A("uniform", 256, 400, seed=0, path="p")
    assert 0.0499 < float(uniform.abs().max()) <= 0.05
    assert float(uniform.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    gaussian = initial_A("gaussian", 256, 400, seed=0, path="p")
    assert float(gaussian.std()) == pytest.approx(1 / 256, rel=0.02)


def test_joint_and_alone_start_from_the_same_values() -> None:
    _, joint = two("llama")
    alone = attach(make("llama"))
    alone.add("b", AdapterConfig(rank=5, alpha=2, use_rslora=True), seed=1)
    for (key, p), (other_key, q) in zip(joint.named_parameters("b"), alone.named_parameters("b"), strict=True):
        assert key == other_key
        if key.endswith(".A"):
            assert torch.equal(p, q)


def test_parameters_groups_and_names() -> None:
    _, bank = two("gpt2")
    named = dict(bank.named_parameters("a"))
    assert list(named)[:2] == ["transformer.h.0.attn.c_attn.A", "transformer.h.0.attn.c_attn.B"]
    assert named["transformer.h.0.attn.c_attn.A"].shape == (3, 16)
    assert named["transformer.h.0.attn.c_attn.B"].shape == (3, 48)
    assert len(bank.parameters()) == len(bank.parameters("a")) + len(bank.parameters("b"))
    assert next(iter(dict(bank.named_parameters()))) == "a:transformer.h.0.attn.c_attn.A"
    group_a, group_b = bank.parameter_groups("a", learning_rate=0.1, loraplus_ratio=16)
    assert (group_a["lr"], group_b["lr"]) == (0.1, 1.6)
    assert {id(p) for g in (group_a, group_b) for p in g["params"]} == {id(p) for p in bank.parameters("a")}
    torch.optim.AdamW([group_a, group_b])


def test_the_summary_says_what_is_adapted_and_what_is_not() -> None:
    bank = attach(gpt2())
    assert "no adapters yet" in str(bank.summary())
    bank.add("formal", AdapterConfig(rank=2, targets=["c_attn"]))
    bank.add("terse", AdapterConfig(rank=4, alpha=8, targets=["mlp"]))
    summary = bank.summary()
    assert summary.base_parameters == sum(p.numel() for p in gpt2().parameters())
    assert summary.adapters["formal"].parameters == sum(p.numel() for p in bank.parameters("formal")) == 2 * 2 * (16 + 48)
    assert summary.adapters["terse"].kinds == {"c_fc": 2, "c_proj": 2}
    assert summary.unadapted == {"c_proj": 2}
    assert summary.adapted_layers == 6
    text = str(summary)
    share = 100 * 256 / summary.base_parameters
    assert f"formal: rank 2, alpha 32, 256 parameters ({share:.2f} % of the base) in 2 layers: c_attn × 2" in text
    assert "not adapted: c_proj × 2" in text
