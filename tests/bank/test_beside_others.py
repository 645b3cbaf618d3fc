"""A model that carries other adaptation modules: a bottleneck, a prefix, PEFT's LoRA or IA³. Both train, none is disturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import lorabank as lb
from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.wrappers import base_path, base_prefix
from lorabank.errors import AdapterFileError, ConfigError, TargetError
from tests.bank.tiny import fill, gpt_oss, ids, llama, mixtral, state_bytes


class Bottleneck(nn.Module):
    """A bottleneck behind a layer (arXiv:1902.00751)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, 3), nn.Linear(3, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.tanh(self.down(y)))


def with_bottleneck() -> nn.Module:
    model = llama()
    model.requires_grad_(False)
    for block in model.model.layers:
        block.mlp.down_proj = Bottleneck(block.mlp.down_proj)
    return model


def with_scale() -> nn.Module:
    """A parameter of the user's own."""
    model = llama()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def in_peft(config: Any) -> Callable[[], nn.Module]:
    return lambda: get_peft_model(llama(), config)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bottleneck": (with_bottleneck, r"re:.*\.(down|up)\.(weight|bias)"),
    "own parameter": (with_scale, "model.norm.weight"),
    "prefix": (in_peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), "prompt_encoder"),
    "prompt": (in_peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), "prompt_encoder"),
    "ia3": (in_peft(IA3Config(task_type="CAUSAL_LM")), "ia3_l"),
    "lora": (in_peft(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])), "*lora_?"),
}


def made(kind: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, pattern = OTHERS[kind]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model, pattern


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outputs(model: nn.Module) -> Tensor:
    return model(input_ids=ids(2)).logits[:, -6:]


def attached(kind: str) -> tuple[nn.Module, AdapterBank, dict[str, nn.Parameter]]:
    model, pattern = made(kind)
    others = trained(model)
    bank = attach(model, keep_trainable=pattern)
    bank.add("a", AdapterConfig(rank=2, alpha=4))
    fill(bank, "a")
    return model, bank, others


class Beside(nn.Module):
    """LoRA in plain torch."""

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.layer, self.A, self.B, self.scaling = layer, nn.Parameter(A.clone()), nn.Parameter(B.clone()), scaling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs) + self.scaling * (x @ self.A.t() @ self.B.t())

    @property
    def weight(self) -> Tensor:
        return self.layer.weight


def plainly(model: nn.Module, bank: AdapterBank) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of `model` with the adapter in plain torch, and its leaves."""
    twin, leaves = copy.deepcopy(model), {}
    for path in dict.fromkeys(key.rpartition(".")[0] for key, _ in bank.named_parameters("a")):
        layer = bank.adapter("a").layers[base_path(path, base_prefix(model))]
        parent, _, name = path.rpartition(".")
        beside = Beside(twin.get_submodule(path), layer.A, layer.B, layer.scaling)
        setattr(twin.get_submodule(parent), name, beside)
        leaves |= {f"{path}.A": beside.A, f"{path}.B": beside.B}
    return twin, leaves


@pytest.mark.parametrize("kind", OTHERS)
def test_both_get_the_gradients_of_a_plain_implementation(kind: str) -> None:
    model, bank, others = attached(kind)
    others_named = {name: p for name, p in trained(model).items() if ".lora.A_a" not in name and ".lora.B_a" not in name}
    assert {id(p) for p in others_named.values()} == {id(p) for p in others.values()}
    found = outputs(model)
    found.square().sum().backward()
    twin, leaves = plainly(model, bank)
    expected = outputs(twin)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    for key, leaf in leaves.items():
        mine = dict(bank.named_parameters("a"))[key].grad
        assert mine is not None
        assert leaf.grad is not None
        torch.testing.assert_close(mine if key.endswith(".A") else mine.t(), leaf.grad, rtol=1e-3, atol=1e-5)
    theirs = [p.grad for name, p in twin.named_parameters() if p.requires_grad and id(p) not in set(map(id, leaves.values()))]
    mine = [p.grad for p in others.values()]
    assert len(mine) == len(theirs) > 0
    for g, expected_g in zip(mine, theirs, strict=True):
        assert g is not None
        assert expected_g is not None
        assert float(g.abs().max()) > 0
        torch.testing.assert_close(g, expected_g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_both_learn_and_detaching_leaves_the_others_as_they_are(kind: str) -> None:
    model, bank, others = attached(kind)
    required = {id(p): p.requires_grad for p in made(kind)[0].parameters()}
    assert sum(required.values()) == len(others)
    everything = list(trained(model).values())
    assert len(everything) == len(others) + len(bank.parameters())
    before = [p.detach().clone() for p in everything]
    target = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(everything, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = (outputs(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(everything, before, strict=True))
    with bank.route(BASE), torch.no_grad():
        beside = outputs(model)
    frozen = state_bytes(model)
    assert bank.detach() is model
    assert state_bytes(model) == frozen
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained(made(kind)[0]))
    with torch.no_grad():
        assert torch.equal(outputs(model), beside)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_others_consist_of_is_no_target(kind: str) -> None:
    _, bank, _ = attached(kind)
    paths = {key.rpartition(".")[0] for key, _ in bank.named_parameters("a")}
    assert not any(f"{path}.weight" in trained(made(kind)[0]) for path in paths)
    kinds = {path.removesuffix(".base_layer").rpartition(".")[2] for path in paths}
    down = "layer" if kind == "bottleneck" else "down_proj"
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", down}
    assert len(paths) == 14
    assert not bank.summary().unadapted or kind == "bottleneck"


def test_a_layer_inside_pefts_wrapper_is_named_as_without_it() -> None:
    model, pattern = made("lora")
    bank = attach(model, keep_trainable=pattern)
    for name, targets in (("role", "q"), ("name", "q_proj"), ("inside", "q_proj.base_layer"), ("glob", "layers.*.q_proj")):
        bank.add(name, AdapterConfig(rank=1, targets=[targets]))
        leaves = {key.split("self_attn.")[1] for key, _ in bank.named_parameters(name)}
        assert leaves == {"q_proj.base_layer.A", "q_proj.base_layer.B"}
        assert [path.split("self_attn.")[1] for path in bank.adapter(name).layers] == ["q_proj"] * 2
    bank.add("patterned", AdapterConfig(rank=1, targets=["q"], rank_pattern={r"0\.self_attn\.q_proj": 3}))
    assert [layer.rank for layer in bank.adapter("patterned").layers.values()] == [3, 1]
    with pytest.raises(TargetError, match=r"'lora_A' names .*q_proj.lora_A, a ModuleDict, which can't be adapted"):
        bank.add("theirs", AdapterConfig(rank=1, targets=["lora_A"]))
    assert dict(model.named_modules())["base_model.model.model.layers.0.self_attn.q_proj"].active_adapters == ["default"]


@pytest.mark.parametrize("kind", OTHERS)
def test_files_have_the_bases_own_paths(kind: str, tmp_path: Path) -> None:
    """What PEFT puts around layers is no part of them: such a file is read anywhere, by PEFT too."""
    model, bank, _ = attached(kind)
    expected = outputs(model).detach()
    lb_file = bank.adapter("a").save(tmp_path / "a")
    adapter = lb.Adapter.load(lb_file)
    again, bank, others = attached(kind)
    with torch.no_grad():
        for p in others.values():
            p.add_(1.0)  # what trains beside the base is no part of its fingerprint
    bank.load("b", adapter)
    for p, other in zip(others.values(), trained(made(kind)[0]).values(), strict=True):
        p.data.copy_(other)
    with bank.route("b"):
        torch.testing.assert_close(outputs(again), expected)
    if kind == "bottleneck":
        return  # which has a place of its own in the path
    torch.manual_seed(0)
    plain, same = attach(llama()), bank.adapter("a")
    plain.load("b", adapter)
    if kind != "own parameter":
        PeftModel.from_pretrained(plain.detach(), lb_file)
    assert set(same.layers) == set(adapter.layers)
    assert all(path.startswith("model.layers.") and "base_layer" not in path for path in adapter.layers)


def test_a_freeze_that_stops_what_someone_chose_is_said_once() -> None:
    for kind in OTHERS:
        model, pattern = made(kind)
        with pytest.warns(
            UserWarning, match=r"\d+ parameters trained in a model that is frozen otherwise .*keep_trainable"
        ) as said:
            bank = attach(model)
        assert len(said) == 1
        assert not trained(model)
        bank.detach()
        assert trained(model)
        attach(model, keep_trainable=pattern)  # no warning


def test_a_new_model_isnt_warned_about() -> None:
    bank = attach(llama())
    assert not trained(bank.model)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("promt_encoder", r"'promt_encoder' names no parameter or module of the model \(did you mean 'prompt_encoder'\?\)"),
        (["prompt_encoder", "q_proj"], r"none of what 'q_proj' names trains \(base_model.*q_proj.weight and so on"),
    ],
)
def test_keep_trainable_names_something_that_trains(pattern: Any, message: str) -> None:
    model, _ = made("prefix")
    with pytest.raises(ConfigError, match=message):
        attach(model, keep_trainable=pattern)
    assert trained(model)


def test_keeping_everything_is_no_frozen_base() -> None:
    with pytest.raises(ConfigError, match="so there is no frozen base"):
        attach(llama(), keep_trainable="*")


@pytest.mark.parametrize("make_model", [mixtral, gpt_oss])
def test_stacked_experts_that_train_beside_the_base_have_no_adapter(make_model: Any) -> None:
    """Their products would give the stack no gradient: `targets` never means them, and no file brings A and B of them."""
    plain = attach(make_model().requires_grad_(False))
    plain.add("a", AdapterConfig(rank=1, targets=["experts"]))
    loaded, x = plain.adapter("a"), ids(2)
    model = make_model()
    bank = attach(model, keep_trainable=["experts"])
    bank.add("all", AdapterConfig(rank=1, targets="all-linear", exclude=["experts"]))
    assert {path.rpartition(".")[2] for path in bank.adapter("all").layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with bank.route("all"):
        model(input_ids=x).logits.square().sum().backward()
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name in bank.kept)
    with pytest.raises(
        TargetError, match=rf"'experts' names {stack}, which trains beside the base \(keep_trainable\)\. Leave it"
    ):
        bank.add("b", AdapterConfig(rank=1, targets=["experts"]))
    with pytest.raises(
        TargetError, match=rf"'b' changes the experts '{stack}', whose base weight trains beside it .* load it into"
    ):
        bank.load("b", loaded, force=True)
    assert bank.names == ("all",)
    half = attach(make_model(), keep_trainable=["down_proj"])
    with pytest.raises(TargetError, match=r"'gate_up_proj' names .*, which trains beside the base"):
        half.add("a", AdapterConfig(rank=1, targets=["gate_up_proj"]))


def test_experts_whose_parameters_peft_adapts_are_refused_by_name() -> None:
    """In a call they are no parameters: PEFT puts its sums in their place."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    plain = attach(mixtral())
    plain.add("a", AdapterConfig(rank=1, targets=["experts"]))
    bank = attach(get_peft_model(mixtral(), config).eval(), keep_trainable="*lora_?")
    said = r"experts\.base_layer.*PEFT adapts the parameters of these experts already \(target_parameters\)"
    for targets in ("all-linear", ["experts"]):
        with pytest.raises(TargetError, match=said):
            bank.add("a", AdapterConfig(rank=1, targets=targets))
    with pytest.raises(AdapterFileError, match="the model has no such layer"):
        bank.load("a", plain.adapter("a"), force=True)
    bank.add("a", AdapterConfig(rank=1, exclude=["experts"]))
    with bank.route("a"):
        outputs(bank.model).square().sum().backward()
    assert all(p.grad is not None for name, p in bank.model.named_parameters() if name in bank.kept)


def test_a_layer_that_trains_beside_the_base_is_named_as_that() -> None:
    bank = attach(llama(), keep_trainable="q_proj")
    with pytest.raises(TargetError, match=r"'q' names model\.layers\.0\.self_attn\.q_proj, which trains beside the base"):
        bank.add("a", AdapterConfig(rank=1, targets=["q"]))
