"""Bases in fp8 (its definition on a CPU) and in 4 bits: the laws, attached models, and adapters that move between storages."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lorabank as lb
from lorabank import BASE, attach, quantize_base
from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.storages import quantized
from lorabank.bank.storages.fp8_linear import EmulatedFp8Linear, Fp8Linear
from lorabank.bank.storages.quantized import STORAGES, storage_of
from lorabank.errors import ConfigError, FingerprintError, LorabankError, MissingExtraError, TargetError
from lorabank.formats.adapter import Adapter
from lorabank.formats.fingerprint import Fingerprint
from lorabank.kernels import fp8
from lorabank.notices import warn_once
from tests.bank.tiny import VOCABULARY, add, clear, gpt_oss, gradients, ids, llama, mixtral, outputs, state_bytes

EMULATED = "fp8 emulated"
ROUTES = ["a", BASE, "b", {"a": 0.7, "b": -0.4}, BASE, "a"]


@pytest.fixture(params=["fp8", "nf4"])
def storage(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="base_dtype fp8: no fp8 products here")
        yield request.param


@pytest.fixture(params=["fp8", "nf4", EMULATED])
def every_kind(request: pytest.FixtureRequest) -> str:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    return request.param


def base(storage: str | None, seed: int = 0, **sizes: Any) -> nn.Module:
    torch.manual_seed(seed)
    # bitsandbytes' own layer is wrong on a CPU (0.50) where a row isn't a multiple of its block, 64
    model = llama(**{"hidden_size": 64, "intermediate_size": 128, **sizes}).eval()
    if storage is not None:
        quantize_base(model, storage.removesuffix(" emulated"), emulate=storage == EMULATED, say=lambda line: None)
    return model


def bank_over(model: nn.Module) -> AdapterBank:
    bank = attach(model)
    add(bank, "a")
    add(bank, "b", rank=5, alpha=2)
    return bank


def test_every_linear_layer_but_the_head_is_quantised(storage: str) -> None:
    model = base(None)
    plain = {path: module.weight.detach().clone() for path, module in model.named_modules() if type(module) is nn.Linear}
    said: list[str] = []
    report = quantize_base(model, storage, say=said.append)
    assert set(report.layers) == set(plain) - {"lm_head"} and not report.kept
    assert len(said) == (storage == "fp8") and all("dequantises its weight" in line for line in said)
    assert str(report) == f"14 linear layers in {storage}"
    assert storage_of(model) == storage and type(model.lm_head) is nn.Linear
    for path in report.layers:
        x = torch.eye(plain[path].shape[1])
        with torch.no_grad():
            error = model.get_submodule(path)(x).t() - plain[path]
        assert float(error.norm() / plain[path].norm()) < {"fp8": 0.04, "nf4": 0.13}[storage]


def test_law1_a_base_row_is_the_quantised_base_bit_for_bit(every_kind: str) -> None:
    x = ids(6)
    with torch.no_grad():
        expected = outputs(base(every_kind), x)
        model = base(every_kind)
        bank = bank_over(model)
        with bank.route(ROUTES):
            found = outputs(model, x)
        with bank.route(BASE):
            assert torch.equal(outputs(model, x), expected)
    assert torch.equal(found[[1, 4]], expected[[1, 4]])
    assert all(not torch.allclose(found[row], expected[row]) for row in (0, 2, 3, 5))


def test_law1_a_detached_model_is_the_old_model(every_kind: str) -> None:
    model = base(every_kind)
    before, types, x = state_bytes(model), [type(m) for m in model.modules()], ids(3)
    expected = outputs(model, x).detach()
    bank = bank_over(model)
    with bank.route(["a", "b", BASE]):
        outputs(model, x).square().sum().backward()
    bank.detach()
    assert [type(m) for m in model.modules()] == types
    assert state_bytes(model) == before
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("exact", [True, False])
def test_law2_a_mixed_batch_equals_the_separate_batches(storage: str, exact: bool) -> None:
    """Relative to the largest entry: fp32 sums in another order."""
    model = base(storage)
    bank, x = bank_over(model), ids(6)
    results = []
    for batches in ([list(range(6))], [[i] for i in range(6)]):
        clear(bank)
        rows: dict[int, torch.Tensor] = {}
        for batch in batches:
            with bank.route(bank.routing([ROUTES[i] for i in batch], exact=exact)):
                y = outputs(model, x[batch])
            rows.update(zip(batch, y.detach(), strict=True))
            if y.requires_grad:
                y.square().sum().backward()
        results.append({**gradients(bank), "y": torch.stack([rows[i] for i in range(6)])})
    mixed, apart = results
    for key, value in mixed.items():
        assert float((value - apart[key]).abs().max()) <= 2e-5 * float(apart[key].abs().max()), key


def test_the_path_that_may_round_equals_the_exact_one(storage: str) -> None:
    model = base(storage)
    bank, x, found = bank_over(model), ids(6), []
    for exact in (True, False):
        clear(bank)
        with bank.route(bank.routing(ROUTES, exact=exact)):
            y = outputs(model, x)
        y.square().sum().backward()
        found.append({**gradients(bank), "y": y.detach()})
    for key, value in found[0].items():
        # fp8's backward has a weight of its own rounding where it is asked for, on both paths
        assert float((value - found[1][key]).norm() / value.norm()) < 1e-4, key


def test_law4_a_slot_of_nan_stays_alone(every_kind: str) -> None:
    model = base(every_kind)
    bank, x = bank_over(model), ids(4)
    with torch.no_grad(), bank.route(["a", "b", BASE, "a"]):
        clean = outputs(model, x)
        bank.parameters("b")[-1].fill_(float("nan"))
        dirty = outputs(model, x)
    assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]]) and dirty[1].isnan().any()


def test_an_attached_model_has_its_own_state(every_kind: str) -> None:
    model = base(every_kind)
    before, x = state_bytes(model), ids(2)
    expected = outputs(model, x).detach()
    bank = bank_over(model)
    assert state_bytes(model) == before
    assert not [key for key in model.state_dict() if "lora" in key]
    twin = copy.deepcopy(model)
    assert state_bytes(twin) == before and torch.equal(outputs(twin, x), expected)
    if every_kind != "nf4":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = base(every_kind, seed=1)
        other.load_state_dict(torch.load(file))
        assert torch.equal(outputs(other, x), expected)
        model.load_state_dict(base(every_kind, seed=1).state_dict())
        with bank.route(BASE):
            assert not torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize("attached", [False, True])
def test_a_change_of_dtype_leaves_the_quantised_weights(every_kind: str, attached: bool) -> None:
    model = base(every_kind)
    before = [
        module for module in model.modules() if quantized.layer_kind(module) and type(module) not in (nn.Linear, nn.Embedding)
    ]
    stored = [(p, p.dtype) for module in before for p in module.parameters()]
    expected = outputs(model, ids(2)).detach()
    bank = bank_over(model) if attached else None
    model.to(torch.bfloat16)
    assert all(p.dtype == dtype for p, dtype in stored)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    if bank is not None:
        bank.use(BASE)
    found = outputs(model, ids(2)).detach()
    assert float((found.float() - expected).norm() / expected.norm()) < 0.03


def test_the_old_weights_are_freed(storage: str) -> None:
    model = base(None)
    old = [weakref.ref(m) for m in model.modules() if type(m) is nn.Linear and m is not model.lm_head]
    weights = [weakref.ref(m().weight) for m in old]  # type: ignore[union-attr]
    quantize_base(model, storage, say=lambda line: None)
    assert not any(ref() is not None for ref in (*old, *weights))


def test_an_adapter_moves_between_storages(storage: str, tmp_path: Path) -> None:
    bank = bank_over(base(storage))
    adapter = bank.adapter("a")
    assert adapter.metadata == {"base_storage": storage}
    adapter.save(tmp_path / "a")
    read = Adapter.load(tmp_path / "a")
    read.save(tmp_path / "again")
    assert all((tmp_path / "again" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "a").iterdir())
    for other in (None, "fp8"):
        same = contextlib.nullcontext() if other == storage else pytest.warns(UserWarning, match=f"over a base in {storage}")
        with same:
            attach(base(other)).load("a", read)
        fresh = attach(base(other))
        add(fresh, "plain")
        told = (
            pytest.warns(UserWarning, match=f"over a base in {other}")
            if other not in (None, storage)
            else contextlib.nullcontext()
        )
        with told:
            bank.load(f"from-{other}", fresh.adapter("plain"))
        with pytest.raises(FingerprintError):
            attach(base(other, seed=1)).load("a", read)
    assert bank_over(base(None)).adapter("a").metadata == {}


def test_the_fingerprint_leaves_the_quantised_weights_out(storage: str) -> None:
    names = set(Fingerprint.of(base(storage)).tensors)
    assert names and not [name for name in names if "proj" in name]
    assert names <= {*Fingerprint.of(base(None)).tensors, "lm_head.weight"}


def test_the_summary_counts_weights_and_not_their_storage(storage: str) -> None:
    sizes = [bank_over(base(kind)).summary().base_parameters for kind in (None, storage)]
    assert sizes[0] == sizes[1]


def test_training_moves_the_loss_as_over_the_plain_base(storage: str) -> None:
    x, curves = ids(4, tokens=12), []
    for kind in (None, storage):
        model = base(kind)
        bank = attach(model)
        bank.add("a", lb.AdapterConfig(rank=8, alpha=16, targets="*"), seed=3)
        optimizer = torch.optim.AdamW(bank.parameters("a"), lr=3e-3)
        curve = []
        for _ in range(30):
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    plain, found = curves
    assert plain[-1] < 0.5 * plain[0]
    assert found == pytest.approx(plain, rel={"fp8": 0.02, "nf4": 0.1}[storage])


def test_an_emulated_base_trains_through_the_emulated_products() -> None:
    """The inputs are rounded below an adapter too, forward and backward, on the exact path and on the one that may round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64))
    weight = model[0].weight.detach().clone()
    quantize_base(model, "fp8", emulate=True, say=lambda line: pytest.fail(line))
    assert type(model[0]) is EmulatedFp8Linear and storage_of(model) == "fp8"
    bank = attach(model)
    bank.add("a", lb.AdapterConfig(rank=4, targets="*"))  # its B is zero: y and dx are the base's
    stored, x, dy = fp8.quantize_weight(weight), torch.randn(3, 32, requires_grad=True), torch.randn(3, 64)
    bias = model[0].bias
    for exact in (True, False):
        x.grad = None
        with bank.route(bank.routing(["a"] * 3, exact=exact)):
            y = model(x)
        y.backward(dy)
        assert torch.equal(y, fp8.emulated_forward(x, stored, bias))
        assert x.grad is not None and torch.equal(x.grad, fp8.emulated_input_grad(dy, stored))
    assert not torch.equal(y, fp8.forward(x, stored, bias)) and bank.adapter("a").metadata == {"base_storage": "fp8"}


def test_an_emulated_layer_stays_out_of_compiled_blocks() -> None:
    """Their products are picked by the storage, fp8, and would not be the emulated ones."""
    fusable = []
    for storage in ("fp8", EMULATED):
        bank = bank_over(base(storage))
        fusable.append({layer.fusable for layer in all_layers(bank) if isinstance(layer.base, Fp8Linear)})
    assert fusable == [{True}, {False}]


def test_gpt2s_turned_weights_are_quantised_too(storage: str) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=64)).eval()
    x = ids(3)
    plain = outputs(model, x).detach()
    report = quantize_base(model, storage, say=lambda line: None)
    assert len(report.layers) == 8
    bank = bank_over(model)
    with torch.no_grad(), bank.route(BASE):
        found = outputs(model, x)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2
    assert {(layer.store.in_features, layer.store.out_features) for layer in all_layers(bank)} == {
        (64, 192),
        (64, 64),
        (64, 256),
        (256, 64),
    }


def test_sizes_that_fp8_units_dont_take_stay_and_are_counted() -> None:
    model, said = base(None, intermediate_size=120), []
    report = quantize_base(model, "fp8", say=said.append)
    assert len(report.layers) == 8
    assert set(report.kept.values()) == {"their sizes aren't multiples of 32"} and len(report.kept) == 6
    assert said[-1] == (
        "6 linear layers are not kept in fp8: 6 because their sizes aren't multiples of 32 (model.layers.0.mlp.gate_proj for one)"
    )
    bank_over(model)


@pytest.mark.parametrize("make_model", [mixtral, gpt_oss])
def test_stacked_experts_stay_and_are_told(make_model: Any) -> None:
    model = make_model()
    said: list[str] = []
    report = quantize_base(model, "fp8", say=said.append)
    stacks = {path for path, why in report.kept.items() if why == "they are stacked experts, which stay in the model's dtype"}
    assert {path.rpartition(".")[2] for path in stacks} == {"gate_up_proj", "down_proj"}
    assert "2 because they are stacked experts" in said[-1]


def test_shared_and_hooked_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    model[2].register_forward_hook(lambda *_: None)
    report = quantize_base(model, "fp8", say=lambda line: None)
    assert report.layers == ("3",)
    assert report.kept == {
        "0": "their weight is shared with another layer",
        "1": "their weight is shared with another layer",
        "2": "they carry hooks",
    }


def test_a_layer_that_stands_at_two_places_stays_one() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    model.append(model[0])
    quantize_base(model, "fp8", say=lambda line: None)
    assert isinstance(model[0], Fp8Linear) and model[0] is model[2]


def test_a_gpu_without_fp8_keeps_the_base_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "missing", lambda device: "NVIDIA A100 has compute capability 8.0; they need 8.9 or newer")
    monkeypatch.setattr(quantized.torch, "device", torch.device)
    warn_once.cache_clear()
    assert quantized._fp8(torch.device("cuda"), lambda line: None) is None
    monkeypatch.setitem(STORAGES, "fp8", lambda device, say: quantized._fp8(torch.device("cuda"), say))  # type: ignore[arg-type]
    with pytest.warns(
        UserWarning, match=r"base_dtype fp8: no fp8 products on this GPU \(NVIDIA A100 .*stays as it is. nf4 saves"
    ):
        model = llama()
        report = quantize_base(model, "fp8")
    assert report.layers == () and storage_of(model) is None and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    quantize_base(model, "fp8")  # and not again
    warn_once.cache_clear()


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"can't quantise to 'fp9' \(did you mean 'fp8'\?\). There are: fp8, nf4"):
        quantize_base(llama(), "fp9")
    with pytest.raises(ConfigError, match=r"Embedding has no linear layer to keep in fp8. Leave base_dtype out"):
        quantize_base(nn.Embedding(4, 4), "fp8")
    with pytest.raises(ConfigError, match=r"emulate is for fp8, whose units round the inputs; nf4 needs none. Leave it out"):
        quantize_base(llama(), "nf4", emulate=True)
    model = base("fp8")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no linear layer to keep in fp8: it is in fp8 already"):
        quantize_base(model, "fp8", say=lambda line: None)
    bank = attach(base(None))
    with pytest.raises(LorabankError, match=r"this model has a bank. Detach it first"):
        quantize_base(bank.model, "fp8")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(LorabankError, match=r"quantize_base: 0.weight is on the meta device"):
        quantize_base(empty, "fp8")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"nf4: needs 'bitsandbytes'.*pip install 'lorabank\[nf4\]', or use fp8 or bf16"):
        quantize_base(llama(), "nf4")


def linear4bit(quant_type: str, *, nested: bool, bias: bool = True, storage: torch.dtype = torch.uint8) -> nn.Module:
    """As transformers makes one."""
    library = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes isn't installed")
    torch.manual_seed(0)
    plain = nn.Linear(64, 128, bias=bias)
    options = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    layer = library.Linear4bit(64, 128, bias=bias, compute_dtype=torch.float32, **options)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_linear4bit_of_somebody_elses_is_attached_as_it_is(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    layer = linear4bit(quant_type, nested=nested, storage=storage)
    model = nn.Sequential(layer, nn.Linear(128, 128)).train()
    x = torch.randn(6, 3, 64, requires_grad=True)
    expected = model(x).detach()
    bank = bank_over(model)
    assert {part.kind.storage for part in all_layers(bank)} == {quant_type, "linear"}
    found = []
    for exact in (True, False):
        clear(bank)
        with bank.route(bank.routing(["a", BASE, "b", "a", BASE, "b"], exact=exact)):
            y = model(x)
        y.square().sum().backward()
        found.append((y.detach(), gradients(bank)))
    assert torch.equal(found[0][0][[1, 4]], expected[[1, 4]])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-3, atol=1e-3)
    assert list(model.state_dict()) == list(bank.detach().state_dict())


def test_a_linear4bit_that_cant_be_adapted_says_why() -> None:
    library = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes isn't installed")
    fresh = nn.Sequential(library.Linear4bit(64, 128, quant_type="nf4")).requires_grad_(False)
    with pytest.raises(TargetError, match=r"0 \(Linear4bit is not quantised yet: move the model to its device first\)"):
        add(attach(fresh), "a")
    layer = linear4bit("nf4", nested=True)
    layer.weight.quant_state.state2.blocksize = 128
    with pytest.raises(
        TargetError, match=r"0 \(Linear4bit has its factors quantised in blocks of 128, bitsandbytes' are of 256\)"
    ):
        add(attach(nn.Sequential(layer)), "a")
    layer = linear4bit("nf4", nested=False)
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes does in the first forward pass on some CPUs
    with pytest.raises(LorabankError, match=r"repacked for inference on a CPU.*attach to it before its first forward pass"):
        add(attach(nn.Sequential(layer)), "a")
