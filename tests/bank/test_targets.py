"""The language of `targets`, `exclude` and `layers` on several architectures, and every error's closest match."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorabank import AdapterConfig, attach
from lorabank.bank.adaptable import linear_layers, unsupported_linear_maps
from lorabank.bank.targets import resolve_targets
from lorabank.errors import TargetError
from tests.bank.tiny import MODELS, Handwritten, TorchEncoder, add, ids, llama, make, outputs

L = "model.layers.{}."
LLAMA_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def _chosen(kind: str, targets: Any, **more: Any) -> list[str]:
    return list(resolve_targets(make(kind), AdapterConfig(rank=1, targets=targets, **more)))


def _llama(names: list[str], layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [L.format(i) + name for i in layers for name in names]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", _llama(LLAMA_ATTENTION + LLAMA_MLP)),
        ("attention", _llama(LLAMA_ATTENTION)),
        ("mlp", _llama(LLAMA_MLP)),
        (["q", "v"], _llama(["self_attn.q_proj", "self_attn.v_proj"])),
        (["k", "o"], _llama(["self_attn.k_proj", "self_attn.o_proj"])),
        ("q_proj", _llama(["self_attn.q_proj"])),
        ("mlp.up_proj", _llama(["mlp.up_proj"])),
        (["model.layers.1.mlp.down_proj"], ["model.layers.1.mlp.down_proj"]),
        ("layers.*.mlp.*_proj", _llama(LLAMA_MLP)),
        ("[qk]_proj", _llama(["self_attn.q_proj", "self_attn.k_proj"])),
        (r"re:.*\.1\..*(q|up)_proj", _llama(["self_attn.q_proj", "mlp.up_proj"], (1,))),
        (["all-linear", "lm_head"], [*_llama(LLAMA_ATTENTION + LLAMA_MLP), "lm_head"]),
    ],
)
def test_the_language_on_llama(targets: Any, expected: list[str]) -> None:
    assert _chosen("llama", targets) == expected


def test_exclude_and_layers() -> None:
    assert _chosen("llama", "all-linear", exclude=["mlp", "k"]) == _llama(
        ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"]
    )
    assert _chosen("llama", "attention", layers=[1]) == _llama(LLAMA_ATTENTION, (1,))
    assert _chosen("llama", "mlp", layers=[0], exclude="*down*") == _llama(["mlp.gate_proj", "mlp.up_proj"], (0,))


@pytest.mark.parametrize(
    ("kind", "role", "expected"),
    [
        ("gpt2", "attention", ["attn.c_attn", "attn.c_proj"]),
        ("gpt2", "o", ["attn.c_proj"]),
        ("gpt2", "mlp", ["mlp.c_fc", "mlp.c_proj"]),
        ("bert", "attention", ["self.query", "self.key", "self.value", "attention.output.dense"]),
        ("bert", "o", ["attention.output.dense"]),
        ("bert", "mlp", ["intermediate.dense", "0.output.dense", "1.output.dense"]),
        ("t5", "q", ["SelfAttention.q", "EncDecAttention.q"]),
        ("t5", "cross-attention", ["EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"]),
        ("t5", "mlp", ["DenseReluDense.wi", "DenseReluDense.wo"]),
        (
            "bart",
            "cross-attention",
            ["encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.q_proj", "encoder_attn.out_proj"],
        ),
        ("bart", "o", ["self_attn.out_proj", "encoder_attn.out_proj"]),
        ("bart", "mlp", ["fc1", "fc2"]),
        ("torch encoder", "mlp", ["linear1", "linear2"]),
    ],
)
def test_roles_follow_each_familys_names(kind: str, role: str, expected: list[str]) -> None:
    found = _chosen(kind, role)
    assert all(any(path.endswith(f".{end}") for end in expected) for path in found), found
    assert all(any(path.endswith(f".{end}") for path in found) for end in expected), found


@pytest.mark.parametrize("kind", [k for k in MODELS if k != "torch encoder"])
def test_all_linear_is_every_linear_layer_but_the_output_head(kind: str) -> None:
    model = make(kind)
    head = next((model._modules[name] for name in ("lm_head", "embed_out") if name in model._modules), None)
    expected = [path for path, m in linear_layers(model).items() if m is not head]
    assert _chosen(kind, "all-linear") == expected
    assert expected


def test_dims_that_differ_by_layer_train() -> None:
    model = make("handwritten")
    bank = attach(model)
    add(
        bank,
        "a",
        targets=["blocks.0.*", "head"],
        rank_pattern={"blocks.0.0": 7},
        alpha_pattern={"head": 1.0, r"blocks\.0\.\d": 8.0},
    )
    layers = bank.adapter("a").layers
    assert {path: (part.rank, part.scaling) for path, part in layers.items()} == {
        "blocks.0.0": (7, 8 / 7),
        "blocks.0.2": (3, 8 / 3),
        "head": (3, 1 / 3),
    }
    outputs(model, ids(2)).sum().backward()
    assert all(p.grad is not None for p in bank.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"targets": "q_porj"},
            r"targets: 'q_porj' matches no layer of the model \(did you mean 'q_proj'\?\).*It has: down_proj",
        ),
        ({"targets": ["q", "atention"]}, r"targets: 'atention' .*did you mean 'attention'"),
        ({"targets": "all-liner"}, r"did you mean 'all-linear'"),
        ({"targets": "mpl"}, r"did you mean 'mlp'"),
        ({"targets": "norm"}, r"names model.norm, a LlamaRMSNorm, which can't be adapted yet"),
        ({"targets": "self_attn"}, r"names model.layers.0.self_attn, a LlamaAttention.*inside it, such as 'self_attn\.\*'"),
        (
            {"targets": "cross-attention"},
            r"'cross-attention' matches no linear layer of the model(?! \(did you mean 'cross-attention')",
        ),
        ({"targets": "re:q_proj"}, r"'re:q_proj' matches no layer"),
        ({"targets": "re:(q"}, r"targets: 're:\(q' is no regular expression"),
        ({"exclude": "re:(q"}, r"exclude: 're:\(q' is no regular expression"),
        ({"exclude": "k_prj"}, r"exclude: 'k_prj' matches no layer.*did you mean 'k_proj'"),
        ({"targets": "q", "exclude": "attention"}, r"less exclude \['attention'\] leave no layer"),
        ({"layers": [0, 5]}, r"layers: no block 5; the targeted layers have blocks 0 to 1"),
        ({"targets": "lm_head", "layers": [0]}, r"layers: no block 0; the targeted layers have no numbered blocks"),
        (
            {"rank_pattern": {"q_prj": 4}},
            r"rank_pattern\['q_prj'\] matches none of the 14 adapted layers \(did you mean 'q_proj'\?\)",
        ),
        ({"targets": "v", "alpha_pattern": {"q_proj": 4}}, r"alpha_pattern\['q_proj'\] matches none of the 2"),
        ({"rank_pattern": {"(q": 4}}, r"rank_pattern: '\(q' is no regular expression"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_closest_name(config: dict[str, Any], message: str) -> None:
    bank = attach(llama())
    with pytest.raises(TargetError, match=message):
        bank.add("a", AdapterConfig(rank=1, **config))
    assert bank.names == ()
    assert not any(".lora." in name for name, _ in bank.model.named_parameters())


def test_fused_projections_are_named() -> None:
    with pytest.raises(TargetError, match=r"'q' matches no linear layer.*may fuse q, k and v"):
        _chosen("handwritten", "q")


class _Unregistered(torch.nn.Module):
    """Stacked experts that compute in a way that nobody says."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.weights = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) @ self.weights.mean(0)


def test_trap11_all_linear_on_stacked_experts_that_cant_be_adapted_is_an_error_that_names_them() -> None:
    model = torch.nn.Sequential(_Unregistered())
    bank = attach(model)
    with pytest.raises(
        TargetError, match=r"'all-linear' would leave 1 linear maps unadapted: 0 .*3-D weights of its own.*isn't registered"
    ):
        bank.add("a", AdapterConfig(rank=2))
    add(bank, "a", targets=["q_proj"])
    assert "0" in bank.summary().unsupported
    add(bank, "b", exclude=["0"])  # leaving them out on purpose is allowed
    assert list(bank.adapter("b").layers) == list(bank.adapter("a").layers) == ["0.q_proj"]


def test_experts_are_targets_like_layers() -> None:
    stacks = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert set(_chosen("mixtral", "all-linear")) == {*stacks, *attention}
    for target in ("experts", "mlp", "*.experts.*", "re:.*experts.*"):
        assert list(_chosen("mixtral", target)) == stacks
    assert list(_chosen("mixtral", "experts.down_proj")) == stacks[1:]
    assert set(_chosen("mixtral", "all-linear", exclude=["*.experts"])) == attention
    assert set(_chosen("mixtral", "all-linear", exclude=["down_proj"])) == {stacks[0], *attention}


class _OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_trap12_attention_that_never_calls_its_projection_is_refused() -> None:
    """Where it computes in a way of its own; torch's own is in test_multihead.py."""
    model = TorchEncoder()
    for layer in model.encoder.layers:
        layer.self_attn = _OwnAttention(16, 2, batch_first=True)
    bank = attach(model)
    with pytest.raises(TargetError, match=r"self_attn.out_proj \(nn.MultiheadAttention reads its weight and never calls it\)"):
        bank.add("a", AdapterConfig(rank=2))
    with pytest.raises(TargetError, match=r"'self_attn' names encoder.*, which can't be adapted: .*it has a forward of its own"):
        bank.add("a", AdapterConfig(rank=2, targets=["self_attn"]))
    with pytest.raises(TargetError, match=r"'out_proj' names encoder.layers.0.self_attn.out_proj, which can't be adapted"):
        bank.add("a", AdapterConfig(rank=2, targets=["out_proj"]))
    bank.add("a", AdapterConfig(rank=2, exclude=["self_attn", "out_proj"]))
    assert {path.rpartition(".")[2] for path in bank.adapter("a").layers} == {"linear1", "linear2", "head"}


def test_other_linear_maps_that_cant_be_adapted_are_found() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 4),
            "bilinear": nn.Bilinear(4, 4, 4),
            "lazy": nn.LazyLinear(4),
            "conv": nn.Conv1d(4, 4, 3),
            "ok": nn.Linear(4, 4),
        }
    )
    found = unsupported_linear_maps(model)
    assert set(found) == {"lstm", "bilinear", "lazy"}
    assert "run one first" in found["lazy"]
    assert list(linear_layers(model)) == ["ok"]


def test_targets_are_the_same_whether_or_not_the_model_is_wrapped_already() -> None:
    model = Handwritten()
    bank = attach(model)
    before = list(linear_layers(model))
    add(bank, "a", targets=["head", "blocks.0.0"])
    assert list(linear_layers(model)) == before
    assert unsupported_linear_maps(model) == {}
    assert list(resolve_targets(model, AdapterConfig(rank=1))) == before
