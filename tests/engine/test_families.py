"""One code path for many families: fused blocks against plain ones, in loops of one's own. On a CPU, kernels interpreted.

tests/gpu/test_families.py does the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.kernels.native import library as native_library
from tests.engine import zoo

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the kernels are compiled for a GPU here: see tests/gpu/test_families.py"
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's look at its inputs
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp|add):RuntimeWarning"),  # numpy, in the interpreter
]
TOLERANCE = 1e-3
"""fp32: the order of sums. Measured: 2e-5 at most."""
WIDTH = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def torch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with LORABANK_NATIVE=0: attention that is traced with its block, as on a GPU."""
    monkeypatch.setattr(native_library, "loaded", lambda: None)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> zoo.Paths:
    return zoo.watch(monkeypatch)


def fuse(model: nn.Module) -> None:
    """What `compile_blocks` does on a GPU."""
    for block in repeated_blocks(model):
        block._compiled_call_impl = FusedBlock(block, backend="aot_eager")


@pytest.mark.parametrize("family", zoo.ZOO)
def test_the_repeated_blocks_are_found(family: str) -> None:
    blocks = repeated_blocks(zoo.ZOO[family].make(WIDTH))
    found = [type(block).__name__ for block in blocks]
    assert found == [name for name, count in zoo.ZOO[family].blocks.items() for _ in range(count)]


@pytest.mark.variants(2)
@pytest.mark.parametrize("family", zoo.ZOO)
def test_outputs_and_all_gradients_are_the_plain_models(family: str, paths: zoo.Paths) -> None:
    zoo.check_fused(family, fuse, paths, width=WIDTH, tolerance=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "whisper"])
def test_recomputed_blocks_give_the_same(family: str, paths: zoo.Paths) -> None:
    def recomputed(model: nn.Module) -> None:
        fuse(model)
        for block in repeated_blocks(model):
            block._compiled_call_impl.recompute = True

    zoo.check_fused(family, recomputed, paths, width=WIDTH, tolerance=TOLERANCE, targets=["q", "v"])


@pytest.mark.variants(1)
@pytest.mark.parametrize(("family", "targets"), [("whisper", ["cross-attention"]), ("vit", ["q"]), ("bert", ["v"])])
def test_a_few_layers_of_models_that_are_no_decoders(family: str, targets: list[str], paths: zoo.Paths) -> None:
    zoo.check_fused(family, fuse, paths, width=WIDTH, tolerance=TOLERANCE, targets=targets)


def test_in_half_precision_fused_blocks_are_as_far_from_fp32(paths: zoo.Paths) -> None:
    """fp16, which the interpreter multiplies; and a wrong kernel is noticed."""

    def wrong(model: nn.Module) -> None:
        fuse(model)
        block = repeated_blocks(model)[0]._compiled_call_impl
        right = block._enter

        def enter(*args: Any) -> Any:
            x, calls = right(*args)
            return x + 0.02 * x.roll(1, -1), calls  # a factor alone would go in a norm

        block._enter = enter

    given: dict[str, Any] = {"width": WIDTH, "tolerance": 0.0, "dtype": torch.float16, "targets": ["v"]}
    zoo.check_fused("bert", fuse, paths, **given)
    with pytest.raises(AssertionError, match=r"from fp32, plain blocks"):
        zoo.check_fused("bert", wrong, paths, **given)


@pytest.mark.slow
def test_nothing_is_compiled_again_for_another_length_of_what_is_attended_to(paths: zoo.Paths) -> None:
    """Cross-attention: one graph for all decoder blocks, whatever the lengths on both sides."""
    bank = zoo.bank_of("whisper", {"a": 2, "b": 5}, width=WIDTH, targets=["cross-attention"])
    fuse(bank.model)
    decoder = bank.model.get_submodule("model.decoder")
    counted = torch._dynamo.utils.counters["stats"]
    made = -1
    for heard, written in ((9, 7), (12, 5), (5, 11), (31, 4), (6, 12)):
        states = torch.randn(zoo.ROWS, heard, WIDTH, generator=torch.Generator().manual_seed(heard))
        ids = torch.randint(14, zoo.WORDS, (zoo.ROWS, written), generator=torch.Generator().manual_seed(written))
        bank.skip_reach_check()
        for _ in range(2):
            with bank.route(zoo.MIXED):
                hidden = decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
            zoo.weighed(hidden).backward()
        made = counted["unique_graphs"] if made < 0 else made
        assert counted["unique_graphs"] == made, (heard, written)
    assert len(set(paths.fused)) == 2
