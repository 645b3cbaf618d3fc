"""Packed rows on a GPU: torch's variable-length attention against the mask, plain and in compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from lorabank import BASE, attach
from lorabank.engine import attention
from lorabank.engine import packed_attention as ours
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.packed_attention import boundary_mask
from lorabank.engine.packing import WAYS, Packing
from lorabank.engine.step import Engine, forward_backward
from lorabank.engine.varlen import suits_varlen, varlen_attention
from tests.engine.test_packing import pair
from tests.engine.tiny import add, backward, batch_of, clear, difference, gradients, make_bank

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STRENGTH = 0.03
"""Of adapters. With the usual 0.2 attention is so sharp here that bf16's gradients have nothing in common with fp32's."""


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if kind == "llama"
        else MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    )
    return made.to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_variable_length_attention_is_the_mask(window: int | None, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, 3, 4, 32, 40, 64, 64, 64], dtype=torch.int32, device="cuda")  # with spans that are empty

    def heads(n: int) -> Tensor:
        return torch.randn(2, 32, n, 64, generator=generator).to("cuda", torch.bfloat16).transpose(1, 2).requires_grad_()

    inputs = [heads(4), heads(4 // groups), heads(4 // groups)]
    assert suits_varlen(*inputs)
    found = varlen_attention(*inputs, cu, scale=0.2, causal=True, window=window)
    q, k, v = (x.float() for x in inputs)
    mask = boundary_mask(cu, 2, 32, window=window)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2).transpose(1, 2)
    weights = torch.randn(found.shape, generator=generator).cuda()
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    mine = torch.autograd.grad((found.float() * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b.float()).norm() < 2e-2 * b.float().norm()


def test_windows_of_plain_rows_train_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, captured, rows longer than the window and padded: as fp32 with the model's own masks has it."""

    def masked(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a window got a mask")

    torch._dynamo.reset()  # code that another test compiled would call nobody here
    lengths, routes = [40, 24, 33], ["a", "b", "a"]
    found: list[dict[str, dict[str, Tensor]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        bank = attach(model("mistral").to(dtype))
        for rank, name in ((4, "a"), (8, "b")):
            add(bank, name, rank=rank, strength=0.02, targets="all-linear")
        if dtype == torch.bfloat16:
            monkeypatch.setattr(attention, "causal_attention", masked)  # what windows fall back on
        engine = Engine(bank, cuda_graphs=dtype == torch.bfloat16)
        forward_backward(engine, batch_of([8, 8], ["a", "b"]))
        if dtype == torch.bfloat16:
            compile_blocks(bank.model)
        for _ in range(4):
            clear(bank)
            forward_backward(engine, batch_of(lengths, routes))
        assert len(engine.graphs._captured) == (dtype == torch.bfloat16)
        monkeypatch.undo()
        found.append({name: gradients(bank, name) for name in "ab"})
    for name in "ab":
        assert difference(found[0][name], found[1][name]) < 6e-2


def distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ over all leaves."""
    off = torch.cat([(found[name] - wanted).flatten() for name, wanted in exact.items()]).norm()
    return float(off / torch.cat([wanted.flatten() for wanted in exact.values()]).norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_rows_equal_rows_of_their_own(
    kind: str, checkpointing: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp32 as rows of their own are, up to half as much again: bf16 rounds each way's sums differently."""
    calls: list[int] = []
    real = ours.varlen_attention

    def counted(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ours, "varlen_attention", counted)
    bank = make_bank(model=model(kind), strength=STRENGTH)
    if compiled:
        compile_blocks(bank.model, recompute=checkpointing)
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    packed, plain = pair([[40, 30, 7], [64], [9, 1, 50], [33]], ["a", "b", "a", BASE])
    assert engine.packing(packed.input_ids_NL.shape[1]).way == "attention"
    _, found = backward(bank, plain, Engine(bank, gradient_checkpointing=checkpointing))
    exact_bank = make_bank(model=model(kind).float(), strength=STRENGTH)
    exact_losses, exact = backward(exact_bank, plain, Engine(exact_bank))
    rounding = {name: distance(found[name], wanted) for name, wanted in exact.items()}
    assert max(rounding.values()) < 0.05
    calls.clear()
    for _ in range(2):
        losses, found = backward(bank, packed, engine)
        for name, wanted in exact.items():
            assert losses[name].row_losses == pytest.approx(exact_losses[name].row_losses, rel=2e-2, abs=1e-2)
            assert distance(found[name], wanted) < 1.5 * rounding[name]
    assert calls


@pytest.mark.filterwarnings("ignore:packed rows of .* take a mask in every attention")  # so they do in fp32
@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["varlen", "masks"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_captured_passes_over_packed_rows(kind: str, dtype: torch.dtype, offloading: bool) -> None:
    """Batch after batch of other examples; replayed, or kernel by kernel in other rows."""
    made = [make_bank(model=model(kind).to(dtype), strength=STRENGTH) for _ in range(2)]
    for bank in made:
        compile_blocks(bank.model, recompute=offloading)
    replaying = Engine(made[0], gradient_checkpointing=offloading, activation_offloading=offloading)
    plain = Engine(made[1], gradient_checkpointing=offloading, cuda_graphs=False)
    few, many = [[40, 30, 50], [64, 56], [120]], [[7, 33, 20, 60], [100, 20], [9, 1, 50, 60]]
    for lengths in [few, many, few, many, few]:
        batch = pair(lengths, ["a", "b", "a"])[0]
        losses, found = backward(made[0], batch, replaying)
        expected_losses, expected = backward(made[1], batch, plain)
        for name in "ab":
            assert losses[name].row_losses == pytest.approx(expected_losses[name].row_losses, rel=2e-3, abs=2e-3)
            assert distance(found[name], expected[name]) < (2e-2 if dtype == torch.bfloat16 else 1e-3)
    assert replaying.graphs.refused is None
    assert len(replaying.graphs._captured) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_host_does_not_wait(way: str) -> None:
    """Neither where boundaries are made nor where they are used."""
    bank = make_bank(model=model("llama"))
    packed = pair()[0].to(bank.device)
    q, k, v = (torch.zeros(5, n, packed.input_ids_NL.shape[1], 64, dtype=torch.bfloat16, device="cuda") for n in (4, 2, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = Packing(bank.model, way).arguments(packed)
        if way == "attention":
            varlen_attention(q, k, v, made[ours.BOUNDARIES], scale=0.2, causal=True, window=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made["position_ids"].is_cuda
