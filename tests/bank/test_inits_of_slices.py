"""Inits from spectra and data on slices of fused layers: what they are on a layer of the slice's rows alone."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorabank as lb
from lorabank.bank.bank import AdapterBank
from lorabank.engine.batch import make_batch
from lorabank.engine.state import load_state, save_state
from lorabank.engine.step import Engine, forward_backward
from lorabank.errors import AdapterFileError, TargetError
from lorabank.formats.adapter import Adapter
from lorabank.formats.slices import without_slices
from lorabank.formats.vllm import vllm_adapter
from lorabank.optim.slot_optimizer import SlotOptimizer
from tests.bank.tiny import VOCABULARY, clear, fill, gradients, ids, make, outputs, state_bytes

DIFFERENCES = ("pissa", "pissa_niter_4", "olora")
INITS = (*DIFFERENCES, "orthogonal", "eva")
KINDS = ("sliced gpt2", "sliced neox")
SIZES = {"q": 64, "k": 32, "v": 32}
RANKS = {"rank": 4, "alpha": 6.0, "rank_pattern": {"v": 2, "k": 6}}


class Fused(nn.Module):
    """q, k and v in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, sum(SIZES.values())) for _ in range(2))
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = block(x).split(list(SIZES.values()), -1)
            x = x + torch.tanh(q) * torch.cat([k, v], -1)
        return self.head(x)


class Apart(nn.Module):
    """The same with a layer for each."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, size) for name, size in SIZES.items()}) for _ in range(2))
        self.head = fused.head
        with torch.no_grad():
            for mine, block in zip(self.blocks, fused.blocks, strict=True):
                start = 0
                for name, size in SIZES.items():
                    for what in ("weight", "bias"):
                        rows = block.get_parameter(what)[start : start + size]
                        mine.get_submodule(name).get_parameter(what).copy_(rows)
                    start += size

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = (block.get_submodule(name)(x) for name in SIZES)
            x = x + torch.tanh(q) * torch.cat([k, v], -1)
        return self.head(x)


def both() -> tuple[Fused, Apart]:
    torch.manual_seed(0)
    fused = Fused().eval()
    return fused, Apart(fused).eval()


def attach(model: nn.Module) -> AdapterBank:
    return lb.attach(model, fused={"blocks.*": SIZES}) if isinstance(model, Fused) else lb.attach(model)


def config(init: str, **more: Any) -> lb.AdapterConfig:
    return lb.AdapterConfig(**{"targets": ["q", "k", "v"], "init": init, **RANKS, **more})


def rows(seed: int = 0) -> Tensor:
    return torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 2, 64)


def start(bank: AdapterBank, init: str, seed: int = 3) -> None:
    wanted = config(init)
    bank.add("a", lb.eva(bank, [{"x": rows(9)}], wanted) if init == "eva" else wanted, seed=seed)


def trained(bank: AdapterBank, steps: int = 3, rate: float = 0.1) -> list[float]:
    losses = []
    for step in range(steps):
        clear(bank)
        with bank.route("a"):
            loss = (bank.model(rows(step)) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in bank.parameters("a"):
                p -= rate * p.grad  # type: ignore[operator]
    clear(bank)
    return losses


@pytest.mark.parametrize("init", INITS)
def test_a_slice_starts_and_trains_as_a_layer_of_its_rows(init: str) -> None:
    banks = [attach(model) for model in both()]
    for bank in banks:
        start(bank, init)
    for found in (AdapterBank.named_parameters, AdapterBank.frozen_tensors):
        here, there = (dict(found(bank, "a")) for bank in banks)
        assert here.keys() == there.keys() and (here or init not in DIFFERENCES)
        for key, value in here.items():
            torch.testing.assert_close(value, there[key], rtol=1e-5, atol=1e-6, msg=key)
    if init in DIFFERENCES:
        assert all(p.any() for p in banks[0].parameters("a"))
    x = rows()
    with banks[0].route("a"):
        torch.testing.assert_close(banks[0].model(x), both()[0](x), rtol=1e-5, atol=1e-5)
    here, there = (trained(bank) for bank in banks)
    assert here == pytest.approx(there, rel=1e-5) and here[-1] != here[0]
    values = [dict(bank.named_parameters("a")) for bank in banks]
    for key, value in values[0].items():
        torch.testing.assert_close(value, values[1][key], rtol=1e-3, atol=1e-4, msg=key)


def test_loftq_gives_a_slice_what_quantisation_took_from_its_rows() -> None:
    starts = []
    for original in both():
        base = type(original)() if isinstance(original, Fused) else Apart(Fused())
        base.load_state_dict(original.state_dict())
        base.requires_grad_(False)
        lb.quantize_base(base, "fp8", emulate=True, say=lambda line: None)
        bank = attach(base.eval())
        starts.append(lb.loftq(bank, original, config("loftq")))
        bank.add("a", starts[-1])
        x, full = rows(), original(rows())
        with bank.route("a"):
            near = float((bank.model(x) - full).detach().norm())
        with bank.route(lb.BASE):
            assert near < float((bank.model(x) - full).detach().norm())
        assert not list(bank.frozen_tensors("a")), "no difference: its start is a change"
    assert starts[0].A.keys() == starts[1].A.keys() == {f"blocks.{i}.{name}" for i in range(2) for name in SIZES}
    for path, A in starts[0].A.items():
        torch.testing.assert_close(starts[0].B[path] @ A, starts[1].B[path] @ starts[1].A[path], rtol=1e-3, atol=1e-6)


def attached(kind: str, init: str = "pissa", targets: tuple[str, ...] = ("q", "k", "v"), **more: Any) -> AdapterBank:
    bank = lb.attach(make(kind))
    bank.add("a", config(init, targets=list(targets), rank_pattern={"v": 2, "k": 3} if "k" in targets else {}, **more))
    return bank


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_largest_part_of_the_slices_rows_wherever_they_lie(kind: str) -> None:
    """In GPT-NeoX' layer the heads' q, k and v take turns; GPT-2's weight is transposed."""
    bank = attached(kind)
    for path, layer in bank.adapter("a").layers.items():
        owner: Any = make(kind).get_submodule(path.rpartition(".")[0])
        weight = owner.weight.t() if kind == "sliced gpt2" else owner.weight
        assert layer.outputs is not None
        U, S, Vh = torch.linalg.svd(weight[layer.outputs.rows], full_matrices=False)
        r = layer.frozen_rank
        expected = U[:, :r] * S[:r] @ Vh[:r]
        torch.testing.assert_close(layer.scaling * layer.B[:, :r] @ layer.A[:r], expected, rtol=1e-4, atol=1e-6)
        assert float(layer.delta().abs().max()) < 1e-6, "the difference begins at zero"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [6, 5.5])
def test_files_are_one_change_of_the_whole_layer_whose_frozen_ranks_come_last(kind: str, alpha: float, tmp_path: Path) -> None:
    bank, x = attached(kind, alpha=alpha), ids(3)
    fill(bank, "a")
    with bank.route("a"):
        expected = outputs(bank.model, x).detach()
    folder = bank.adapter("a").save(tmp_path / "a")
    theirs = PeftModel.from_pretrained(make(kind), str(folder)).eval()
    torch.testing.assert_close(theirs(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)

    again = Adapter.load(folder)
    assert {(layer.rank, layer.frozen_rank) for layer in again.layers.values()} == {(8, 4), (6, 3), (4, 2)}
    again.save(tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorabank.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = lb.attach(make(kind))
    other.load("a", again)
    for found in (AdapterBank.named_parameters, AdapterBank.frozen_tensors):
        here, there = (dict(found(each, "a")) for each in (bank, other))
        assert here.keys() == there.keys()
        for key, value in here.items():
            torch.testing.assert_close(value * 1.0, there[key] * _ratio(bank, other, key), rtol=1e-6, atol=1e-8)
    with other.route("a"):
        torch.testing.assert_close(outputs(other.model, x), expected, rtol=1e-5, atol=1e-6)

    own = json.loads((folder / "lorabank.json").read_text())
    del own["metadata"]["frozen_ranks"]  # the way out that the message about it names
    (folder / "lorabank.json").write_text(json.dumps(own))
    plain = Adapter.load(folder)
    assert {(layer.rank, layer.frozen_rank) for layer in plain.layers.values()} == {(8, 0), (6, 0), (4, 0)}
    for path, layer in plain.layers.items():
        torch.testing.assert_close(layer.delta(), again.layers[path].delta(), rtol=1e-5, atol=1e-7)
    (folder / "lorabank.json").unlink()
    whole = Adapter.load(folder)
    assert {layer.rank for layer in whole.layers.values()} == {18} and not any("frozen" in key for key in whole.metadata)
    last = lb.attach(make(kind))
    last.load("a", whole)
    with last.route("a"):
        torch.testing.assert_close(outputs(last.model, x), expected, rtol=1e-5, atol=1e-5)


def _ratio(one: AdapterBank, other: AdapterBank, key: str) -> float:
    """By how much B differs where a file gave slices one scaling."""
    path = key.rpartition(".")[0]
    here, there = (each.adapter("a").layers[path].scaling for each in (one, other))
    return there / here if key.endswith(".B") else 1.0


@pytest.mark.parametrize("change", [{"frozen_rank": 3}, {"rank": 4, "frozen_rank": 2}, {"frozen_rank": "x"}, {"frozen_rank": -4}])
def test_a_changed_record_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    folder = attached("sliced gpt2").adapter("a").save(tmp_path / "a")
    own = json.loads((folder / "lorabank.json").read_text())
    next(iter(own["slices"].values()))["q"] |= change
    (folder / "lorabank.json").write_text(json.dumps(own))
    with pytest.raises(AdapterFileError, match=r"slices of .* isn't this layer's \(ranks and frozen ranks"):
        Adapter.load(folder)


def test_slices_of_which_some_start_otherwise_are_plain_in_a_file(tmp_path: Path) -> None:
    spectral, plain = attached("sliced gpt2", targets=("q",)), attached("sliced gpt2", "uniform", targets=("v",))
    fill(plain, "a")
    layers = {**spectral.adapter("a").layers, **plain.adapter("a").layers}
    mixed = Adapter(config=lb.AdapterConfig(rank=4, alpha=6.0, targets=["q", "v"]), layers=layers)
    again = Adapter.load(mixed.save(tmp_path / "a"))
    assert again.layers.keys() == layers.keys() and not any(layer.frozen_rank for layer in again.layers.values())
    for path, layer in layers.items():
        torch.testing.assert_close(again.layers[path].delta(), layer.delta())


def test_merged_exported_and_combined_it_is_the_same_change() -> None:
    bank, x = attached("sliced neox"), ids(3)
    fill(bank, "a")
    with bank.route("a"):
        expected = outputs(bank.model, x).detach()
    adapter = bank.adapter("a")
    merged = make("sliced neox")
    lb.merge(merged, adapter, say=None)
    torch.testing.assert_close(outputs(merged, x), expected, rtol=1e-4, atol=1e-5)
    folded, whole = vllm_adapter(adapter), without_slices(adapter)
    assert all(layer.frozen_rank == 9 and layer.rank == 18 for layer in whole.layers.values())
    both = lb.combine([(adapter, 1.0), (adapter, -1.0)], "exact")
    for path, layer in whole.layers.items():
        torch.testing.assert_close(folded.layers[path].delta(), layer.delta(), rtol=1e-4, atol=1e-6)
        assert float(both.layers[path].delta().abs().max()) < 1e-5


def mixed_bank() -> AdapterBank:
    bank = attached("sliced gpt2")
    bank.add("whole", config("olora", targets=["c_attn"], rank_pattern={}))
    bank.add("plain", config("uniform", targets=["q", "v"], rank_pattern={}))
    for name in bank.names:
        fill(bank, name)
    return bank


def test_a_mixed_batch_is_the_separate_batches_and_the_base_stays() -> None:
    bank = mixed_bank()
    model, before = bank.model, state_bytes(make("sliced gpt2"))
    routes = ["a", "whole", lb.BASE, "plain", {"a": 0.5, "whole": -0.3}]
    x, dy = ids(5), torch.randn(5, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    with bank.route(routes):
        y = outputs(model, x)
    y.backward(dy)
    joint = gradients(bank)
    clear(bank)
    alone = y
    for row, route in enumerate(routes):
        with bank.route([route]):
            alone = outputs(model, x[row : row + 1])
        torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-5, atol=2e-5)
        if alone.requires_grad:
            alone.backward(dy[row : row + 1])
    for key, gradient in gradients(bank).items():
        torch.testing.assert_close(joint[key], gradient, rtol=1e-4, atol=1e-4, msg=key)
    kept = [weakref.ref(tensor) for _, tensor in bank.frozen_tensors("a")]
    del y, alone
    bank.remove("a")
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    assert state_bytes(bank.detach()) == before


def test_dropout_is_the_same_for_what_trains_and_where_it_started() -> None:
    """At its start the change is zero under any mask, if both parts have the same one."""
    losses = {}
    for init in ("uniform", "pissa"):
        bank = attached("sliced gpt2", init, dropout=0.5)
        batch = make_batch([(row.tolist(), [1.0] * 8) for row in ids(3, 8)], "a")
        losses[init] = forward_backward(Engine(bank), batch, steps={"a": 3})["a"].mean
        masked = [None if p.grad is None else p.grad.clone() for p in bank.parameters("a")]
        clear(bank)
        forward_backward(Engine(bank), batch, steps={"a": 4})
        now = [p.grad for p in bank.parameters("a")]
        assert any(a is not None and b is not None and not torch.equal(a, b) for a, b in zip(masked, now, strict=True)), "drawn"
    assert losses["pissa"] == pytest.approx(losses["uniform"], abs=2e-6)


def test_restart_and_state_bring_slices_back() -> None:
    bank = attached("sliced gpt2")
    optimizer = SlotOptimizer(bank)
    optimizer.add("a")
    first = {key: value.detach().clone() for key, value in (*bank.named_parameters("a"), *bank.frozen_tensors("a"))}
    state = save_state(bank, optimizer)
    assert sum("/frozen/" in key for key in state.tensors) == 12
    fill(bank, "a")
    for _, tensor in bank.frozen_tensors("a"):
        tensor.mul_(0.9)
    load_state(bank, optimizer, state)
    assert all(torch.equal(value, first[key]) for key, value in bank.named_parameters("a"))
    assert all(torch.equal(value, state.tensors[f"a/frozen/{key}"]) for key, value in bank.frozen_tensors("a"))
    fill(bank, "a")
    bank.restart("a")
    assert all(torch.equal(value, first[key]) for key, value in bank.named_parameters("a"))


@pytest.mark.parametrize("targets", [["in_proj.q", "in_proj.v"], ["in_proj", "out_proj"]])
def test_attention_modules_projections_and_their_slices_start_so_too(targets: list[str]) -> None:
    model, x = make("torch encoder"), ids(3)
    plain = outputs(model, x).detach()
    bank = lb.attach(model)
    bank.add("a", config("pissa", targets=targets, rank_pattern={}))
    with bank.route("a"):
        torch.testing.assert_close(outputs(model, x), plain, rtol=1e-5, atol=1e-5)
    fill(bank, "a")
    with bank.route(["a", lb.BASE, "a"]):
        y = outputs(model, x).detach()
    torch.testing.assert_close(y[1], plain[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[0], plain[0], atol=1e-3)
    merged = make("torch encoder")
    lb.merge(merged, bank.adapter("a"), say=None)
    torch.testing.assert_close(outputs(merged, x)[0], y[0], rtol=1e-4, atol=1e-5)


def test_what_a_slice_cant_have_is_named() -> None:
    bank = attach(both()[0])
    with pytest.raises(TargetError, match=r"can't give layer 'blocks.0.k' the rank 33: there are 32 directions"):
        bank.add("a", config("pissa", rank_pattern={"k": 33}))
    with pytest.raises(TargetError, match=r"'orthogonal' needs an even rank, and layer 'blocks.0.v' has 3"):
        bank.add("a", config("orthogonal", rank_pattern={"v": 3}))
    encoder = lb.attach(make("torch encoder"))
    with pytest.raises(TargetError, match=r"'eva' looks at layers' inputs, and '.*in_proj.q' is a projection of nn.Multi"):
        lb.eva(encoder, [{"input_ids": ids(4, 8)}], config("eva", targets=["in_proj.q"], rank_pattern={}))
    assert bank.names == ()
