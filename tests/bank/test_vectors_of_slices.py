"""DoRA and lora_B's biases on slices of fused layers: held to plain torch, to PEFT by way of files, and merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from lorabank import BASE, Adapter, AdapterConfig, attach, combine, merge, quantize_base
from lorabank.bank.kinds import layer_kind
from lorabank.errors import AdapterFileError, MergeError, TargetError
from lorabank.formats.adapter import AdapterLayer
from lorabank.formats.convert import convert
from lorabank.formats.slices import without_slices
from tests.bank.tiny import TorchEncoder, add, fill, gpt2, gradients, ids, make, outputs, two

DORA = ["decomposed sliced gpt2", "decomposed sliced neox"]
KINDS = [*DORA, "biased sliced gpt2", "biased sliced neox"]
FILES = ("adapter_model.safetensors", "adapter_config.json", "lorabank.json")
C_ATTN = "transformer.h.0.attn.c_attn"


def _twin(kind: str, adapter: Adapter, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What plain torch makes of the changed weights and biases, and the gradient of each leaf."""
    model = make(kind)
    changed: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    leaves: dict[str, Tensor] = {}

    def leaf(key: str, value: Tensor) -> Tensor:
        leaves[key] = value.clone().requires_grad_()
        return leaves[key]

    for path, bias in adapter.biases.items():
        changed[f"{path}.bias"] = leaf(f"{path}.bias", bias)
    for path, layer in adapter.layers.items():
        A, B = leaf(f"{path}.A", layer.A), leaf(f"{path}.B", layer.B)
        owner = path if layer.outputs is None else path.rpartition(".")[0]
        weight = changed[f"{owner}.weight"]
        weight = weight.T if "gpt2" in kind else weight
        rows = torch.arange(len(weight)) if layer.outputs is None else layer.outputs.rows
        V = weight[rows] + layer.scaling * (B @ A)
        if layer.magnitude is not None:
            V = (leaf(f"{path}.magnitude", layer.magnitude) / V.detach().norm(dim=1))[:, None] * V
        weight = weight.index_copy(0, rows, V)
        changed[f"{owner}.weight"] = weight.T if "gpt2" in kind else weight
        if layer.lora_bias is not None:
            own = layer.scaling * leaf(f"{path}.lora_bias", layer.lora_bias)
            changed[f"{owner}.bias"] = changed[f"{owner}.bias"].index_add(0, rows, own)
    y = functional_call(model, changed, kwargs={"input_ids": x}).logits
    y.square().mean().backward()
    return y.detach(), {key: value.grad for key, value in leaves.items() if value.grad is not None}


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
    assert found.keys() == wanted.keys()
    assert any(key.endswith("q.magnitude" if kind in DORA else "v.lora_bias") for key in found)
    for key, value in wanted.items():
        mine = found[key].T if key.endswith(".B") else found[key]
        assert torch.allclose(mine, value, rtol=1e-3, atol=1e-5 * float(value.abs().max())), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_one_changes_nothing_and_starts_at_its_own_outputs(kind: str) -> None:
    bank, plain, x = attach(make(kind)), make(kind), ids(2)
    bank.add("a", AdapterConfig(rank=2, targets=["q", "v"], use_dora=kind in DORA, lora_bias=kind not in DORA))
    with bank.route("a"):
        assert torch.allclose(outputs(bank.model, x), outputs(plain, x), atol=1e-6)
    for path, layer in bank.adapter("a").layers.items():
        weight = plain.get_submodule(path.rpartition(".")[0]).get_parameter("weight").detach()
        assert layer.outputs is not None
        mine = (weight.T if "gpt2" in kind else weight)[layer.outputs.rows]
        if layer.magnitude is not None:
            assert torch.allclose(layer.magnitude, mine.norm(dim=1))
        else:
            assert layer.lora_bias is not None and not layer.lora_bias.any()


def test_over_a_quantised_layer_they_are_of_the_stored_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.Linear(96, 16))
    assert quantize_base(model, "fp8", say=lambda text: None).layers == ("0",)
    kind = layer_kind(model[0])
    assert kind is not None and kind.quantized
    weight, bias = kind.weight_oi(model[0]._parameters, torch.float32), model[0].get_parameter("bias").detach()
    bank = attach(model, fused={"0": ["q", "k", "v"]})
    bank.add("a", AdapterConfig(rank=2, targets=["0.q", "0.v"], use_dora=True))
    fill(bank, "a")
    x, wanted = torch.randn(3, 32), weight.clone()
    for layer in bank.adapter("a").layers.values():
        assert layer.outputs is not None and layer.magnitude is not None
        rows = layer.outputs.rows
        V = weight[rows] + layer.delta()
        wanted[rows] = (layer.magnitude / V.norm(dim=1))[:, None] * V
    with bank.route(["a", BASE, "a"]):
        y = bank.model.get_submodule("0")(x)
    assert torch.allclose(y[[0, 2]], x[[0, 2]] @ wanted.T + bias, atol=1e-5)
    assert not torch.allclose(y[0], x[0] @ weight.T + bias, atol=1e-2)
    handle = merge(bank.model, bank.adapter("a"), say=None, force=True)
    assert handle.report.layers.keys() == {"0"}


def test_every_mixture_of_whole_sliced_decomposed_and_biased_adapters_adds_up() -> None:
    bank = attach(gpt2().eval())
    add(bank, "whole", targets=["c_attn"], use_dora=True)
    add(bank, "parts", targets=["q", "v"], use_dora=True)
    add(bank, "plain", targets=["k", "v"], lora_bias=True)
    layer, x = bank.model.get_submodule(C_ATTN), torch.randn(5, 3, 16)
    with bank.route(BASE):
        base = layer(x)
    changes = {}
    for name in bank.names:
        with bank.route(name):
            changes[name] = layer(x) - base
    mix = {"whole": 0.5, "parts": -1.0, "plain": 0.3}
    with bank.route([mix, "parts", BASE, "plain", "whole"]):
        mixed = layer(x)
    assert torch.equal(mixed[2], base[2])
    total = base + sum(weight * changes[name] for name, weight in mix.items())
    assert torch.allclose(mixed[0], total[0], atol=1e-5)
    for row, name in ((1, "parts"), (3, "plain"), (4, "whole")):
        assert torch.allclose(mixed[row], (base + changes[name])[row], atol=1e-5)
    assert torch.equal(mixed[1, :, 16:32], base[1, :, 16:32])  # k isn't the slices'
    assert torch.equal(mixed[3, :, :16], base[3, :, :16])


@pytest.mark.parametrize("alpha", [6, 5.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_same_change_in_peft_and_comes_back_as_slices(kind: str, alpha: float, tmp_path: Path) -> None:
    bank = attach(make(kind))
    parts: dict[str, Any] = {"targets": ["q", "v"], "rank_pattern": {"v": 3, "q": 4}, "bias": "lora_only"}
    bank.add("a", AdapterConfig(rank=2, alpha=alpha, use_dora=kind in DORA, lora_bias=kind not in DORA, **parts))
    fill(bank, "a")
    x = ids(3)
    with bank.route("a"):
        expected = outputs(bank.model, x)
    folder = bank.adapter("a").save(tmp_path / "a")
    theirs = PeftModel.from_pretrained(make(kind), str(folder)).eval()
    assert torch.allclose(theirs(input_ids=x).logits, expected, atol=1e-5)

    again = Adapter.load(folder)
    assert {path.rpartition(".")[2] for path in again.layers} == {"q", "v"}
    again.save(tmp_path / "b")
    bank.load("again", again)
    bank.adapter("a").save(tmp_path / "c")
    for file in FILES:
        assert (
            (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
        )
    with bank.route("again"):
        assert torch.allclose(outputs(bank.model, x), expected, atol=1e-6)
    assert [key for key, _ in bank.named_parameters("again")] == [key for key, _ in bank.named_parameters("a")]
    assert convert(folder, tmp_path / "d", "peft").adapter.layers.keys() == again.layers.keys()
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "d" / file).read_bytes()

    (folder / "lorabank.json").unlink()  # what another tool would keep
    bank.load("whole", Adapter.load(folder))
    with bank.route("whole"):
        assert torch.allclose(outputs(bank.model, x), expected, atol=1e-5)


def test_a_file_of_slices_that_lost_the_layers_bias_is_refused() -> None:
    bank = attach(gpt2())
    add(bank, "a", targets=["q", "v"], bias="lora_only")
    adapter = bank.adapter("a")
    assert adapter.biases.keys() == adapter.adapted
    lost = replace(adapter, biases={path: bias for path, bias in adapter.biases.items() if path != C_ATTN})
    with pytest.raises(AdapterFileError, match=r"c_attn\.bias: bias is 'lora_only' and the adapter has none for it"):
        bank.load("b", lost)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_answers_as_unmerged(kind: str) -> None:
    model, bank = two(kind)
    x = ids(3)
    with bank.route("a"):
        expected = outputs(model, x)
    plain = make(kind)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    handle = merge(plain, bank.adapter("a"), say=None, inputs={"input_ids": x})
    assert torch.allclose(outputs(plain, x), expected, atol=1e-5)
    assert handle.logits is not None and handle.logits.difference < 1e-5
    handle.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_merge_leaves_the_other_outputs_as_they_are_stored(dtype: torch.dtype) -> None:
    """Whatever the base was stored in where the adapter was trained: the norms are those of the base at hand."""
    bank = attach(gpt2())
    add(bank, "a", targets=["q", "v"], use_dora=True)
    plain = gpt2().to(dtype)
    weight = plain.get_submodule(C_ATTN).get_parameter("weight")
    before = weight.detach().clone()
    merge(plain, bank.adapter("a"), say=None, force=True)
    changed = weight.detach() != before  # (in, out)
    assert not changed[:, 16:32].any()
    assert changed[:, :16].any()
    assert changed[:, 32:].any()


def test_without_norms_no_other_form_has_them_and_the_bank_makes_them_again(tmp_path: Path) -> None:
    bank = attach(gpt2().eval())
    add(bank, "a", targets=["q", "v"], use_dora=True)
    adapter = bank.adapter("a")
    assert {path: norms.shape for path, norms in adapter.base_norms.items()} == {
        f"transformer.h.{i}.attn.c_attn": (16,) for i in range(2)
    }
    bare = replace(adapter, base_norms={})
    with pytest.raises(AdapterFileError, match=r"c_attn': its slices q, v are .* the norms of the base's other 16 outputs"):
        bare.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    bank.load("b", bare)
    found = bank.adapter("b").base_norms
    assert all(torch.equal(found[path], norms) for path, norms in adapter.base_norms.items())
    merge(gpt2().eval(), bare, say=None, force=True)
    half = adapter.to(dtype=torch.bfloat16)
    assert half.base_norms[C_ATTN].dtype == torch.bfloat16
    add(bank, "all", targets=["q", "k", "v"], use_dora=True)
    assert not bank.adapter("all").base_norms
    bank.adapter("all").save(tmp_path / "all")


def test_slices_of_which_one_is_decomposed_are_no_layer(tmp_path: Path) -> None:
    bank = attach(gpt2().eval())
    add(bank, "a", targets=["q", "v"], use_dora=True)
    adapter = bank.adapter("a")
    layers = {path: replace(layer, magnitude=None) if path.endswith(".v") else layer for path, layer in adapter.layers.items()}
    with pytest.raises(AdapterFileError, match=r"its slice 'q' is decomposed \(DoRA\) and 'v' isn't"):
        replace(adapter, layers=layers).save(tmp_path / "a")


def test_biases_are_combined_and_decomposed_slices_are_not() -> None:
    bank = attach(gpt2().eval())
    add(bank, "whole", targets=["c_attn"], lora_bias=True)
    add(bank, "parts", targets=["q", "v"], lora_bias=True)
    add(bank, "dora", targets=["q", "v"], use_dora=True)
    x = ids(2)
    bank.load("sum", combine([(bank.adapter("whole"), 0.5), (bank.adapter("parts"), 1.0)], method="exact"))
    with bank.route({"whole": 0.5, "parts": 1.0}):
        expected = outputs(bank.model, x)
    with bank.route("sum"):
        assert torch.allclose(outputs(bank.model, x), expected, atol=1e-5)
    with pytest.raises(MergeError, match="is decomposed"):
        combine([(replace(bank.adapter("dora"), base_norms={}), 1.0)], method="exact")


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_slices_of_an_attention_module_have_neither(config: dict[str, Any]) -> None:
    bank = attach(TorchEncoder())
    with pytest.raises(TargetError, match=r"in_proj\.q' is .*nn.MultiheadAttention"):
        bank.add("a", AdapterConfig(targets=["q"], **config))
    assert bank.names == ()


def test_vectors_of_other_outputs_than_the_record_says_are_named(tmp_path: Path) -> None:
    bank = attach(gpt2())
    add(bank, "a", targets=["q", "v"], lora_bias=True)
    adapter = without_slices(bank.adapter("a"))
    layer: AdapterLayer = adapter.layers[C_ATTN]
    assert layer.lora_bias is not None and not layer.lora_bias[16:32].any()
    folder = bank.adapter("a").save(tmp_path / "a")
    stored = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{C_ATTN}.lora_B.bias"]
    assert torch.equal(stored, layer.lora_bias)
    moved = replace(layer, lora_bias=torch.ones(48))
    text = (folder / "lorabank.json").read_text()
    other = replace(adapter, layers={**adapter.layers, C_ATTN: moved}).save(tmp_path / "b")
    own = (other / "lorabank.json").read_text()
    (other / "lorabank.json").write_text(json.dumps({**json.loads(own), "slices": json.loads(text)["slices"]}))
    with pytest.raises(AdapterFileError, match=r"slices of .*c_attn.*a bias of lora_B at outputs that are no slice's"):
        Adapter.load(other)
