"""Inits from spectra and data: what they are, that the shared base never changes, and real PEFT beside them."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel

import lorabank as lb
from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.kinds import layer_kind
from lorabank.bank.layers import LoRALayer
from lorabank.bank.leading import leading
from lorabank.bank.starts.frozen import FrozenPart
from lorabank.bank.starts.pca import PrincipalComponents
from lorabank.engine.batch import make_batch
from lorabank.engine.state import EngineState, load_state, save_state
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.errors import AdapterFileError, CheckpointError, ConfigError, DataError, ModelError, TargetError
from lorabank.formats.adapter import Adapter
from lorabank.formats.vllm import vllm_adapter
from lorabank.optim.slot_optimizer import SlotOptimizer
from tests.bank.tiny import VOCABULARY, add, clear, fill, gradients, ids, llama, make, outputs, state_bytes, two

DIFFERENCES = ("pissa", "pissa_niter_4", "olora")
ZERO = (*DIFFERENCES, "orthogonal")
"""Those that change nothing at first though B isn't zero."""


def config(init: str, **more: Any) -> lb.AdapterConfig:
    return lb.AdapterConfig(**{"rank": 4, "alpha": 6.0, "init": init, **more})


def batches(count: int = 1, tokens: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(4, tokens, seed), "attention_mask": torch.ones(4, tokens)} for seed in range(count)]


def attached(init: str, model: str = "llama", **more: Any) -> tuple[nn.Module, AdapterBank]:
    base = make(model)
    bank = lb.attach(base)
    made = config(init, **more)
    bank.add("a", lb.eva(bank, batches(), made) if init == "eva" else made)
    return base, bank


def loss_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs(model, input_ids)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


def step_by_hand(bank: AdapterBank, model: nn.Module, steps: int = 1, name: str = "a", rate: float = 0.5) -> list[float]:
    losses = []
    for step in range(steps):
        clear(bank)
        with bank.route(name):
            loss = loss_of(model, ids(3, 8, step))
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in bank.parameters(name):
                p -= rate * p.grad  # type: ignore[operator]
    clear(bank)
    return losses


# ---- what they are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2", "handwritten"])
@pytest.mark.parametrize("init", ZERO)
def test_it_changes_nothing_at_first_and_never_the_base(init: str, model: str) -> None:
    base = make(model)
    before, plain = state_bytes(base), outputs(base, ids(3))
    _, bank = attached(init, model)
    base = bank.model
    with bank.route("a"):
        torch.testing.assert_close(outputs(base, ids(3)), plain, rtol=1e-5, atol=1e-5)
    assert all(p.any() for p in bank.parameters("a")), "A and B both begin at something"
    if model == "llama":
        step_by_hand(bank, base, 2, rate=20.0)
    else:
        fill(bank, "a")
    with bank.route("a"):
        assert not torch.allclose(outputs(base, ids(3)), plain, atol=1e-3)
    assert state_bytes(base) == before
    assert torch.equal(outputs(bank.detach(), ids(3)), plain)


def test_pissa_is_the_largest_part_of_the_weight() -> None:
    model, bank = attached("pissa")
    for path, layer in bank.adapter("a").layers.items():
        U, S, Vh = torch.linalg.svd(model.get_submodule(path).get_parameter("weight"))
        start = layer.scaling * layer.B[:, :4] @ layer.A[:4]
        torch.testing.assert_close(start, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.A[:4].norm(dim=1), (S[:4] / layer.scaling).sqrt())
        torch.testing.assert_close(layer.B[:, :4].norm(dim=0), (S[:4] / layer.scaling).sqrt())


def test_olora_is_the_start_of_a_qr_decomposition() -> None:
    model, bank = attached("olora")
    for path, layer in bank.adapter("a").layers.items():
        Q, R = torch.linalg.qr(model.get_submodule(path).get_parameter("weight"))
        assert torch.equal(layer.A[:4], R[:4])
        assert torch.equal(layer.B[:, :4], Q[:, :4])


def test_fast_pissa_nears_the_exact_one_with_its_iterations() -> None:
    def distance(init: str) -> float:
        deltas = []
        for name in (init, "pissa"):
            _, bank = attached(name)
            layers = bank.adapter("a").layers.values()
            deltas.append(torch.cat([(layer.B[:, :4] @ layer.A[:4]).flatten() for layer in layers]))
        return float((deltas[0] - deltas[1]).norm() / deltas[1].norm())

    few, many = distance("pissa_niter_1"), distance("pissa_niter_40")
    assert 10 * many < few  # random weights: their singular values hardly fall, real ones' do


def test_orthogonal_starts_in_two_halves_at_right_angles() -> None:
    _, bank = attached("orthogonal")
    for layer in bank.adapter("a").layers.values():
        assert layer.rank == 4
        assert float((layer.B @ layer.A).abs().max()) < 1e-6
        assert torch.linalg.matrix_rank(layer.A) == torch.linalg.matrix_rank(layer.B) == 2


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_leading_is_the_start_of_an_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = leading(matrix, 3)
    expected = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(S, expected.S[:3])
    torch.testing.assert_close(U * S @ Vh, expected.U[:, :3] * expected.S[:3] @ expected.Vh[:3])
    torch.testing.assert_close(Vh @ Vh.t(), torch.eye(3), atol=1e-5, rtol=0)
    thin = matrix[:, :1] @ matrix[:1]
    U, S, Vh = leading(thin, 3)
    assert S[1:].tolist() == [0.0, 0.0], "a value that isn't there is zero, and no NaN"
    torch.testing.assert_close(U * S @ Vh, thin)


# ---- PEFT beside them ---------------------------------------------------------------------------------------------------


def peft_model(base: nn.Module, init: str, rho: float = 2.0) -> nn.Module:
    more: dict[str, Any] = {"eva_config": peft.EvaConfig(rho=rho)} if init == "eva" else {}
    more["fan_in_fan_out"] = isinstance(base, GPT2LMHeadModel)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, **more)
    model = peft.get_peft_model(base, settings, low_cpu_mem_usage=init == "eva")
    if init == "eva":
        peft.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    return model.eval()


def their_leaves(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            path, _, role = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.{role[0]}"] = p
    return found


@pytest.mark.parametrize(
    ("init", "kind"), [("pissa", "llama"), ("olora", "llama"), ("eva", "llama"), ("pissa", "gpt2"), ("eva", "gpt2")]
)
def test_peft_starts_and_trains_the_same(init: str, kind: str) -> None:
    """Linear layers, and GPT-2's `Conv1D`: PEFT has no others. Its OLoRA of a `Conv1D` is that of the transposed weight."""
    mine, bank = attached(init, kind)
    theirs = peft_model(make(kind), init)
    leaves, other = dict(bank.named_parameters("a")), their_leaves(theirs)
    assert leaves.keys() == other.keys()
    signs = {}
    for key, A in leaves.items():
        if key.endswith(".A"):
            path = key.removesuffix(".A")
            assert A.shape == other[key].shape, key
            signs[path] = sign = (A * other[key]).sum(1).sign()
            torch.testing.assert_close(sign[:, None] * A, other[key], rtol=1e-3, atol=2e-5)
            torch.testing.assert_close(sign * leaves[f"{path}.B"].t(), other[f"{path}.B"], rtol=1e-3, atol=2e-5)
    optimizer = torch.optim.SGD(other.values(), lr=0.5)
    for step in range(4):
        clear(bank)
        with bank.route("a"):
            loss = loss_of(mine, ids(3, 8, step))
        their_loss = loss_of(theirs, ids(3, 8, step))
        optimizer.zero_grad()
        loss.backward()
        their_loss.backward()
        torch.testing.assert_close(loss, their_loss, rtol=2e-5, atol=2e-5)
        for path, sign in signs.items():
            dA, dB = leaves[f"{path}.A"].grad, leaves[f"{path}.B"].grad
            assert dA is not None and dB is not None
            scale = float(other[f"{path}.B"].grad.abs().max())  # type: ignore[union-attr]
            torch.testing.assert_close(sign[:, None] * dA, other[f"{path}.A"].grad, rtol=2e-3, atol=2e-3 * scale)
            torch.testing.assert_close(sign * dB.t(), other[f"{path}.B"].grad, rtol=2e-3, atol=2e-3 * scale)
        optimizer.step()
        with torch.no_grad():
            for p in bank.parameters("a"):
                p -= 0.5 * p.grad  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "what", "error"),
    [
        ("pictures", {"target_modules": ["blocks.0"]}, (ValueError, "Unknown initialization")),
        ("torch encoder", {"target_modules": ["self_attn"]}, (AttributeError, "no attribute 'weight'")),
        (
            "mixtral",
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
            (AttributeError, "no attribute 'weight'"),
        ),
        ("handwritten", {"target_modules": ["embed"]}, None),
    ],
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_peft_has_no_such_start_for_other_layers(
    init: str, kind: str, what: dict[str, Any], error: tuple[type[Exception], str] | None
) -> None:
    """What is refused here by name (or, on attention modules, done) fails there, or is the plain start without a word."""
    settings = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, **what)
    if error is not None:
        with pytest.raises(error[0], match=error[1]):
            peft.get_peft_model(make(kind), settings)
        return
    leaves = [p for p in peft.get_peft_model(make(kind), settings).parameters() if p.requires_grad]
    assert [bool(p.any()) for p in leaves] == [False, True]


@pytest.mark.parametrize("said", ["pissa", "pissa_niter_16", "olora", "orthogonal"])
def test_a_lora_config_of_peft_is_understood(said: str) -> None:
    bank = lb.attach(make("llama"))
    bank.add("a", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=said))
    assert bank.config("a").init == said


def test_sections_that_peft_fills_in_are_understood_and_others_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it fills the section in
        plain = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva")
    start = lb.eva(make("llama"), batches(), plain)
    assert start.config.init == "eva" and sum(len(A) for A in start.A.values()) == 4 * 14
    whitened = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig(whiten=True))
    with pytest.raises(ConfigError, match=r"LoraConfig\.eva_config"):
        lb.eva(make("llama"), batches(), whitened)


# ---- the laws -----------------------------------------------------------------------------------------------------------


def with_a_difference(seed: int = 0) -> tuple[nn.Module, AdapterBank]:
    model, bank = two("llama", seed)
    bank.add("p", config("pissa"))
    bank.add("o", config("olora", rank=2))
    for name in ("p", "o"):
        fill(bank, name)
    return model, bank


def test_a_mixed_batch_is_the_separate_batches() -> None:
    model, bank = with_a_difference()
    routes = ["p", "a", lb.BASE, "o", "p", {"o": 0.5, "b": -0.3}]
    x, dy = ids(6), torch.randn(6, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    with bank.route(routes):
        y = outputs(model, x)
    y.backward(dy)
    joint = gradients(bank)
    clear(bank)
    for row, route in enumerate(routes):
        with bank.route([route]):
            alone = outputs(model, x[row : row + 1])
        torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-5, atol=2e-5)
        if alone.requires_grad:
            alone.backward(dy[row : row + 1])
    for key, gradient in gradients(bank).items():
        torch.testing.assert_close(joint[key], gradient, rtol=1e-4, atol=1e-4, msg=key)
    with bank.route(lb.BASE):
        base = outputs(model, x[2:3])
    torch.testing.assert_close(y[2:3], base, rtol=1e-5, atol=1e-5)


def test_dropout_is_the_same_for_both_parts() -> None:
    """At its start the change is zero under any mask, if both parts have the same one."""
    losses = {}
    for init in ("uniform", "pissa"):
        model = make("llama")
        bank = lb.attach(model)
        bank.add("a", config(init, dropout=0.5))
        rows = [(row.tolist(), [1.0] * 8) for row in ids(3, 8)]
        losses[init] = forward_backward(Engine(bank), make_batch(rows, "a"), steps={"a": 3})["a"].mean
        if init == "pissa":
            masked = bank.parameters("a")[0].grad
            forward_backward(Engine(bank), make_batch(rows, "a"), steps={"a": 4})
            assert masked is not None and not torch.equal(masked * 2, bank.parameters("a")[0].grad), "masks were drawn"  # type: ignore[arg-type]
    assert losses["pissa"] == pytest.approx(losses["uniform"], abs=2e-6)


def test_what_it_started_from_is_nobodys_parameter_and_never_changes() -> None:
    model, bank = attached("pissa")
    frozen = {key: tensor.clone() for key, tensor in bank.frozen_tensors("a")}
    leaves = dict(bank.named_parameters("a"))
    assert frozen.keys() == leaves.keys()
    assert sum(p.requires_grad for p in model.parameters()) == len(leaves)
    step_by_hand(bank, model, 3)
    for key, tensor in bank.frozen_tensors("a"):
        assert torch.equal(tensor, frozen[key]) and not tensor.requires_grad
        assert not torch.equal(tensor, leaves[key])
    assert bank.summary().adapters["a"].parameters == sum(p.numel() for p in leaves.values())


def test_a_nan_stays_in_its_rows_and_removal_frees_it() -> None:
    model, bank = with_a_difference()
    with torch.no_grad():
        dict(bank.named_parameters("p"))["model.layers.1.mlp.down_proj.A"][0, 0] = float("nan")
    with bank.route(["p", lb.BASE, "a", "o"]):
        y = outputs(model, ids(4))
    assert not y[0].isfinite().all()
    assert y[1:].isfinite().all()
    kept = [weakref.ref(tensor) for _, tensor in bank.frozen_tensors("p")]
    del y
    bank.remove("p")
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_it_moves_with_its_layer() -> None:
    part = FrozenPart(torch.ones(2, 3), torch.ones(2, 5))
    part.to(torch.device("meta"))
    assert part.A_RI.is_meta and part.B_RO.is_meta
    model, bank = attached("pissa")
    model.to(torch.float64)
    assert all(tensor.dtype == torch.float32 for _, tensor in bank.frozen_tensors("a")), "adapters keep their dtype"


def test_a_compiled_block_leaves_the_layer_to_itself() -> None:
    _, bank = attached("pissa")
    for layer in all_layers(bank):
        assert isinstance(layer, LoRALayer)
        assert layer.alone == "an adapter there is a difference from where it started"
        assert not layer.fusable


def trained(bank: AdapterBank, steps: range, optimizer: SlotOptimizer) -> None:
    engine = Engine(bank)
    for step in steps:
        rows = [(row.tolist(), [1.0] * 8) for row in ids(2, 8, step)]
        losses = forward_backward(engine, make_batch(rows, "a"), steps={"a": step})
        optim_step(optimizer, {"a": 1e-2}, {"a": losses["a"].tokens})


def test_a_checkpoint_goes_on_with_the_same_bytes() -> None:
    def fresh() -> tuple[AdapterBank, SlotOptimizer]:
        bank = lb.attach(make("llama"))
        bank.add("a", config("pissa", dropout=0.3))
        optimizer = SlotOptimizer(bank)
        optimizer.add("a")
        return bank, optimizer

    whole, optimizer = fresh()
    trained(whole, range(2), optimizer)
    state = save_state(whole, optimizer)
    trained(whole, range(2, 4), optimizer)
    resumed, optimizer = fresh()
    for _, tensor in resumed.frozen_tensors("a"):
        tensor.mul_(0.9)  # as another machine's rounding would have it: the checkpoint's must take its place
    load_state(resumed, optimizer, state)
    trained(resumed, range(2, 4), optimizer)
    for one, other in (
        (whole.named_parameters("a"), resumed.named_parameters("a")),
        (whole.frozen_tensors("a"), resumed.frozen_tensors("a")),
    ):
        for (key, left), (_, right) in zip(one, other, strict=True):
            assert torch.equal(left, right), key
    short = {key: value for key, value in state.tensors.items() if not key.endswith("frozen/model.layers.0.self_attn.q_proj.A")}
    with pytest.raises(
        CheckpointError, match=r"adapter 'a', frozen model.layers.0.self_attn.q_proj.A: expected shape \(4, 16\), got none"
    ):
        load_state(resumed, optimizer, EngineState(tensors=short, values=state.values))


def test_a_restart_is_the_start() -> None:
    for init in ("pissa", "eva", "uniform"):
        model, bank = attached(init)
        before = {key: p.detach().clone() for key, p in bank.named_parameters("a")}
        step_by_hand(bank, model)
        bank.restart("a")
        assert all(torch.equal(p, before[key]) for key, p in bank.named_parameters("a"))


# ---- files --------------------------------------------------------------------------------------------------------------


def test_its_file_is_a_plain_adapter_of_twice_the_rank(tmp_path: Path) -> None:
    model, bank = attached("pissa", use_rslora=False)
    step_by_hand(bank, model, 2)
    with bank.route("a"):
        expected = outputs(model, ids(3))
    bank.adapter("a").save(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 12, True)
    theirs = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(outputs(theirs, ids(3)), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "a" / "lorabank.json").unlink()
    plain = lb.attach(make("llama"))
    plain.load("a", Adapter.load(tmp_path / "a"))
    with plain.route("a"):
        torch.testing.assert_close(outputs(plain.model, ids(3)), expected, rtol=1e-5, atol=1e-5)
    assert all(p.shape[0] == 8 for p in plain.parameters("a")), "all of it trains"
    assert not list(plain.frozen_tensors("a"))


def test_our_own_file_goes_on_as_before(tmp_path: Path) -> None:
    model, bank = attached("olora", use_rslora=True)
    step_by_hand(bank, model, 2)
    bank.adapter("a").save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.num_parameters == sum(p.numel() for p in bank.parameters("a"))
    loaded.save(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    other = lb.attach(make("llama"))
    other.load("a", loaded)
    step_by_hand(bank, model, 2)
    step_by_hand(other, other.model, 2)
    assert other.config("a") == bank.config("a")
    for (key, left), (_, right) in zip(bank.named_parameters("a"), other.named_parameters("a"), strict=True):
        assert torch.equal(left, right), key


def test_it_can_be_written_for_vllm_and_combined() -> None:
    _, bank = attached("pissa", rank_pattern={"q_proj": 2})
    adapter = bank.adapter("a")
    folded = vllm_adapter(adapter)
    assert {layer.rank for layer in folded.layers.values()} == {8}
    both = lb.combine([(adapter, 1.0), (adapter, -1.0)], "exact")
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(folded.layers[path].delta(), layer.delta(), rtol=1e-4, atol=1e-6)
        assert float(both.layers[path].delta().abs().max()) < 1e-6


def test_merged_equals_unmerged() -> None:
    model, bank = attached("pissa")
    step_by_hand(bank, model, 2)
    with bank.route("a"):
        expected = outputs(model, ids(3))
    adapter = bank.adapter("a")
    base = make("llama")
    lb.merge(base, adapter, say=None)
    torch.testing.assert_close(outputs(base, ids(3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("said", ["half", "most"])
def test_a_mark_that_cant_be_is_refused(said: str, tmp_path: Path) -> None:
    bank = lb.attach(make("llama"))
    bank.add("a", config("uniform", rank=3))
    bank.adapter("a").save(tmp_path / "a")
    own = json.loads((tmp_path / "a" / "lorabank.json").read_text())
    own["metadata"]["frozen_ranks"] = said
    (tmp_path / "a" / "lorabank.json").write_text(json.dumps(own))
    with pytest.raises(AdapterFileError, match="odd rank 3" if said == "half" else "it says 'most'|odd rank 3"):
        Adapter.load(tmp_path / "a")


# ---- EVA ----------------------------------------------------------------------------------------------------------------


def test_eva_shares_its_ranks_out_and_keeps_the_scaling() -> None:
    model = make("llama")
    with torch.no_grad():  # most of what the first block's attention reads lies in four directions
        model.get_parameter("model.layers.0.input_layernorm.weight")[:4] *= 20
    bank = lb.attach(model)
    bank.add("a", lb.eva(bank, batches(), config("eva")))
    layers = bank.adapter("a").layers
    ranks = {path: layer.rank for path, layer in layers.items()}
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    for layer in layers.values():
        assert layer.scaling == pytest.approx(6 / 4)
        torch.testing.assert_close(layer.A @ layer.A.t(), torch.eye(layer.rank), atol=1e-4, rtol=0)
        assert not layer.B.any()
    even = lb.eva(make("llama"), batches(), config("eva"), rho=1.0)
    assert {len(A) for A in even.A.values()} == {4}
    assert even.config == config("eva")


def test_eva_in_batches_comes_to_the_components_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 8, generator=generator) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1]) + 2
    whole, parts = PrincipalComponents(3), PrincipalComponents(3)
    whole.add(rows)
    for part in rows.split(13):
        parts.add(part)
    centred = rows - rows.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(whole.shares, (S[:3].double() ** 2 / S.double().square().sum()), rtol=1e-5, atol=0)
    for found in (whole, parts):
        torch.testing.assert_close((found.directions * Vh[:3]).sum(1).abs(), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(parts.shares, whole.shares, rtol=1e-3, atol=0)


def test_eva_counts_the_tokens_that_are_trained_alone() -> None:
    full = batches()[0]
    padded = {
        "input_ids": torch.cat([full["input_ids"], torch.full((4, 3), 7)], 1),
        "attention_mask": torch.cat([full["attention_mask"], torch.zeros(4, 3)], 1),
    }
    labels = padded["input_ids"].clone()
    labels[:, 12:] = -100
    one = lb.eva(make("llama"), [full], config("eva"))
    for batch in (padded, {"input_ids": padded["input_ids"], "labels": labels}):
        other = lb.eva(make("llama"), [batch], config("eva"))
        assert one.config == other.config
        for path, A in one.A.items():
            torch.testing.assert_close((A * other.A[path]).sum(1).abs(), torch.ones(len(A)), atol=1e-3, rtol=0)


def test_eva_leaves_the_model_as_it_was_and_says_what_is_missing() -> None:
    model = make("llama").train()
    model.get_submodule("model.layers.1").eval()
    bank = lb.attach(model)
    add(bank, "other")
    modes = [module.training for module in model.modules()]
    start = lb.eva(bank, batches(), config("eva"))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    alone = lb.eva(make("llama"), batches(), config("eva"))
    assert start.config == alone.config, "adapters that are there already don't change what it sees"
    with pytest.raises(DataError, match=r"needs more than 8 tokens that count \(rank · rho\), and there were 4"):
        lb.eva(bank, batches(1, 1), config("eva"))
    with pytest.raises(DataError, match="no batch was given"):
        lb.eva(bank, [], config("eva"))
    with pytest.raises(ConfigError, match="rho: expected a number > 0, got 0"):
        lb.eva(bank, batches(), config("eva"), rho=0)


# ---- LoftQ --------------------------------------------------------------------------------------------------------------


def quantised(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A base in fp8 as its units compute, and the model it was made of."""
    torch.manual_seed(seed)
    original = llama(hidden_size=64, intermediate_size=128).eval()
    base = copy.deepcopy(original)
    lb.quantize_base(base, "fp8", emulate=True, say=lambda line: None)
    return base, original


def test_loftq_gives_back_what_quantisation_took() -> None:
    base, original = quantised()
    bank = lb.attach(base)
    bank.add("a", lb.loftq(bank, original, config("loftq", rank=32, alpha=16)))
    path = "model.layers.0.mlp.up_proj"
    place = next(layer for layer in all_layers(bank) if layer.path == path)
    assert isinstance(place, LoRALayer)
    lost = original.get_submodule(path).get_parameter("weight").detach() - place.kind.weight_oi(place._parameters, torch.float32)
    layer = bank.adapter("a").layers[path]
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    torch.testing.assert_close(layer.delta(), U[:, :32] * S[:32] @ Vh[:32], rtol=1e-3, atol=1e-6)
    assert float((lost - layer.delta()).norm() / lost.norm()) < 0.6
    full = outputs(original, ids(3))
    with bank.route("a"):
        near = float((outputs(base, ids(3)) - full).detach().norm())
    with bank.route(lb.BASE):
        far = float((outputs(base, ids(3)) - full).detach().norm())
    assert near < far
    assert layer.rank == 32 and not list(bank.frozen_tensors("a")), "no difference: its start is a change"


def test_loftq_is_pefts_decomposition_where_the_scaling_is_one() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    base, original = quantised()
    start = lb.loftq(base, original, config("loftq", alpha=4))
    for path, A in start.A.items():
        lost = original.get_submodule(path).get_parameter("weight").detach() - weight_of(base.get_submodule(path))
        theirs = _low_rank_decomposition(lost, reduced_rank=4)
        torch.testing.assert_close(start.B[path] @ A, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(A.norm(dim=1), theirs["R"].norm(dim=1), rtol=1e-3, atol=1e-6)


def weight_of(layer: nn.Module) -> Tensor:
    kind = layer_kind(layer)
    assert kind is not None
    return kind.weight_oi(layer._parameters, torch.float32)


def test_loftq_refuses_what_isnt_the_original() -> None:
    base, original = quantised()
    _, stranger = quantised(1)
    with pytest.raises(ModelError, match=r"of the original's norm away from it, expected at most 0.5"):
        lb.loftq(base, stranger, config("loftq"))
    with pytest.raises(ModelError, match=r"the original has \(16, 16\) features there"):
        lb.loftq(base, make("llama"), config("loftq"))
    with pytest.raises(ModelError, match="has no such layer"):
        lb.loftq(base, make("handwritten"), config("loftq"))
    with pytest.raises(ModelError, match="of the original is quantised itself"):
        lb.loftq(base, base, config("loftq"))
    with pytest.raises(ConfigError, match="none of the targeted layers is quantised"):
        lb.loftq(original, original, config("loftq"))
    with pytest.raises(ConfigError, match=r"lorabank.loftq makes a start of its own, got 'pissa'"):
        lb.loftq(base, original, config("pissa"))


# ---- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["eva", "loftq"])
def test_a_start_that_must_be_prepared_is_asked_for(init: str) -> None:
    bank = lb.attach(make("llama"))
    with pytest.raises(ConfigError, match=rf"init: '{init}' can't be made from a configuration alone.*lorabank\.{init}\(bank"):
        bank.add("a", config(init))
    assert bank.names == ()


@pytest.mark.parametrize(
    ("model", "targets", "what"),
    [
        ("pictures", ["all-conv"], "a Conv1d"),
        ("llama", ["all-embedding"], "a Embedding"),
        ("mixtral", ["experts"], "a stack of experts"),
    ],
)
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_layers_that_it_isnt_for_are_named(init: str, model: str, targets: list[str], what: str) -> None:
    bank = lb.attach(make(model))
    with warnings.catch_warnings(), pytest.raises(TargetError, match=rf"init: '{init}' is for linear layers, and .* is {what}"):
        warnings.simplefilter("ignore")
        bank.add("a", config(init, targets=targets))


def test_what_cant_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"init: 'pissa' doesn't go with use_dora"):
        config("pissa", use_dora=True)
    with pytest.raises(ConfigError, match=r"got 'pisa' \(did you mean 'pissa'\?\)"):
        config("pisa")
    bank = lb.attach(make("llama"))
    with pytest.raises(
        TargetError, match=r"can't give layer 'model.layers.0.self_attn.k_proj' the rank 9: there are 8 directions"
    ):
        bank.add("a", config("olora", rank=9))
    with pytest.raises(TargetError, match="'orthogonal' needs an even rank"):
        bank.add("a", config("orthogonal", rank_pattern={"q_proj": 3}))
    layer = lb.AdapterLayer(torch.ones(4, 3), torch.ones(2, 4), 1.0, frozen_rank=1)
    with pytest.raises(AdapterFileError, match="expected a frozen rank of 0, or half of the rank 4"):
        Adapter(config=config("pissa"), layers={"x": layer})


def classifier() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 61,
    }
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    return model, [{"input_ids": torch.randint(3, 61, (16, 9))}]


def test_eva_leaves_a_classifier_the_head_of_its_own() -> None:
    """It names the layers that got a rank, which must not read as LoRA asked for on the head."""
    model, data = classifier()
    bank = lb.attach(model)
    bank.add("plain", lb.AdapterConfig(rank=2))
    bank.add("five", lb.eva(bank, data, lb.AdapterConfig(rank=2)), num_labels=5)
    heads = [{key for key, _ in bank.named_parameters(name) if "classifier" in key} for name in bank.names]
    assert heads == [{"classifier.weight", "classifier.bias"}] * 2
    assert dict(bank.named_parameters("five"))["classifier.bias"].shape == (5,)


def test_eva_shares_out_nothing_to_what_is_trained_in_full_and_keeps_exclude() -> None:
    model, data = classifier()
    bank = lb.attach(model)
    start = lb.eva(bank, data, lb.AdapterConfig(rank=2, modules_to_save=["output.dense"]))
    assert not any(path.endswith("output.dense") for path in start.A)
    assert sum(map(len, start.A.values())) == 2 * 5
    wanted = lb.AdapterConfig(rank=2, bias="all", exclude=["LayerNorm", "output.dense"])
    bank.add("plain", wanted)
    bank.add("eva", lb.eva(bank, data, wanted))
    biases = [{key for key, _ in bank.named_parameters(name) if key.endswith(".bias")} for name in bank.names]
    assert biases[0] == biases[1]
    assert not any("LayerNorm" in key for key in biases[1])


def test_a_start_of_another_model_is_refused() -> None:
    model, data = classifier()
    start = lb.eva(model, data, lb.AdapterConfig(rank=2), rho=1.0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 61}
    others: list[dict[str, Any]] = [{"hidden_size": 16, "num_hidden_layers": 2}, {"hidden_size": 32, "num_hidden_layers": 1}]
    for other in others:
        bank = lb.attach(BertForSequenceClassification(BertConfig(**sizes, **other)))
        with pytest.raises(TargetError, match=r"prepared for another model: layer 'bert.encoder.layer"):
            bank.add("a", start)
        assert bank.names == ()


def test_eva_names_an_attention_whose_projections_nobody_calls() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    with pytest.raises(TargetError, match=r"'eva' looks at layers' inputs, and 'self_attn.in_proj' is a projection"):
        lb.eva(model, [{"src": torch.randn(4, 6, 16)}], lb.AdapterConfig(rank=2))
