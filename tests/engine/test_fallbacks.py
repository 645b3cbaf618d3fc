"""What can't be compiled, or not wholly, runs all the same: with the plain path's results, and a warning that is said once."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import InductorError
from triton.runtime.errors import OutOfResources

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.layers import LoRALayer
from lorabank.engine import compiling, fused_block, step
from lorabank.engine import engine as engine_module
from lorabank.engine.compiling import compile_blocks, repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.generate import sample
from lorabank.engine.graphs import SEEN_BEFORE, PassGraphs
from lorabank.engine.losses import nll
from lorabank.engine.sampling import SamplingConfig
from lorabank.engine.step import Engine, logprobs
from lorabank.errors import ConfigError
from lorabank.kernels import loss
from lorabank.kernels.gpu import grouping, lora, runtime
from lorabank.kernels.native import library as native_library
from lorabank.notices import warn_once
from tests.engine.tiny import backward, batch_of, difference, gradients, make_bank, make_model

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, and these tests use the interpreter"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look at its inputs
]
WIDTH = 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native_library, "loaded", lambda: None)  # attention that is traced with its block, as on a GPU
    warn_once.cache_clear()
    torch._dynamo.reset()
    yield
    warn_once.cache_clear()
    torch._dynamo.reset()


@contextlib.contextmanager
def said_once(message: str) -> Iterator[None]:
    """The block of code warns so, and does it once."""
    with pytest.warns(UserWarning, match=message) as caught:
        yield
    assert len([item for item in caught if item.category is UserWarning]) == 1


class Block(nn.Module):
    """Two linear layers; `how` they are called can be beside what a compiled block takes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        y = torch.tanh(self.first(hidden))
        if self.how == "half":
            return hidden + y
        if self.how == "pooled":
            return hidden + self.second(y.mean(1))[:, None]  # rows without tokens
        return hidden + self.second(y)


class Stack(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(Block(how) for _ in range(2))
        self.score = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden=x) if self.how == "by keyword" else block(x)
        return self.score(x)


def stack(how: str, *, fused: bool, backend: str = "aot_eager", dtype: torch.dtype = torch.float32, rank: int = 3) -> AdapterBank:
    """A bank over a stack, each adapter doing something."""
    torch.manual_seed(0)
    model = Stack(how).to(dtype)
    bank = attach(model)
    for i, name in enumerate(("a", "b")):
        bank.add(name, AdapterConfig(rank=rank, alpha=rank, targets="*blocks*"), seed=i)
        with torch.no_grad():
            for p in bank.parameters(name):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    if how == "hooked":
        for layer in bank.model.modules():
            if isinstance(layer, LoRALayer) and layer.path.endswith("second"):
                layer.base.register_forward_hook(lambda module, args, output: output * 2)
    if fused:
        for block in repeated_blocks(model):
            block._compiled_call_impl = FusedBlock(block, backend=backend)
    return bank


MIXED: Sequence[Any] = ["a", BASE, "b"]


def one_pass(bank: AdapterBank, route: Any = MIXED) -> dict[str, Tensor]:
    """Outputs and gradients of two passes, the first of which shows that every layer is reached."""
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(9)).to(next(bank.model.parameters()).dtype)
    for _ in range(2):
        for p in bank.parameters():
            p.grad = None
        with bank.route(route):
            y = bank.model(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **{f"{name} {key}": g for name in ("a", "b") for key, g in gradients(bank, name).items()}}


def runs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The blocks that run compiled from now on, one entry a call."""
    found: list[nn.Module] = []
    run = FusedBlock._run

    def noted(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        found.append(self.block)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(FusedBlock, "_run", noted)
    return found


# ---- calls that a compiled block doesn't take ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hooked", "compile: layers 'second' are left out of their compiled blocks, slower: it carries hooks"),
        ("pooled", "layers 'second' are left out of their compiled blocks, slower: they get rows or tokens of its own"),
    ],
)
def test_a_layer_that_a_block_leaves_out_is_named(how: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, compiled = one_pass(stack(how, fused=False)), runs(monkeypatch)
    with said_once(message):
        found = one_pass(stack(how, fused=True))
    assert len(compiled) == 2  # the rest of the block is compiled
    assert difference(found, expected) < 1e-3


def test_a_block_that_gets_its_input_by_keyword_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, compiled = one_pass(stack("by keyword", fused=False)), runs(monkeypatch)
    assert difference(one_pass(stack("by keyword", fused=True)), expected) < 1e-4
    assert len(compiled) == 2


def test_a_block_with_a_layer_that_is_never_called_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the pass that reaches it, which may never come."""
    plain, fused, compiled = stack("half", fused=False), stack("half", fused=True), runs(monkeypatch)
    for bank in (plain, fused):
        bank.skip_reach_check()
    with said_once("compile: no call of Block has reached its layer 'second' so far, so it runs uncompiled until one has"):
        found = one_pass(fused)
    assert torch.equal(found["y"], one_pass(plain)["y"])
    assert compiled == []
    for bank in (plain, fused):
        for block in repeated_blocks(bank.model):
            block.how = ""
    expected = one_pass(plain)
    assert difference(one_pass(fused), expected) < 1e-4
    assert len(compiled) == 2


def test_a_mixture_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    route, compiled = [{"a": 0.5, "b": 0.5}, "a", BASE], runs(monkeypatch)
    expected = one_pass(stack("", fused=False), route)
    with said_once("compile: Block doesn't take a mixture of adapters for a row in its compiled form. It runs uncompiled there"):
        found = one_pass(stack("", fused=True), route)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert compiled == []


def test_an_fp64_base_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, expected = runs(monkeypatch), one_pass(stack("", fused=False, dtype=torch.float64))
    with said_once(
        "compile: Block gets inputs on cpu that it isn't compiled for: its numbers are torch.float64, and the kernels"
    ):
        found = one_pass(stack("", fused=True, dtype=torch.float64))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert compiled == []


def test_an_fp16_base_runs_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is a GPU's: the interpreter doesn't multiply it."""
    compiled, expected = runs(monkeypatch), one_pass(stack("", fused=False, dtype=torch.float16))
    found = one_pass(stack("", fused=True, dtype=torch.float16))
    assert len(compiled) == 2
    assert difference(found, expected) < 2e-2


def test_autocast_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = runs(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_pass(stack("", fused=False))
        with said_once(r"compile: Block doesn't take autocast in its compiled form: convert the model .* uncompiled there"):
            found = one_pass(stack("", fused=True))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert compiled == []


def test_ranks_have_no_upper_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = runs(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank 300 is above what layer")
        plain, fused = (stack("", fused=on, rank=300) for on in (False, True))
    assert difference(one_pass(fused), one_pass(plain)) < 1e-4
    assert len(compiled) == 2


@pytest.mark.slow
def test_a_cache_in_training_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(targets=["q"])
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    ids = torch.randint(14, 61, (2, 7), generator=torch.Generator().manual_seed(5))
    with bank.route("a"):
        bank.model(ids, use_cache=False)
        with said_once(r"called with a cache in a pass with gradients, .* Call it with use_cache=False"):
            cached = bank.model(ids)
            bank.model(ids)
        assert cached.past_key_values.get_seq_length() == 7
        torch.testing.assert_close(cached.logits, bank.model(ids, use_cache=False).logits)


def test_sampling_compiles_nothing() -> None:
    """Each block has a place of its own in the cache, so each would be compiled by itself while the user waits."""
    bank = make_bank(targets=["q"])
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    backward(bank, batch_of((5, 9), ["a", "b"]), Engine(bank))
    backward(bank, batch_of((5, 9), ["a", "b"]), Engine(bank))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before
    prompts = [list(range(14, 14 + 40))] * 2
    texts = sample(bank, prompts, ["a", BASE], config=SamplingConfig(max_new_tokens=3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    compiling.uncompile_blocks(repeated_blocks(bank.model))
    assert texts == sample(bank, prompts, ["a", BASE], config=SamplingConfig(max_new_tokens=3))


# ---- compilers that fail ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend of torch.compile that fails as inductor does without a compiler."""

    def fail(graph_module: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    known = grouping.lookup_backend
    grouping.grouping.cache_clear()
    monkeypatch.setattr(grouping, "lookup_backend", lambda name: fail if name == "broken" else known(name))
    return "broken"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_that_torch_can_not_compile_runs_uncompiled(broken_backend: str, recompute: bool) -> None:
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    for block in repeated_blocks(fused.model):
        block._compiled_call_impl = FusedBlock(block, backend=broken_backend)
    engines = [Engine(bank, gradient_checkpointing=recompute) for bank in (plain, fused)]
    batch = batch_of((5, 9, 7), ["a", BASE, "b"])
    expected = backward(plain, batch, engines[0])
    with said_once(r"torch can't compile LlamaDecoderLayer, so it runs uncompiled: .*Failed to find C compiler"):
        for _ in range(2):
            losses, found = backward(fused, batch, engines[1])
    assert losses == expected[0]
    for name, leaves in expected[1].items():
        assert difference(found[name], leaves) < 1e-5


@pytest.mark.parametrize("again", [False, True])
def test_a_block_that_torch_can_not_compile_runs_uncompiled_where_passes_are_captured(
    broken_backend: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that would be captured once it comes again meets the failure; those after it aren't captured."""
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    engine, batch = (
        Engine(fused, gradient_checkpointing=again, activation_offloading=again),
        batch_of((5, 9, 7), ["a", BASE, "b"]),
    )
    expected = backward(plain, batch, Engine(plain))
    monkeypatch.setattr(step, "_graphed", lambda engine, batch, routing, reference: engine.all_fused(routing))
    backward(fused, batch, engine)  # shows which layers a block reaches
    for block in repeated_blocks(fused.model):
        block._compiled_call_impl = FusedBlock(block, backend=broken_backend)
    engine = Engine(fused, gradient_checkpointing=again, activation_offloading=again)
    with said_once(r"torch can't compile LlamaDecoderLayer, so it runs uncompiled: .*Failed to find C compiler"):
        for _ in range(SEEN_BEFORE + 2):
            losses, found = backward(fused, batch, engine)
    assert losses == expected[0]
    for name, leaves in expected[1].items():
        assert difference(found[name], leaves) < 1e-5


def test_an_interrupt_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(graph_module: Any, inputs: Any) -> Any:
        raise TypeError('argument failed to unpack with error "KeyboardInterrupt: <EMPTY MESSAGE>')  # as torch has it

    known = grouping.lookup_backend
    grouping.grouping.cache_clear()
    monkeypatch.setattr(grouping, "lookup_backend", lambda name: stopped if name == "stopped" else known(name))
    bank = make_bank(targets=["q", "down_proj"], model=make_model("llama"))
    blocks = repeated_blocks(bank.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="stopped")
    batch, engine = batch_of((5, 9, 7), ["a", BASE, "b"]), Engine(bank)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):  # the first may only show which layers a block reaches
            backward(bank, batch, engine)
    assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in blocks)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_that_torch_can_not_compile_leaves_blocks_uncompiled(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled when it is first run, in the midst of another pass."""

    def runs(graph_module: Any, inputs: Any) -> Any:
        return make_boxed_func(graph_module.forward)

    def fail(graph_module: Any, inputs: Any) -> Any:
        raise InductorError(RuntimeError("lowering failed"), None)

    known = grouping.lookup_backend
    half = aot_autograd(fw_compiler=runs, bw_compiler=fail)
    grouping.grouping.cache_clear()
    monkeypatch.setattr(grouping, "lookup_backend", lambda name: half if name == "half" else known(name))
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    blocks = repeated_blocks(fused.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="half")
    batch = batch_of((5, 9, 7), ["a", BASE, "b"])
    expected = backward(plain, batch, Engine(plain, gradient_checkpointing=recompute))
    engine = Engine(fused, gradient_checkpointing=recompute)
    with said_once("compile: torch can't compile their backward pass.*lowering failed.*compile: false silences this"):
        for _ in range(2):
            losses, found = backward(fused, batch, engine)
    assert all(block._compiled_call_impl is None for block in blocks)
    assert losses == expected[0]
    for name, leaves in expected[1].items():
        assert difference(found[name], leaves) < 1e-5


@pytest.mark.parametrize("which", ["change", "outer_and_shrink"])  # forward, backward
def test_a_kernel_that_the_gpu_can_not_run_leaves_blocks_uncompiled(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(which)
        raise OutOfResources(122880, 101376, "shared memory")

    tried: list[str] = []
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    blocks = repeated_blocks(fused.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    batch, engine = batch_of((5, 9, 7), ["a", BASE, "b"]), Engine(fused)
    expected = backward(plain, batch, Engine(plain))
    backward(fused, batch, engine)  # shows which layers a block reaches
    monkeypatch.setattr(lora, which, refuse)
    with said_once("compile: a kernel doesn't run on this GPU.*shared memory, Required: 122880.*compile: false silences this"):
        for _ in range(2):
            losses, found = backward(fused, batch, engine)
    assert tried == [which]
    assert all(block._compiled_call_impl is None for block in blocks)
    assert losses == expected[0]
    for name, leaves in expected[1].items():
        assert difference(found[name], leaves) < 1e-5
    assert torch.equal(logprobs(engine, batch), logprobs(Engine(plain), batch))


def test_a_kernel_beside_the_blocks_that_the_gpu_can_not_run_leaves_all_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append("loss")
        raise OutOfResources(122880, 101376, "shared memory")

    tried: list[str] = []
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    monkeypatch.setattr(runtime, "_REFUSING", {})
    monkeypatch.setattr(runtime, "unusable", lambda device: None)
    monkeypatch.setattr(
        loss, "best_path", lambda *args: loss.PLAIN._replace(chunk=refuse) if runtime.missing(CPU) is None else loss.PLAIN
    )
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    with monkeypatch.context() as without:
        without.setattr(loss, "best_path", lambda *args: loss.PLAIN)
        batch = batch_of((5, 9, 7), ["a", BASE, "b"])
        expected = backward(plain, batch, Engine(plain))
    blocks = repeated_blocks(fused.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    engine = Engine(fused)
    said = "on plain torch from here on.*Required: 122880.*LORABANK_TRITON=0 silences"
    with pytest.warns(UserWarning, match="blocks of LlamaForCausalLM run uncompiled"), pytest.warns(UserWarning, match=said):
        for _ in range(2):
            losses, found = backward(fused, batch, engine)
    assert tried == ["loss"] * 2  # first the blocks are given up, which may have been the reason
    assert losses == expected[0]
    for name, leaves in expected[1].items():
        assert difference(found[name], leaves) < 1e-5


def test_more_forms_than_are_compiled_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_block, "VARIANTS", 1)
    plain, fused = (make_bank(targets=["q", "down_proj"], model=make_model("llama", spread=1.5)) for _ in range(2))
    for block in repeated_blocks(fused.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    engines = Engine(plain), Engine(fused)
    many, one = batch_of((5, 9, 7), ["a", BASE, "b"]), batch_of((9,), ["a"])
    backward(fused, many, engines[1])  # shows which layers a block reaches
    backward(fused, many, engines[1])
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with said_once("LlamaDecoderLayer is compiled in 1 forms by now.*further ones run uncompiled.*compile: false silences this"):
        for batch in (one, many, one):
            expected, found = (backward(bank, batch, engine) for bank, engine in zip((plain, fused), engines, strict=True))
            for name, leaves in expected[1].items():
                assert difference(found[1][name], leaves) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    assert not any(block._compiled_call_impl.failed for block in repeated_blocks(fused.model))


def test_other_errors_leave_blocks_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("nothing to do with a kernel")

    bank = make_bank(targets=["q"], model=make_model("llama", spread=1.5))
    blocks = repeated_blocks(bank.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager", borders=False)
    batch, engine = batch_of((5, 9), ["a", "b"]), Engine(bank)
    backward(bank, batch, engine)
    monkeypatch.setattr(lora, "change", fail)
    with pytest.raises(ValueError, match="nothing to do with a kernel"):
        backward(bank, batch, engine)
    assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in blocks)


def test_a_block_without_adapters_that_can_not_be_compiled_runs(broken_backend: str) -> None:
    model = Stack("")
    x = torch.randn(3, 5, WIDTH)
    expected = model(x)
    for block in repeated_blocks(model):
        block._compiled_call_impl = FusedBlock(block, backend=broken_backend)
    with said_once("torch can't compile Block"):
        assert torch.equal(model(x), expected)


# ---- GPUs that can't -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lacks", ["triton", "dtype"])
def test_blocks_stay_uncompiled_on_a_gpu_that_can_not(lacks: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(compiling, "_place", lambda model: place)
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    monkeypatch.setattr(
        runtime, "missing", lambda device: "Triton is not installed (pip install triton)" if lacks == "triton" else None
    )
    monkeypatch.setattr(runtime, "refused", lambda device, dtype: "Tesla T4 has compute capability 7.5; bf16 needs 8.0 or newer")
    bank, plain = (make_bank(targets=["q"]) for _ in range(2))
    reason = "Triton is not installed" if lacks == "triton" else "Tesla T4 has compute capability 7.5"
    with said_once(
        f"compile: the blocks of LlamaForCausalLM stay uncompiled, and steps slower: {reason}.*compile: false silences this"
    ):
        assert compile_blocks(bank.model, recompute=recompute) == []
        assert compile_blocks(bank.model, recompute=recompute) == []
    assert all(block._compiled_call_impl is None for block in repeated_blocks(bank.model))
    batch = batch_of((5, 9, 7), ["a", BASE, "b"])
    mine, theirs = (backward(one, batch, Engine(one, gradient_checkpointing=recompute)) for one in (bank, plain))
    assert mine[0] == theirs[0]


def test_blocks_are_fused_on_a_gpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    monkeypatch.setattr(runtime, "missing", lambda device: None)
    monkeypatch.setattr(runtime, "refused", lambda device, dtype: None)
    model = make_model()
    blocks = repeated_blocks(model)
    assert compile_blocks(model, recompute=True) == [*blocks, model.get_submodule("model.norm")]
    assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in repeated_blocks(model))


def test_the_kernels_switched_off_where_triton_is_missing_leaves_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own compiler would need it, and fail in the first pass."""
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(runtime, "unusable", lambda device: "Triton is not installed (pip install triton)")
    monkeypatch.setenv(runtime.SWITCH, "0")
    model = make_model()
    with said_once("stay uncompiled, and steps slower: Triton is not installed.*compile: false silences this"):
        assert compile_blocks(model) == []
    assert all(block._compiled_call_impl is None for block in repeated_blocks(model))


def test_recomputation_with_the_kernels_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(runtime, "unusable", lambda device: None)
    monkeypatch.setenv(runtime.SWITCH, "0")
    with pytest.raises(ConfigError, match=r"can't be combined with gradient_checkpointing .* Leave one of them out"):
        compile_blocks(make_model(), recompute=True)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_a_pass_that_can_not_be_captured_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: object, **more: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    leaf, graphs = nn.Parameter(torch.zeros(3)), PassGraphs()

    def compute(given: Sequence[Tensor]) -> Tensor:
        (leaf * given[0]).sum().backward()
        return given[0].sum()[None]

    def once(number: float) -> float:
        return float(graphs.run("key", [torch.full((3,), number)], lambda: [leaf], compute))

    for i in range(SEEN_BEFORE):
        assert once(i + 1.0) == 3 * (i + 1.0)
    with said_once(r"can't be captured as CUDA graphs, .*\(RuntimeError: operation not permitted.*Engine\(cuda_graphs=False\)"):
        assert once(10.0) == 30.0
        assert once(20.0) == 60.0
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [math.fsum(range(SEEN_BEFORE + 1)) + 30.0] * 3  # nothing lost, nothing twice


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("bert", {}, r"\('cls.predictions.* for one\)\. Leave them out of targets \(exclude=\[\.\.\.\]\), or"),
        (
            "llama",
            {"modules_to_save": ["norm"]},
            r"\('model.layers.0.input_layernorm' for one\)\. Leave them out of modules_to_save, or",
        ),
        ("llama", {"trainable_token_indices": [20]}, r"\('model.embed_tokens' for one\)\. .* of trainable_token_indices, or"),
        ("gpt2", {"bias": "lora_only"}, r"\('transformer.h.0.* for one\)\. .* of bias \(exclude=\[\.\.\.\]\), or"),
    ],
)
def test_adapted_layers_outside_of_compiled_blocks_keep_passes_from_being_captured(
    family: str, config: dict[str, Any], said: str
) -> None:
    bank = make_bank(family, **config)
    for block in repeated_blocks(bank.model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")
    engine, routing = Engine(bank), bank.routing(["a", BASE])
    with said_once(rf"aren't captured as CUDA graphs, .* are in no compiled block.*{said} .*Engine\(cuda_graphs=False\)"):
        assert not engine.all_fused(routing)
        assert not engine.all_fused(routing)


def test_blocks_that_are_not_compiled_keep_passes_from_being_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "compiles", lambda model: True)
    bank = make_bank()
    engine, routing = Engine(bank), bank.routing(["a", BASE])
    with said_once(r"aren't captured as CUDA graphs, .* blocks of LlamaForCausalLM aren't compiled.*Engine\(cuda_graphs=False\)"):
        assert not engine.all_fused(routing)
        assert not engine.all_fused(routing)


@pytest.mark.parametrize("could", [False, True])
def test_blocks_that_are_known_to_be_uncompiled_are_not_told_of(could: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "compiles", lambda model: could)
    bank = make_bank()
    engine = Engine(bank)
    engine.uncompiled = could
    assert not engine.all_fused(bank.routing(["a", BASE]))


def test_what_keeps_a_pass_from_being_captured() -> None:
    bank = make_bank()
    batch = batch_of([4, 3], ["a", BASE])
    assert step.uncaptured(Engine(bank), batch, None) is None
    assert step.uncaptured(Engine(bank), batch, torch.zeros_like(batch.weights_NL)) == "with another loss than nll"
    own = Engine(bank, loss=lambda inputs: nll(inputs))
    assert step.uncaptured(own, batch, None) == "with another loss than nll"
    bank.model.half()
    assert step.uncaptured(Engine(bank), batch, None) == "over a base in fp16"
