"""What a model is while a bank is attached: its keys, copies, moves and hooks, and the paths past it (traps 9, 12, 17)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorabank import BASE, attach
from lorabank.bank.bank import all_layers
from lorabank.bank.layers import LoRALayer
from lorabank.errors import LorabankError, TargetError, UnreachedLayerError
from tests.bank.tiny import MODELS, TorchEncoder, add, ids, llama, make, outputs, state_bytes, two

KINDS = list(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_trap9_the_bases_state_dict_is_unchanged(kind: str) -> None:
    before = state_bytes(make(kind))
    model, bank = two(kind)
    assert list(model.state_dict()) == list(before)
    assert state_bytes(model) == before
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in make(kind).named_buffers()}
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    result = model.load_state_dict(changed)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, changed[key]) for key, value in bank.detach().state_dict().items())


def test_trap9_bank_tensors_are_apart_from_the_bases_and_trainers_find_them() -> None:
    model, bank = two("llama")
    base = {id(p) for name, p in model.named_parameters() if ".lora." not in name}
    leaves = {id(p) for p in bank.parameters()}
    assert not base & leaves
    assert {id(p) for p in model.parameters()} == base | leaves
    assert {id(p) for p in model.parameters() if p.requires_grad} == leaves
    assert "model.layers.0.self_attn.q_proj.lora.A_a" in dict(model.named_parameters())
    assert all(p.dtype == torch.float32 for p in bank.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_trap17_a_deep_copy_or_a_pickle_is_the_plain_base(kind: str) -> None:
    for run_first in (False, True):
        model, bank = two(kind)
        x = ids(2)
        if run_first:
            with bank.route("a"):
                outputs(model, x)
        else:
            assert model._forward_hooks, "a model that still looks out for unreached layers"
        with torch.no_grad():
            expected = outputs(make(kind), x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert not any(isinstance(m, LoRALayer) for m in twin.modules())
            with torch.no_grad():
                assert torch.equal(outputs(twin, x), expected)
        with bank.route("a"), torch.no_grad():
            assert not torch.allclose(outputs(model, x), expected), "the original keeps its adapters"


def test_trap17_save_pretrained_writes_the_base_alone(tmp_path: Path) -> None:
    model, bank = two("llama")
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path / "attached")
    bank.detach().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "attached" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert state_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "attached")) == state_bytes(model)
    shutil.rmtree(tmp_path)


def test_trap17_to_dtype_moves_the_base_and_leaves_adapters_in_fp32() -> None:
    model, bank = two("llama")
    leaves, values = bank.parameters(), [p.detach().clone() for p in bank.parameters()]
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        assert next(model.parameters()).dtype == dtype
        assert all(p.dtype == torch.float32 and p is q for p, q in zip(bank.parameters(), leaves, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(leaves, values, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a move needs a second device")
def test_trap17_a_move_takes_the_adapters_along() -> None:
    model, bank = two("handwritten")
    leaves, mixed = bank.parameters(), ["a", "b", {"a": 0.5, "b": 1.0}]
    bank.use({"a": 0.5, "b": 2.0})
    sticky = outputs(model, ids(3)).detach()
    with bank.route(mixed):
        expected = outputs(model, ids(3))
    expected.sum().backward()
    model.to("cuda")
    assert all(
        p.is_cuda and p is q and p.grad is not None and p.grad.is_cuda for p, q in zip(bank.parameters(), leaves, strict=True)
    )
    torch.testing.assert_close(outputs(model, ids(3).cuda()).cpu(), sticky, rtol=1e-4, atol=1e-4)
    with bank.route(mixed):
        found = outputs(model, ids(3).cuda())
    found.sum().backward()
    torch.testing.assert_close(found.cpu(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_trap17_a_move_that_torch_cant_make_in_place_is_refused() -> None:
    model, bank = two("handwritten")
    before = [p.detach().clone() for p in bank.parameters()]
    with pytest.raises(LorabankError, match=r"can't be moved from cpu to meta. Save them .*and detach"):
        model.to("meta")
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters(), before, strict=True))


def test_attaching_to_weights_that_arent_there_is_an_error() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    bank = attach(model)
    with pytest.raises(LorabankError, match=r"layer '0': its weight is on the meta device: not loaded yet, or offloaded"):
        add(bank, "a")
    assert bank.names == ()


def test_trap12_the_encoder_layers_fast_path_doesnt_bypass_an_adapter() -> None:
    model, bank = two("torch encoder")
    plain = make("torch encoder")
    x = ids(3)
    with torch.no_grad():  # evaluation without gradients is where torch takes its fast path
        expected = outputs(plain, x)
        with bank.route(["a", BASE, "b"]):
            fast = outputs(model, x)
    with bank.route(["a", BASE, "b"]):
        slow = outputs(model, x)
    torch.testing.assert_close(fast, slow.detach())
    torch.testing.assert_close(fast[1], expected[1])
    assert not torch.allclose(fast[0], expected[0])
    assert all(layer.reached for layer in all_layers(bank))


def test_trap12_a_wrapped_layer_that_the_forward_doesnt_reach_is_an_error_until_it_is_settled() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.used(x), self.read.weight)

    def bypassed() -> tuple[nn.Module, Any]:
        model = Bypass()
        bank = attach(model)
        add(bank, "a")
        return model, bank

    model, bank = bypassed()
    for _ in range(2):
        with pytest.raises(
            UnreachedLayerError, match=r"never called 'read' \(Linear\), 'idle' \(Linear\).*exclude.*skip_reach_check"
        ):
            model(torch.ones(1, 4))
    bank.remove("a")
    model(torch.ones(1, 4))  # wrappers without an adapter may rest
    add(bank, "b", targets=["used"])
    model(torch.ones(1, 4))

    model, bank = bypassed()
    bank.skip_reach_check()
    model(torch.ones(1, 4))
    model, bank = bypassed()
    with pytest.raises(UnreachedLayerError):
        bank.check_reached()


def test_a_detached_model_has_no_hook() -> None:
    model, bank = two("handwritten")
    assert model._forward_hooks
    with bank.route("a"):
        outputs(model, ids(1))
    bank.detach()
    assert not model._forward_hooks


def test_a_layer_under_two_names_is_wrapped_at_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.list = nn.ModuleList([self.one, nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.list[1](self.list[0](self.one(x)))

    torch.manual_seed(0)
    model = Shared()
    first, x = model.one, torch.ones(1, 4)
    bank = attach(model)
    add(bank, "a", targets=["one"])
    assert list(bank.adapter("a").layers) == ["one"]
    assert model.one is model.list[0]
    assert isinstance(model.one, LoRALayer)
    changed = model.one(x)
    torch.testing.assert_close(model(x), model.list[1](model.one(changed)))
    bank.detach()
    assert model.one is first
    assert model.list[0] is first


def test_attributes_of_the_layer_are_the_bases() -> None:
    model, _ = two("gpt2")
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, LoRALayer)
    assert layer.nf == 48
    assert layer.weight is layer.base.weight
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        _ = layer.nothing
    replacement = nn.Parameter(torch.zeros_like(layer.weight))  # a tied or reloaded weight is set from outside
    layer.weight = replacement
    assert layer.base.weight is replacement
    assert "slots=['a', 'b']" in repr(model)


def test_a_parametrized_layer_and_a_subclass_with_its_own_forward_are_refused_by_name() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Renamed(nn.Linear):
        pass

    model = nn.Sequential(Scaled(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), Renamed(4, 4))
    bank = attach(model)
    with pytest.raises(TargetError, match=r"0 \(Scaled has a forward or weight of its own\).*1 \(ParametrizedLinear"):
        add(bank, "a")
    with pytest.raises(TargetError, match=r"'0' names 0, which can't be adapted: Scaled"):
        add(bank, "a", targets=["0"])
    add(bank, "a", targets=["2"])  # a subclass that changes nothing is its base class
    add(bank, "b", exclude=["0", "1"])
    assert list(bank.adapter("b").layers) == ["2"]


def test_detach_restores_a_mode_that_changed_meanwhile() -> None:
    model, bank = two("llama")
    model.train()
    bank.detach()
    assert all(m.training for m in model.modules())


def test_a_bank_isnt_copied() -> None:
    _, bank = two("handwritten")
    for way in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LorabankError, match="a bank can't be copied or pickled"):
            way(bank)


def test_a_detached_bank_says_so() -> None:
    model, bank = two("handwritten")
    bank.detach()
    for call in (
        bank.detach,
        lambda: add(bank, "c"),
        lambda: bank.use("a"),
        lambda: bank.parameters("a"),
        lambda: bank.adapter("a"),
    ):
        with pytest.raises(LorabankError, match=r"detached from its model; call lorabank.attach"):
            call()
    again = attach(model)
    add(again, "a")
    assert again.names == ("a",)


def test_attach_refuses_what_it_cant_take() -> None:
    model, _ = two("handwritten")
    with pytest.raises(LorabankError, match=r"this model already has a bank"):
        attach(model)
    with pytest.raises(LorabankError, match=r"a part of this model, '0', belongs to a bank"):
        attach(nn.Sequential(model))
    empty = nn.Sequential(nn.Linear(4, 4))
    first = attach(empty)  # no adapter yet
    with pytest.raises(LorabankError, match=r"already has a bank"):
        attach(empty)
    assert attach(copy.deepcopy(empty)).names == ()  # a copy is a plain model
    first.detach()
    attach(empty)  # nobody holds this one, and it has no adapter: it is gone
    gc.collect()
    again = attach(empty)
    add(again, "a")
    del again  # an adapter keeps its bank
    gc.collect()
    with pytest.raises(LorabankError, match=r"already has a bank"):
        attach(empty)
    with pytest.raises(LorabankError, match=r"expected a torch.nn.Module, got str"):
        attach("gpt2")  # type: ignore[arg-type]
    bank = attach(nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"the model itself is one linear layer"):
        add(bank, "a")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same_results_and_gradients(backend: str) -> None:
    if backend == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler here")
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1).eval()
    bank = attach(model)
    add(bank, "a")
    add(bank, "b", rank=5)
    x, rows = ids(3), ["a", BASE, "b"]
    with bank.route(rows):
        expected = model(input_ids=x, use_cache=False).logits
        expected.square().sum().backward()
    grads = [p.grad.clone() for p in bank.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        model.zero_grad()
        with bank.route(rows):
            y = compiled(input_ids=x, use_cache=False).logits
        y.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for p, g in zip(bank.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)
    with bank.route(["b", "a", BASE]):
        torch.testing.assert_close(compiled(input_ids=x, use_cache=False).logits, model(input_ids=x, use_cache=False).logits)


def test_a_torch_encoder_without_batch_first_still_trains_with_one_route() -> None:
    model = TorchEncoder(batch_first=False)
    bank = attach(model)
    add(bank, "a", targets=["linear1", "linear2", "head"])
    model(ids(3)).sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
