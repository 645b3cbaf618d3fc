"""FlashAttention 4's kernels in whole passes: losses and gradients as with torch's attention, also captured and recomputed.

On a machine without the package or such a GPU there is nothing to hold; the op itself is held in tests/kernels/gpu/test_flash.py.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from lorabank import AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.step import Engine
from lorabank.kernels.gpu import flash
from tests.engine.tiny import backward, batch_of, difference

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or not flash.ready(torch.device("cuda"), 64, 2),
        reason="no GPU that flash-attn-4 is for on this machine, or it isn't installed",
    ),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile's advice
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # and its look at its inputs
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:cutlass.*"),
]
TOLERANCE = 6e-2
"""Of losses, relative; of gradients as `difference` has it: bf16 rounds activations to 8 bits."""
LENGTHS = (150, 17, 64, 131)
ROUTES = ("a", "b", "a", "b")
PASSES = 4
"""The third of a shape is captured, the fourth replayed."""


def bank_of(size: int, shared: int) -> AdapterBank:
    """Two adapters over a small Llama with such heads."""
    heads = 2 * shared
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=32 * heads, intermediate_size=192, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=size, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        bank = attach(hf.LlamaForCausalLM(config).bfloat16().eval())
    for number, name in enumerate("ab"):
        bank.add(name, AdapterConfig(rank=4 + number, targets="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for p in bank.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return bank


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("size", "shared"), [(64, 2), (128, 1), (128, 4), (128, 7)])
def test_passes_equal_those_with_torchs_attention(
    size: int, shared: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash.ready(torch.device("cuda"), size, shared):
        pytest.skip("flash-attn-4 doesn't take such heads here: warned about")
    batch, calls, forward = batch_of(LENGTHS, ROUTES), [], flash._forward

    def counted(*given: object) -> object:
        calls.append(1)
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(flash, "_forward", counted)
    found = {}
    for fast in (True, False):
        torch._dynamo.reset()
        if not fast:
            monkeypatch.setattr(flash, "ready", lambda *_: False)
        bank = bank_of(size, shared)
        compile_blocks(bank.model, recompute=recompute)
        engine = Engine(bank, gradient_checkpointing=recompute)
        before = len(calls)
        found[fast] = [backward(bank, batch, engine) for _ in range(PASSES)]
        assert (len(calls) > before) == fast
        assert engine.graphs.refused is None
    for (losses, grads), (expected_losses, expected) in zip(found[True], found[False], strict=True):
        for name in "ab":
            assert losses[name].mean == pytest.approx(expected_losses[name].mean, rel=TOLERANCE)
            assert difference(grads[name], expected[name]) < TOLERANCE
