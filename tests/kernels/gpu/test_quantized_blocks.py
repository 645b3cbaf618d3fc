"""Compiled blocks over a quantised base, kernels interpreted without a GPU: the plain results, and one code for all blocks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorabank as lb
from lorabank.engine.compiling import repeated_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.kernels.gpu import grouping

ROUTES = ["a", "b", "a", "a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "kept", "backend"),
    [("fp8", "all", "aot_eager"), ("fp8", "inputs", "aot_eager_decomp_partition"), ("nf4", "all", "aot_eager")],
)
def test_compiled_blocks_equal_plain_ones(
    storage: str, kept: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an fp8 base the MLP is two ops, of which recomputation makes the first again."""
    if storage == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 48}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, use_cache=False, **sizes)).eval().to(device)
    lb.quantize_base(model, storage, say=lambda line: None)
    bank = lb.attach(model)
    for name, rank in (("a", 3), ("b", 5)):
        bank.add(name, lb.AdapterConfig(rank=rank, alpha=6))
        with torch.no_grad():
            for p in bank.parameters(name):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * 0.05)
    ids = torch.randint(0, 48, (4, 20), generator=torch.Generator().manual_seed(0)).to(device)

    def results() -> dict[str, Tensor]:
        with bank.route(bank.routing(ROUTES, exact=False)):
            y = model(ids).logits
        y.square().sum().backward()
        found = {key: p.grad.clone() for key, p in bank.named_parameters() if p.grad is not None}
        for p in bank.parameters():
            p.grad = None
        return {**found, "y": y.detach()}

    plain = results()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fuse, joint = grouping.fuse_mlps, []
    monkeypatch.setattr(grouping, "fuse_mlps", lambda *args, **kwargs: joint.append((fuse(*args, **kwargs), kwargs["again"])))
    for block in repeated_blocks(model):
        block._compiled_call_impl = FusedBlock(block, kept=kept, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # the compiler's own
        compiled = results()
    assert torch._dynamo.utils.counters["frames"]["total"] == 1
    assert joint == [(int(storage == "fp8"), kept == "inputs")]
    assert plain.keys() == compiled.keys() and len(plain) == 1 + 2 * 2 * 7 * 3
    for key, value in plain.items():
        assert float((value - compiled[key]).norm() / value.norm()) < (2e-2 if device.type == "cuda" else 2e-5), key
