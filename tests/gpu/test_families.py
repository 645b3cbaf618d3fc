"""One code path for many families on a GPU: compiled blocks against plain ones, in loops of one's own.

tests/engine/test_families.py does the same on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabank.engine.compiling import compile_blocks, repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from tests.engine import zoo

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
TOLERANCE = 1e-3
"""Of outputs, relative; of gradients as `check_fused` has it."""
WIDTH = 128


def fuse(model: nn.Module) -> None:
    torch._dynamo.reset()  # families share the code that is compiled, which holds only so many forms
    blocks = repeated_blocks(model)
    assert compile_blocks(model)[: len(blocks)] == blocks  # and the norms beside them
    assert all(isinstance(block._compiled_call_impl, FusedBlock) for block in repeated_blocks(model))


@pytest.mark.parametrize("family", zoo.ZOO)
def test_outputs_and_all_gradients_are_the_plain_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, lengths that change."""
    zoo.check_fused(
        family,
        fuse,
        zoo.watch(monkeypatch),
        width=WIDTH,
        tolerance=TOLERANCE,
        device="cuda",
        lengths=(7, 5, 12),
    )


@pytest.mark.parametrize("family", ["gpt2", "whisper"])
def test_the_same_in_bf16(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.check_fused(
        family,
        fuse,
        zoo.watch(monkeypatch),
        width=WIDTH,
        tolerance=TOLERANCE,
        device="cuda",
        dtype=torch.bfloat16,
    )


def test_recomputed_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def recomputed(model: nn.Module) -> None:
        fuse(model)
        for block in repeated_blocks(model):
            block._compiled_call_impl.recompute = True

    zoo.check_fused(
        "whisper",
        recomputed,
        zoo.watch(monkeypatch),
        width=WIDTH,
        tolerance=TOLERANCE,
        device="cuda",
    )
