"""The laws on a GPU with compiled blocks, the LoRA products inside them, and passes captured as CUDA graphs. Tiny random models.

Tolerances are stated where they are used. The reference is the same engine on the same model with plain blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.bank.routing import RowRoute
from lorabank.engine.compiling import compile_blocks, repeated_blocks, uncompile_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.step import Engine, SlotLoss, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer
from tests.engine.tiny import backward, batch_of, clear, difference, gradients

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    # torch.compile's advice (TF32, softmax) and its look at the gradients of its inputs
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:compile. LlamaDecoderLayer doesn't take"),  # said once: see test_fallbacks.py
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Of losses, relative; of gradients as `difference` has it. fp32 reorders sums, bf16 rounds activations to 8 bits."""
MIXED: Sequence[RowRoute] = ["a", "b", BASE, "a"]
LENGTHS = (24, 17, 20, 9)

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=128, n_positions=256, n_embd=128, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_SIZES,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, head_dim=32)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=8)),
}


@pytest.fixture(autouse=True)
def true_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make(dtype: torch.dtype = torch.float32, family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]().to("cuda", dtype).eval()


def add(bank: AdapterBank, name: str, rank: int, **config: Any) -> None:
    """An adapter that already does something; its values depend on its name alone."""
    seed = sum(name.encode())
    bank.add(name, AdapterConfig(rank=rank, alpha=16, **config), seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters(name):
            p.add_(torch.randn(p.shape, generator=g).to(p.device) * 0.05)


def make_bank(dtype: torch.dtype = torch.float32, family: str = "llama", *, fused: bool = True) -> AdapterBank:
    bank = attach(make(dtype, family))
    add(bank, "a", 4)
    add(bank, "b", 11)
    if fused:
        torch._dynamo.reset()
        blocks = repeated_blocks(bank.model)
        assert compile_blocks(bank.model)[: len(blocks)] == blocks  # and norms beside them
        assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in blocks)
        with torch.no_grad(), bank.route("a"):
            bank.model(torch.ones(1, 3, dtype=torch.int64, device="cuda"))  # every layer has been reached
    return bank


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def plain(dtype: torch.dtype) -> AdapterBank:
    return make_bank(dtype, fused=False)


@pytest.fixture(scope="module")
def fused(dtype: torch.dtype) -> AdapterBank:
    return make_bank(dtype)


def eager(bank: AdapterBank, **kwargs: Any) -> Engine:
    return Engine(bank, cuda_graphs=False, **kwargs)


Pass = tuple[Mapping[str, SlotLoss], Mapping[str, Mapping[str, Tensor]]]


def assert_same(mine: Pass, theirs: Pass, tolerance: float) -> None:
    assert mine[0].keys() == theirs[0].keys()
    for name, loss in theirs[0].items():
        assert mine[0][name].tokens == loss.tokens
        assert mine[0][name].mean == pytest.approx(loss.mean, rel=tolerance), name
        assert difference(mine[1][name], theirs[1][name]) < tolerance, name


# ---- laws ---------------------------------------------------------------------------------------------------------


def test_law1_base_rows_are_the_bases(fused: AdapterBank, dtype: torch.dtype) -> None:
    ids = torch.randint(14, 61, (4, 24), generator=torch.Generator().manual_seed(3)).to("cuda")
    base = make(dtype)
    with torch.no_grad():
        expected = base(ids).logits.float()
        with fused.route(["a", BASE, "b", BASE]):
            found = fused.model(ids).logits.float()
    allowed = TOLERANCE[dtype]
    assert float((found[[1, 3]] - expected[[1, 3]]).norm() / expected[[1, 3]].norm()) < allowed
    assert float((found[[0, 2]] - expected[[0, 2]]).norm() / expected[[0, 2]].norm()) > 2 * allowed


def test_law1_a_detached_model_is_the_old_one_bit_for_bit() -> None:
    ids = torch.randint(14, 61, (4, 24), generator=torch.Generator().manual_seed(3)).to("cuda")
    bank = make_bank()
    forward_backward(Engine(bank), batch_of(LENGTHS, MIXED))
    model = bank.detach()
    uncompile_blocks(list(model.modules()))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make()(ids).logits)


def test_outputs_and_gradients_are_the_reference_paths(plain: AdapterBank, fused: AdapterBank, dtype: torch.dtype) -> None:
    for lengths in (LENGTHS, (33, 5, 12, 40)):
        batch = batch_of(lengths, MIXED)
        assert_same(backward(fused, batch, eager(fused)), backward(plain, batch, eager(plain)), TOLERANCE[dtype])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_law2_a_mixed_batch_equals_separate_ones(fused: AdapterBank, dtype: torch.dtype, checkpointing: bool) -> None:
    engine = eager(fused, gradient_checkpointing=checkpointing)
    whole = batch_of(LENGTHS, MIXED)
    losses, found = backward(fused, whole, engine)
    for name, rows in (("a", [0, 3]), ("b", [1])):
        alone = backward(fused, whole.select(rows), engine)
        assert_same(({name: losses[name]}, {name: found[name]}), alone, TOLERANCE[dtype])


@pytest.mark.parametrize("graphs", [False, True])
def test_law4_a_slot_that_is_not_finite_stays_alone(dtype: torch.dtype, graphs: bool) -> None:
    bank = make_bank(dtype)
    engine, batch = Engine(bank, cuda_graphs=graphs), batch_of(LENGTHS, MIXED)
    for _ in range(5):
        clean, expected = backward(bank, batch, engine)
    assert len(engine.graphs._captured) == graphs
    with torch.no_grad():
        bank.parameters("b")[1].fill_(float("nan"))
    dirty, found = backward(bank, batch, engine)
    assert not dirty["b"].finite
    assert not all(gradient.isfinite().all() for gradient in found["b"].values())
    assert dirty["a"].loss_sum == pytest.approx(clean["a"].loss_sum, rel=1e-6)  # a GPU may add the rows in another order
    assert difference(found["a"], expected["a"]) < TOLERANCE[dtype] / 10


def test_law4_a_step_leaves_the_others_byte_identical() -> None:
    bank = make_bank()
    optimizer, engine = SlotOptimizer(bank), Engine(bank)
    for name in ("a", "b"):
        optimizer.add(name)
    before = [p.detach().clone() for p in bank.parameters("b")]
    mine = [p.detach().clone() for p in bank.parameters("a")]
    for _ in range(5):
        losses = forward_backward(engine, batch_of(LENGTHS, MIXED))
        optim_step(optimizer, {"a": 1e-2}, {"a": losses["a"].tokens})
        clear(bank)
    assert all(torch.equal(p, old) for p, old in zip(bank.parameters("b"), before, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(bank.parameters("a"), mine, strict=True))
    assert optimizer.steps("b") == 0


def test_law8_spare_ranks_are_never_read(dtype: torch.dtype) -> None:
    bank = make_bank(dtype)
    engine, batch = Engine(bank), batch_of(LENGTHS, MIXED)
    clean, expected = backward(bank, batch, engine)
    spare = 0
    for layer in bank.model.modules():
        if isinstance(layer, LoRALayer):
            used = max(slot.tensors.stop for slot in layer.slots.values())
            spare += layer.store.capacity - used
            for buffer in layer.store.buffers:
                buffer[used:] = float("nan")
    assert spare > 0
    for _ in range(5):  # the last of them are captured ones
        assert_same(backward(bank, batch, engine), (clean, expected), TOLERANCE[dtype])
    assert all(t.isfinite().all() for layer in bank.adapter("b").layers.values() for t in (layer.A, layer.B))


NAMES = [f"n{i}" for i in range(8)]


def _trained(bank: AdapterBank, names: Sequence[str], steps: int = 12) -> dict[str, float]:
    """Each adapter's loss over its last three steps; two rows each, the same whoever else is in the batch."""
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in names:
        add(bank, name, 2 + 2 * NAMES.index(name))
        optimizer.add(name)
    last: dict[str, list[float]] = {name: [] for name in names}
    whole = batch_of((16, 12) * len(NAMES), [name for name in NAMES for _ in range(2)])
    batch = whole.select([i for i, route in enumerate(whole.routes) if route in names])
    for _ in range(steps):
        losses = forward_backward(engine, batch)
        optim_step(optimizer, dict.fromkeys(names, 3e-3), {name: losses[name].tokens for name in names})
        clear(bank)
        for name in names:
            last[name].append(losses[name].mean)
    assert len(engine.graphs._captured) == 1
    assert all(values[-1] < values[0] for values in last.values())
    return {name: sum(values[-3:]) / 3 for name, values in last.items()}


def test_law3_eight_adapters_jointly_end_where_each_ends_alone() -> None:
    bank = make_bank(torch.bfloat16)
    for name in ("a", "b"):
        bank.remove(name)
    joint = _trained(bank, NAMES)
    for name in NAMES:
        bank.remove(name)
    alone: dict[str, float] = {}
    for name in NAMES:
        alone |= _trained(bank, [name])
        bank.remove(name)
    assert alone == pytest.approx(joint, rel=2e-2)  # bf16, twelve steps


# ---- families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3", "mistral"])
def test_other_families(family: str) -> None:
    plain, fused = make_bank(family=family, fused=False), make_bank(family=family)
    for lengths in (LENGTHS, (20,) * 4):  # padded, and not
        batch = batch_of(lengths, MIXED)
        expected = backward(plain, batch, eager(plain))
        assert_same(backward(fused, batch, eager(fused)), expected, TOLERANCE[torch.float32])
    engine = Engine(fused)
    for _ in range(5):
        found = backward(fused, batch, engine)
    assert engine.graphs.refused is None
    assert len(engine.graphs._captured) == 1
    assert_same(found, expected, TOLERANCE[torch.float32])


# ---- graphs -------------------------------------------------------------------------------------------------------


def test_captured_passes_equal_the_others() -> None:
    bank = make_bank()
    captured, uncaptured = Engine(bank), eager(bank)
    same = TOLERANCE[torch.float32]
    lengths = (20, 20, 20, 20)
    batches = [
        *[batch_of(lengths, MIXED)] * 5,
        batch_of(lengths, MIXED, seed=1),  # other tokens
        batch_of(lengths, ["b", "a", "a", BASE], seed=2),  # the rows in another order
        batch_of(lengths, [BASE, "a", "b", "a"], seed=2),
        batch_of((7, 31, 12), ["b", "a", BASE], seed=3),  # another shape in between
        batch_of(lengths, MIXED, seed=4),
    ]
    for i, batch in enumerate(batches):
        found = backward(bank, batch, captured)
        assert (len(captured.graphs._captured) == 1) == (i >= 3), i
        assert_same(found, backward(bank, batch, uncaptured), same)
    assert captured.graphs.refused is None
    assert not uncaptured.graphs._captured


def test_gradients_pile_up_over_captured_passes() -> None:
    bank = make_bank()
    captured, uncaptured = Engine(bank), eager(bank)
    lengths = (20, 20, 20, 20)
    for _ in range(4):
        backward(bank, batch_of(lengths, MIXED), captured)
    assert captured.graphs._captured
    rounds = [
        [batch_of(lengths, MIXED, seed=1), batch_of(lengths, MIXED, seed=2)],
        [batch_of(lengths, MIXED, seed=3), batch_of((7, 31, 12), ["b", "a", BASE], seed=3), batch_of(lengths, MIXED, seed=4)],
    ]
    for batches in rounds:
        sums = []
        for engine in (captured, uncaptured):
            clear(bank)
            for batch in batches:
                forward_backward(engine, batch)
            sums.append({name: gradients(bank, name) for name in ("a", "b")})
        for name in ("a", "b"):
            assert difference(sums[0][name], sums[1][name]) < TOLERANCE[torch.float32], name
    assert len(captured.graphs._captured) == 1


def test_a_captured_pass_leaves_gradients_that_the_next_does_not_change() -> None:
    bank = make_bank()
    engine, lengths = Engine(bank), (20, 20, 20, 20)
    for _ in range(4):
        losses, _ = backward(bank, batch_of(lengths, MIXED), engine)
    kept = {name: gradients(bank, name) for name in ("a", "b")}
    sums = {name: loss.loss_sum for name, loss in losses.items()}
    later = forward_backward(engine, batch_of(lengths, MIXED, seed=7))  # added onto them
    clear(bank)
    again, found = backward(bank, batch_of(lengths, MIXED), engine)
    assert {name: loss.loss_sum for name, loss in losses.items()} == sums  # a replay doesn't write over losses that were read
    assert {name: loss.loss_sum for name, loss in again.items()} == pytest.approx(sums, rel=1e-5)
    assert all(later[name].loss_sum != sums[name] for name in sums)
    for name, part in kept.items():
        assert difference(found[name], part) < TOLERANCE[torch.float32], name


def test_what_can_not_be_captured_is_not() -> None:
    engine = Engine(make_bank(), base_dropout=True)
    for _ in range(5):
        forward_backward(engine, batch_of(LENGTHS, MIXED))
    assert not engine.graphs._captured
    assert engine.graphs.refused is None


def _dropping(bank: AdapterBank) -> AdapterBank:
    """The bank with dropout for "b" alone, and a third adapter that drops most."""
    bank.remove("b")
    add(bank, "b", 11, dropout=0.3)
    add(bank, "c", 16, dropout=0.8)
    return bank


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_plain_paths(dtype: torch.dtype, checkpointing: bool) -> None:
    plain, fused = _dropping(make_bank(dtype, fused=False)), _dropping(make_bank(dtype))
    engines = eager(plain), eager(fused, gradient_checkpointing=checkpointing)
    made = None
    for step, routes in enumerate((["a", "b", BASE, "c"], ["c", "b", "b", "a"], ["b", BASE, "a", "c"])):
        batch, steps = batch_of(LENGTHS, routes, seed=step), {"a": 0, "b": step, "c": 7 * step}
        expected = backward(plain, batch, engines[0], steps=steps)
        assert_same(backward(fused, batch, engines[1], steps=steps), expected, TOLERANCE[dtype])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert made in (None, graphs)  # other steps and routes compile nothing
        made = graphs


def test_captured_passes_with_dropout_follow_the_step() -> None:
    bank = _dropping(make_bank())
    captured, uncaptured = Engine(bank), eager(bank)
    drawn: list[float] = []
    for step in range(8):
        batch, steps = (
            batch_of((20,) * 4, ["a", "b", BASE, "c"] if step < 6 else ["b", "c", "c", "a"]),
            {"b": step, "c": step, "a": 0},
        )
        found = backward(bank, batch, captured, steps=steps)
        assert_same(found, backward(bank, batch, uncaptured, steps=steps), TOLERANCE[torch.float32])
        drawn.append(found[0]["b"].loss_sum)
    assert len(captured.graphs._captured) == 1
    assert captured.graphs.refused is None
    assert len({*drawn}) == len(drawn)


def test_a_bank_that_changes_is_captured_anew() -> None:
    bank = make_bank()
    engine, batch = Engine(bank), batch_of(LENGTHS, MIXED)
    for _ in range(4):
        backward(bank, batch, engine)
    assert len(engine.graphs._captured) == 1
    bank.remove("a")
    add(bank, "a", 7)
    for _ in range(5):
        assert_same(backward(bank, batch, engine), backward(bank, batch, eager(bank)), TOLERANCE[torch.float32])
    assert engine.graphs.refused is None


# ---- compilation --------------------------------------------------------------------------------------------------


def test_recomputation_gives_the_same() -> None:
    bank = make_bank()
    batch = batch_of(LENGTHS, MIXED)
    expected = backward(bank, batch, eager(bank))
    recomputing = Engine(bank, gradient_checkpointing=True)
    for _ in range(5):  # the last ones from a graph
        assert_same(backward(bank, batch, recomputing), expected, TOLERANCE[torch.float32])
    assert recomputing.graphs.refused is None


def test_nothing_is_compiled_again() -> None:
    bank = make_bank()
    engine = eager(bank)
    backward(bank, batch_of(LENGTHS, MIXED), engine)
    stats = torch._dynamo.utils.counters["stats"]
    made = stats["unique_graphs"]
    assert made >= 1
    for lengths, routes in (
        ((33, 5, 12, 40), MIXED),
        ((6, 7, 8, 9, 10, 11), ["b", "b", "a", BASE, "a", "b"]),
        ((80, 3), ["b", "b"]),
        ((64, 64, 63), [BASE, "a", BASE]),
        ((7, 5), ["a", "a"]),  # one tile, and one chunk
        ((40, 33), ["b", "b"]),
    ):
        backward(bank, batch_of(lengths, routes), engine)
    add(bank, "c", 9)
    backward(bank, batch_of((6, 7, 8), ["c", "b", BASE]), engine)
    assert stats["unique_graphs"] == made


def test_two_models_of_one_process() -> None:
    """The second one's blocks share nothing with the first one's bank."""
    first, second = make_bank(), attach(make(family="qwen3"))
    add(second, "a", 4)
    compile_blocks(second.model)
    batch = batch_of(LENGTHS, ["a", "a", BASE, "a"])
    for bank in (first, second, first, second):
        found = backward(bank, batch, eager(bank))
        blocks = repeated_blocks(bank.model)
        kept = [block._compiled_call_impl for block in blocks]
        for block in blocks:
            block._compiled_call_impl = None
        expected = backward(bank, batch, eager(bank))
        for block, compiled in zip(blocks, kept, strict=True):
            block._compiled_call_impl = compiled
        assert_same(found, expected, TOLERANCE[torch.float32])
