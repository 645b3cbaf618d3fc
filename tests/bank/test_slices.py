"""Slices of fused layers: adapters of q, k, v, gate or up alone, with ranks of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorabank import BASE, Adapter, AdapterConfig, attach, combine, merge
from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.fused_layers import FUSED, slices_of
from lorabank.errors import AdapterFileError, ConfigError, TargetError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.convert import convert
from lorabank.formats.output_slice import OutputSlice
from lorabank.formats.slices import without_slices
from tests.bank.families import FAMILIES
from tests.bank.family import made
from tests.bank.tiny import add, clear, fill, gpt2, gradients, ids, make, neox, outputs, two

KINDS = ["sliced gpt2", "sliced neox"]


def _twin(kind: str, adapter: Adapter, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What plain torch makes of W + ΔW, and the gradient of each A and B."""
    model = make(kind)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    leaves: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = dict(weights)
    for path, layer in adapter.layers.items():
        A, B = (t.clone().requires_grad_() for t in (layer.A, layer.B))
        leaves |= {f"{path}.A": A, f"{path}.B": B}
        delta, owner = layer.scaling * (B @ A), path
        if layer.outputs is not None:
            owner = path.rpartition(".")[0]
            delta = torch.zeros(layer.outputs.total, A.shape[1]).index_copy(0, layer.outputs.rows, delta)
        key = f"{owner}.weight"
        changed[key] = changed[key] + (delta.T if kind == "sliced gpt2" else delta)
    y = functional_call(model, changed, kwargs={"input_ids": x}).logits
    y.square().mean().backward()
    return y.detach(), {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_changed_weights(kind: str) -> None:
    model, bank = two(kind)
    x = ids(4)
    expected, wanted = _twin(kind, bank.adapter("b"), x)
    with bank.route("b"):
        y = outputs(model, x)
    y.square().mean().backward()
    assert torch.allclose(y, expected, atol=1e-5)
    found = {key.removeprefix("b:"): g for key, g in gradients(bank).items() if key.startswith("b:")}
    found = {key: g.T if key.endswith(".B") else g for key, g in found.items()}
    assert found.keys() == wanted.keys()
    for key, expected_g in wanted.items():
        assert expected_g.abs().max() > 0
        assert torch.allclose(found[key], expected_g, atol=1e-6, rtol=1e-4), key


def test_each_slice_has_a_rank_of_its_own_and_the_others_are_the_bases() -> None:
    bank = attach(gpt2().eval())
    bank.add("a", AdapterConfig(rank=2, targets=["q", "v"], rank_pattern={"v": 5}))
    ranks = {path.rpartition(".")[2]: layer.rank for path, layer in bank.adapter("a").layers.items()}
    assert ranks == {"q": 2, "v": 5}
    fill(bank, "a")
    attention = bank.model.get_submodule("transformer.h.0.attn.c_attn")
    x = torch.randn(2, 3, 16)
    with bank.route(["a", BASE]):
        y = attention(x)
    with bank.route(BASE):
        plain = attention(x)
    assert torch.equal(y[1], plain[1])
    assert torch.equal(y[0, :, 16:32], plain[0, :, 16:32])  # k
    assert not torch.isclose(y[0, :, :16], plain[0, :, :16]).any(-1).all()
    assert "q × 2, v × 2" in str(bank.summary())
    assert "c_attn" not in str(bank.summary())


def test_an_adapter_of_the_whole_layer_goes_beside_one_of_slices() -> None:
    bank = attach(gpt2().eval())
    add(bank, "whole", targets=["c_attn"])
    add(bank, "parts", targets=["c_attn.q", "c_attn.v"])
    x = ids(4)
    with bank.route(["whole", "parts", BASE, {"whole": 0.5, "parts": -1.0}]):
        mixed = outputs(bank.model, x)
    for row, route in enumerate(["whole", "parts", BASE]):
        with bank.route(route):
            assert torch.allclose(outputs(bank.model, x[row : row + 1])[0], mixed[row], atol=1e-6)


def test_a_decomposed_whole_layer_goes_beside_slices() -> None:
    bank = attach(gpt2().eval())
    add(bank, "dora", targets=["c_attn"], use_dora=True)
    add(bank, "parts", targets=["q"])
    x, alone = ids(2), []
    with bank.route(["dora", "parts"]):
        mixed = outputs(bank.model, x)
    for row, route in enumerate(["dora", "parts"]):
        with bank.route(route):
            alone.append(outputs(bank.model, x[row : row + 1])[0])
    assert torch.allclose(torch.stack(alone), mixed, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [6, 5.5])
def test_a_file_is_the_same_change_of_the_whole_layer_and_comes_back_as_slices(kind: str, alpha: float, tmp_path: Path) -> None:
    from peft import PeftModel

    bank = attach(make(kind))
    bank.add("a", AdapterConfig(rank=2, alpha=alpha, targets=["q", "k", "v"], rank_pattern={"v": 3, "k": 4}))
    fill(bank, "a")
    x = ids(3)
    with bank.route("a"):
        expected = outputs(bank.model, x)
    folder = bank.adapter("a").save(tmp_path / "a")
    theirs = PeftModel.from_pretrained(make(kind), str(folder)).eval()
    assert torch.allclose(theirs(input_ids=x).logits, expected, atol=1e-5)

    again = Adapter.load(folder)
    assert {path.rpartition(".")[2] for path in again.layers} == {"q", "k", "v"}
    assert {path: layer.rank for path, layer in again.layers.items() if path.endswith(".v")}.popitem()[1] == 3
    again.save(tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    bank.load("again", again)
    with bank.route("again"):
        assert torch.allclose(outputs(bank.model, x), expected, atol=1e-6)
    assert [key for key, _ in bank.named_parameters("again")] == [key for key, _ in bank.named_parameters("a")]

    (folder / "lorabank.json").unlink()  # what another tool would keep
    assert {path.rpartition(".")[2] for path in Adapter.load(folder).layers} <= {"c_attn", "query_key_value"}


def test_converted_to_pefts_form_they_stay_slices(tmp_path: Path) -> None:
    bank = attach(make("sliced gpt2"))
    bank.add("a", AdapterConfig(rank=2, targets=["q", "v"]))
    fill(bank, "a")
    folder = bank.adapter("a").save(tmp_path / "a")
    assert convert(folder, tmp_path / "b", "peft").adapter.layers.keys() == bank.adapter("a").layers.keys()
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_layers_in_any_order_are_the_same_bytes(tmp_path: Path) -> None:
    bank = attach(make("sliced gpt2"))
    bank.add("a", AdapterConfig(rank=2, targets=["q", "v"]))
    fill(bank, "a")
    adapter = bank.adapter("a")
    adapter.save(tmp_path / "a")
    replace(adapter, layers=dict(reversed(adapter.layers.items()))).save(tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_answers_as_unmerged(kind: str) -> None:
    model, bank = two(kind)
    x = ids(3)
    with bank.route("a"):
        expected = outputs(model, x)
    adapter = bank.adapter("a")
    plain = make(kind)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    handle = merge(plain, adapter, say=None)
    assert torch.allclose(outputs(plain, x), expected, atol=1e-5)
    handle.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_combined_with_one_of_the_whole_layer() -> None:
    bank = attach(gpt2().eval())
    add(bank, "whole", targets=["c_attn"])
    add(bank, "parts", targets=["q", "v"])
    x = ids(2)
    bank.load("sum", combine([(bank.adapter("whole"), 0.5), (bank.adapter("parts"), 1.0)], method="exact"))
    with bank.route({"whole": 0.5, "parts": 1.0}):
        expected = outputs(bank.model, x)
    with bank.route("sum"):
        assert torch.allclose(outputs(bank.model, x), expected, atol=1e-5)


# ---- what is known of fused layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layer"), list(FUSED))
def test_the_table_is_what_the_models_compute(family: str, layer: str) -> None:
    """Of q, another token's reaches no answer of an attention; of k and v it does; answers are linear in v, or in up."""
    tiny = FAMILIES[{"blip_2": "blip-2"}.get(family, family)]
    model = made(tiny)
    layers = {path: each for path, each in adaptable_layers(model).items() if path.endswith(f".{layer}")}
    known = slices_of(model, layers, {})
    path = list(known)[-1]
    slices = {name: part.outputs for name, part in known[path].items()}
    total = next(iter(slices.values())).total
    covered = torch.cat([part.rows for part in slices.values()])
    assert torch.equal(covered.sort().values, torch.arange(total))
    answers = _Answers(model, path, tiny.inputs())
    straight = "up" if "up" in slices else "v"
    for name, part in slices.items():
        none, once, thrice = (answers.scaled(part.rows, factor) for factor in (0.0, 1.0, 3.0))
        if name == straight:
            assert torch.allclose(thrice - none, 3 * (once - none), rtol=1e-3, atol=1e-4 * float(once.abs().max())), name
        else:
            assert not torch.allclose(thrice - none, 3 * (once - none), rtol=0.05, atol=1e-3 * float(once.abs().max())), name
    if straight == "v":
        elsewhere = answers.from_another_token()
        assert {name for name, part in slices.items() if elsewhere[part.rows].any()} == {"k", "v"}
        assert "q" not in slices or not elsewhere[slices["q"].rows].any()


class _Answers:
    """What the module that holds a fused layer answers, when that layer's outputs are changed."""

    def __init__(self, model: nn.Module, path: str, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.layer, self.owner = (model.get_submodule(each) for each in (path, path.rpartition(".")[0]))

    def _run(self, change: Any) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, answer: Any) -> None:
            found.append(answer if isinstance(answer, Tensor) else answer[0])

        hooks = [self.layer.register_forward_hook(change), self.owner.register_forward_hook(keep)]
        self.model(**self.inputs)
        for hook in hooks:
            hook.remove()
        return found[-1]

    def scaled(self, rows: Tensor, factor: float) -> Tensor:
        def change(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            y = y.clone()
            y[..., rows] *= factor
            return y

        return self._run(change).detach()

    def from_another_token(self) -> Tensor:
        """How much the last token's answer depends on each output for the token before it (or after, where it is the first)."""
        kept: list[Tensor] = []

        def change(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            kept.append(y.detach().requires_grad_())
            return kept[-1]

        answer = self._run(change)
        width = answer.shape[-1]
        answer.reshape(-1, width)[-1].square().sum().backward()
        grad = kept[-1].grad
        assert grad is not None
        other = grad.reshape(-1, grad.shape[-1])[-2]
        return torch.where(other.abs() > 1e-6 * grad.abs().max(), other, 0.0)


# ---- other models' layers, and mistakes ------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = block(x).split([8, 4, 4], -1)
            x = x + torch.tanh(q) * torch.cat([k, v], -1)
        return x


def test_a_layer_of_ones_own_is_declared() -> None:
    bank = attach(Own(), fused={"blocks.*": {"q": 8, "k": 4, "v": 4}})
    bank.add("a", AdapterConfig(rank=2, targets=["q", "blocks.1.v"]))
    assert [key for key, _ in bank.named_parameters("a") if key.endswith(".A")] == [
        "blocks.0.q.A",
        "blocks.1.q.A",
        "blocks.1.v.A",
    ]
    fill(bank, "a")
    x = torch.randn(2, 8)
    with bank.route(["a", BASE]):
        y = bank.model(x)
    assert torch.equal(y[1], bank.detach()(x)[1])
    equal = attach(Own(), fused={"1": ["one", "other"]})
    equal.add("a", AdapterConfig(rank=2, targets=["1.other"]))
    assert equal.adapter("a").layers["blocks.1.other"].outputs == OutputSlice(start=8, width=8, period=16, total=16)


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"block": ["q"]}, "'block' names no linear layer of the model"),
        ({"blocks.*": ["q", "k", "v"]}, "16 outputs, which aren't 3 equal parts"),
        ({"blocks.*": {"q": 8, "k": 4}}, "don't add up to the 16 outputs"),
        ({"blocks.*": "qkv"}, "expected names of projections"),
        ({"blocks.*": ["q", "q"]}, "names of their own"),
        ({"blocks.*": {"q.a": 8, "k": 8}}, "expected names of projections"),
    ],
)
def test_a_wrong_declaration_is_named(fused: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(Own(), fused=fused)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ["c_attn", "q"]}, "names? '.*c_attn' and its slice 'q'"),
        ({"targets": ["c_attn.w"]}, "matches no layer"),
        ({"targets": ["c_atn.q"]}, r"'c_atn\.q' matches no layer of the model \(did you mean 'c_attn\.q'\?\)"),
        ({"targets": ["q"], "rank_pattern": {"v": 2}}, "matches none of the 2 adapted layers"),
        ({"targets": ["q"], "exclude": ["c_attn"]}, "leave no layer"),
    ],
)
def test_wrong_targets_are_named(config: dict[str, Any], message: str) -> None:
    bank = attach(gpt2())
    with pytest.raises(TargetError, match=message):
        bank.add("a", AdapterConfig(**config))
    assert bank.names == ()


def test_whole_roles_and_all_linear_mean_whole_layers() -> None:
    for targets in ("all-linear", ["attention"], ["*.c_attn"], ["re:.*c_attn.*"]):
        bank = attach(gpt2())
        bank.add("a", AdapterConfig(targets=targets))
        assert "transformer.h.0.attn.c_attn" in bank.adapter("a").layers
        assert not any(path.endswith(".q") for path in bank.adapter("a").layers)
    bank = attach(gpt2())
    bank.add("a", AdapterConfig(targets=["q", "v"], exclude=["h.1.attn.c_attn.v"]))
    assert len(bank.adapter("a").layers) == 3


def test_an_adapter_of_other_outputs_is_refused_and_nothing_is_loaded() -> None:
    other = attach(neox())
    add(other, "a", targets=["q"])
    layer = next(iter(other.adapter("a").layers.values()))
    path = "transformer.h.0.attn.c_attn.q"
    bank = attach(gpt2())
    with pytest.raises(AdapterFileError, match=r"c_attn\.q: made for other outputs"):
        bank.load("b", Adapter(config=AdapterConfig(), layers={path: layer}))
    wide = OutputSlice(start=0, width=8, period=24, total=24)
    with pytest.raises(AdapterFileError, match="made for 16 → 24 features"):
        bank.load("b", Adapter(config=AdapterConfig(), layers={path: AdapterLayer(layer.A, layer.B[:8], 1.0, outputs=wide)}))
    assert bank.names == ()
    assert type(bank.model.get_submodule("transformer.h.0.attn.c_attn")).__name__ == "Conv1D"


def test_a_changed_record_is_named(tmp_path: Path) -> None:
    bank = attach(gpt2())
    add(bank, "a", targets=["q", "v"])
    folder = bank.adapter("a").save(tmp_path / "a")
    text = (folder / "lorabank.json").read_text()
    for old, new in (('"rank": 3', '"rank": 4'), ('"start": 32', '"start": 16'), ('"width": 16', '"width": 99')):
        (folder / "lorabank.json").write_text(text.replace(old, new, 3))
        with pytest.raises(AdapterFileError, match="slices of"):
            Adapter.load(folder)


def test_overlapping_slices_are_refused() -> None:
    A, B = torch.randn(2, 16), torch.randn(8, 2)
    parts = {
        name: AdapterLayer(A, B, 1.0, outputs=OutputSlice(start=start, width=8, period=48, total=48))
        for name, start in (("x.q", 0), ("x.k", 4))
    }
    with pytest.raises(AdapterFileError, match="have outputs in common"):
        without_slices(Adapter(config=AdapterConfig(), layers=parts))


def test_removed_slices_give_their_room_back_and_leave_no_gradient() -> None:
    bank = attach(gpt2().eval())
    add(bank, "a", targets=["q"])
    add(bank, "b", targets=["q"])
    bank.remove("a")
    with bank.route(["b", BASE]):
        outputs(bank.model, ids(2)).sum().backward()
    assert all(p.grad is not None for p in bank.parameters("b"))
    clear(bank)
    layer: Any = bank.model.get_submodule("transformer.h.0.attn.c_attn")
    assert [name for name, _ in layer.lora.named_parameters()] == ["q_A_b", "q_B_b"]


def test_a_layers_bias_is_trained_beside_its_slices() -> None:
    bank = attach(make("gpt2"))
    bank.add("a", AdapterConfig(rank=2, targets=["q"], bias="lora_only"))
    names = [key for key, _ in bank.named_parameters("a") if key.startswith("transformer.h.0")]
    assert names == [f"transformer.h.0.attn.c_attn.{part}" for part in ("q.A", "q.B", "bias")]
    fill(bank, "a")
    with torch.no_grad():
        dict(bank.named_parameters("a"))["transformer.h.0.attn.c_attn.bias"].add_(0.5)
    x = ids(2)
    with bank.route(["a", BASE]):
        y = outputs(bank.model, x)
    adapter = bank.adapter("a")
    plain = make("gpt2")
    assert torch.equal(y[1], outputs(plain, x)[1])
    merge(plain, adapter, say=None)
    assert torch.allclose(outputs(plain, x)[0], y[0], atol=1e-5)


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"use_rslora": True, "rank": 4, "alpha": 3, "lora_bias": True}])
def test_a_saved_file_is_read_and_saved_again_as_the_same_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    """A layer's bias is its slices' too; α / √(12 ranks) isn't 1.5 to the bit for any α."""
    bank = attach(make("sliced neox"))
    add(bank, "a", **{"rank": 2, "targets": ["q", "k", "query_key_value.v"], **config})
    x = ids(2)
    with bank.route("a"):
        expected = outputs(bank.model, x)
    again = Adapter.load(bank.adapter("a").save(tmp_path / "a"))
    again.save(tmp_path / "b")
    bank.load("again", again)
    with bank.route("again"):
        assert torch.equal(outputs(bank.model, x), expected)
    bank.adapter("again").save(tmp_path / "c")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1
