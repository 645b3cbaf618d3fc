"""What only a GPU shows of memory: it really runs out, block inputs really leave, captured passes share theirs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorabank import BASE, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine import fused_block, graphs
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import Engine, forward_backward
from lorabank.errors import TooLargeError
from tests.engine.tiny import add, batch_of, clear, difference, gradients

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
TOLERANCE = 1e-4
"""fp32: the order of sums."""
MIB = 2**20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def bank_of(dtype: torch.dtype = torch.float32, *, layers: int = 4, **config: Any) -> AdapterBank:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model: nn.Module = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    bank = attach(model.to("cuda", dtype).eval())
    for rank, name in ((4, "a"), (8, "b")):
        add(bank, name, rank=rank, strength=0.05, targets="all-linear", **config)
    return bank


def found(engine: Engine, lengths: list[int], routes: list[Any], seed: int = 0) -> dict[str, dict[str, Tensor]]:
    clear(engine.bank)
    forward_backward(engine, batch_of(lengths, routes, seed=seed))
    return {name: gradients(engine.bank, name) for name in engine.bank.names}


def assert_same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, leaves in other.items():
        assert difference(one[name], leaves) < TOLERANCE, name


def limit(mib: float) -> None:
    """Let this process have so much more than it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * MIB) / total)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_does_not_fit_goes_through_in_parts(compiled: bool) -> None:
    lengths, routes = [1024] * 8, ["a", "b", BASE, "a", "b", "a", "b", "b"]
    engine = Engine(bank_of())
    found(engine, [8, 8], ["a", "b"])
    if compiled:
        compile_blocks(engine.bank.model)
    expected = found(engine, lengths, routes)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found(engine, lengths, routes)
    needed = (torch.cuda.max_memory_allocated() - before) / MIB
    engine.release()
    limit(needed * 0.6)  # a part of another shape may be compiled, which takes as much as the L2 cache has: 60 MiB on an H200
    for _ in range(4):  # the third would be captured
        assert_same(found(engine, lengths, routes), expected)
    assert engine.fits.times >= 1
    assert engine.fits.tokens is not None
    assert engine.fits.tokens < 8 * 1024


def test_a_row_that_does_not_fit_at_all() -> None:
    engine = Engine(bank_of())
    found(engine, [8, 8], ["a", "b"])
    limit(8)
    with pytest.raises(TooLargeError, match="a row of 2000 tokens alone"):
        found(engine, [2000, 2000], ["a", "b"])
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert found(engine, [8, 8], ["a", "b"])["a"]


@pytest.mark.parametrize("compiled", [False, True])
def test_block_inputs_wait_on_the_host(compiled: bool) -> None:
    lengths, routes = [1024] * 4, ["a", "b", BASE, "a"]
    peaks, grads = [], []
    for offloading in (False, True):
        engine = Engine(bank_of(layers=8), gradient_checkpointing=True, activation_offloading=offloading, cuda_graphs=False)
        found(engine, [64, 64], ["a", "b"])
        if compiled:
            compile_blocks(engine.bank.model, recompute=True)
        grads.append(found(engine, lengths, routes))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            assert_same(found(engine, lengths, routes), grads[0])
        peaks.append((torch.cuda.max_memory_allocated() - before) / MIB)
        del engine
        gc.collect()
    # eight inputs of 4 × 1024 × 256 fp32 numbers are 32 MiB, of which two or three are on the device at a time
    assert peaks[1] < peaks[0] - 16


def test_what_attention_gave_waits_on_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_block, "WORTH_MORE", 0)  # these blocks are small
    lengths, routes = [2048] * 4, ["a", "b", BASE, "a"]
    peaks: list[float] = []
    expected: dict[str, dict[str, Tensor]] = {}
    for offloading in (False, True):
        bank = bank_of(torch.bfloat16, layers=16)  # torch's fast attentions of grouped heads are for half precision
        engine = Engine(bank, gradient_checkpointing=True, activation_offloading=offloading, cuda_graphs=False)
        found(engine, [64, 64], ["a", "b"])
        compile_blocks(bank.model, recompute=True)
        mine = found(engine, lengths, routes)
        expected = expected or mine
        before, copied = torch.cuda.memory_allocated(), engine.offload.bytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            mine = found(engine, lengths, routes)
            for name in "ab":  # bf16: a sum that was kept is rounded, one that is made again inside a kernel isn't
                assert difference(mine[name], expected[name]) < 5e-2
        peaks.append((torch.cuda.max_memory_allocated() - before) / MIB)
        if offloading:
            # of each token: the input, attention's output, the state behind it, and a sum in fp32 for each head
            assert engine.offload.bytes - copied == 3 * 16 * 4 * 2048 * (3 * 256 * 2 + 4 * 4)
        del engine, bank
        gc.collect()
    # sixteen inputs of 4 × 2048 × 256 numbers are 64 MiB; of three such tensors a block, two or three blocks' are on the device
    assert peaks[1] < peaks[0] - 16


def test_captured_passes_whose_inputs_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes by turns, fresh rows each time: a replay copies to and from the host memory of its own capture."""
    monkeypatch.setattr(fused_block, "WORTH_MORE", 0)
    work: list[tuple[list[int], list[Any]]] = [([512] * 4, ["a", "b", BASE, "a"]), ([256] * 2, ["b", "a"])]
    banks = [bank_of(torch.bfloat16, layers=6) for _ in range(2)]
    plain = Engine(banks[0], activation_offloading=True, cuda_graphs=False)
    engine = Engine(banks[1], activation_offloading=True)
    for one in (plain, engine):
        found(one, [64, 64], ["a", "b"])
        compile_blocks(one.bank.model, recompute=True)
    for seed in range(8):
        for lengths, routes in work:
            mine, theirs = (found(one, lengths, routes, seed) for one in (engine, plain))
            for name in "ab":
                assert difference(mine[name], theirs[name]) < 2e-2, (seed, lengths, name)
    assert engine.graphs.refused is None
    assert len(engine.graphs._captured) == 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(4):
        found(engine, *work[0], seed=seed)
    clear(engine.bank)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + MIB  # a replay takes nothing
    engine.release()
    mine, theirs = (found(one, *work[0], seed=9) for one in (engine, plain))
    for name in "ab":
        assert difference(mine[name], theirs[name]) < 2e-2


def test_captured_passes_of_several_shapes_keep_each_others_gradients() -> None:
    plain = Engine(bank_of(dropout=0.0), cuda_graphs=False)
    engine = Engine(bank_of(dropout=0.0))
    work: list[tuple[list[int], list[Any]]] = [([64, 64], ["a", "a"]), ([128], ["b"]), ([64] * 4, ["a", "b", "a", BASE])]
    for one in (plain, engine):
        found(one, [8, 8], ["a", "b"])
        compile_blocks(one.bank.model)
        for lengths, routes in work * 4:  # twice as it comes, then captured
            found(one, lengths, routes)
    assert engine.graphs.refused is None
    assert len(engine.graphs._captured) == len(work)
    for order in ([0, 1, 2], [1, 0, 1, 2], [2, 1, 0, 0]):
        for one in (plain, engine):
            clear(one.bank)
            for seed, which in enumerate(order):  # gradients pile up over graphs that share their memory
                forward_backward(one, batch_of(*work[which], seed=seed))
        assert_same({name: gradients(engine.bank, name) for name in "ab"}, {name: gradients(plain.bank, name) for name in "ab"})


def test_a_capture_takes_over_what_cublas_computes_in() -> None:
    engine = Engine(bank_of())
    found(engine, [8, 8], ["a", "b"])
    compile_blocks(engine.bank.model)
    held: list[int] = []
    for _ in range(graphs.SEEN_BEFORE + 3):
        found(engine, [64, 64], ["a", "b"])
        clear(engine.bank)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert len(engine.graphs._captured) == 1
    assert held[-1] < held[graphs.SEEN_BEFORE - 1]  # gradients here are less than one such workspace


def test_shapes_that_change_all_the_time_are_not_captured_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 4)
    engine = Engine(bank_of())
    found(engine, [8, 8], ["a", "b"])
    compile_blocks(engine.bank.model)
    made = []
    for _ in range(4):
        for rows in range(1, 8):
            found(engine, [64] * rows, ["a"] * rows)
            made.append(tuple(map(id, engine.graphs._captured.values())))
    assert len(made[-1]) == 4
    assert made[-1] == made[-7] or set(made[-1]) == set(made[-7])


def test_fp16_on_a_gpu() -> None:
    lengths, routes = [64, 40, 64, 64], ["a", "b", BASE, "a"]
    full, half = Engine(bank_of()), Engine(bank_of(torch.float16))
    assert half.scales_losses
    for engine in (full, half):
        found(engine, [8, 8], ["a", "b"])
        compile_blocks(engine.bank.model)
    for _ in range(3):
        expected, mine = found(full, lengths, routes), found(half, lengths, routes)
        for name in "ab":
            assert difference(mine[name], expected[name]) < 5e-2  # 11 bits, through four blocks
