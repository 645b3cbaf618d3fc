"""Attention over packed rows, function by function: each fast path against the mask that says the same."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.attention import varlen

from lorabank.engine import attention as our_attention
from lorabank.engine import packed_attention as ours
from lorabank.engine import packing
from lorabank.engine import varlen as our_varlen
from lorabank.engine.packed_attention import boundary_mask, packed_attention
from lorabank.engine.step import Engine, forward_backward
from lorabank.engine.varlen import suits_varlen, varlen_attention
from lorabank.kernels.native import attention, library
from lorabank.notices import warn_once
from tests.engine.test_attention import counted, llama
from tests.engine.test_packing import assert_same_pass, pair
from tests.engine.tiny import backward, difference, make_bank

CU = torch.tensor([0, 3, 4, 9, 12, 18, 20, 27], dtype=torch.int32)
"""Three rows of nine: 3 + 1 + 5, 3 + 6, 2 + 7."""
N, L = 3, 9


class _Layer(nn.Module):
    """What transformers' functions ask of a layer."""

    def __init__(self, groups: int, causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal


def qkv(heads: int, groups: int, features: int) -> list[Tensor]:
    """Strided as a model's projections are, (N, heads, L, D) over (N, L, heads, D)."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, heads // groups, heads // groups)
    return [torch.randn(N, L, n, features, generator=generator).transpose(1, 2).requires_grad_() for n in sizes]


def by_mask(q: Tensor, k: Tensor, v: Tensor, window: int | None, causal: bool, scale: float) -> Tensor:
    """The definition."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = boundary_mask(CU, N, L, causal=causal, window=window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def same(found: Tensor, expected: Tensor, inputs: list[Tensor], others: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), others), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_mask_letter_by_letter() -> None:
    cu = torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32)
    drawn = ["".join(".x"[seen] for seen in row) for batch in boundary_mask(cu, 2, 5)[:, 0].tolist() for row in batch]
    assert drawn == ["x....", "xx...", "..x..", "..xx.", "..xxx", "x....", ".x...", ".xx..", ".xxx.", ".xxxx"]
    narrow = boundary_mask(cu, 2, 5, window=2)[1, 0].int().tolist()
    assert narrow == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert boundary_mask(cu, 2, 5, causal=False)[0, 0].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1]] * 3


@pytest.mark.parametrize("features", [8, 32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("window", "causal"), [(None, True), (3, True), (5, True), (50, True), (None, False)])
def test_each_example_alone_is_the_mask(features: int, groups: int, window: int | None, causal: bool) -> None:
    mine, theirs = qkv(4, groups, features), qkv(4, groups, features)
    found, weights = packed_attention(
        _Layer(groups, causal), *mine, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=CU, position_ids=None
    )
    assert weights is None
    same(found, by_mask(*theirs, window, causal, 0.3), mine, theirs)


def test_what_only_the_mask_can_do_takes_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(ours, "each_example", refuse)
    mine, theirs = qkv(4, 2, 8), qkv(4, 2, 8)
    found, _ = packed_attention(_Layer(2), *mine, None, scaling=0.3, cu_seq_lens_q=CU, sliding_window=3, s_aux=torch.ones(4))
    same(found, by_mask(*theirs, 3, True, 0.3), mine, theirs)
    with pytest.raises(AssertionError):
        packed_attention(_Layer(2), *mine, None, cu_seq_lens_q=CU)


def varlen_on_a_cpu(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, most: int, most_k: int, **kwargs: Any) -> Tensor:
    """torch's variable-length attention as its documentation has it: window (left, right), -1 for no end."""
    assert cu is cu_k
    assert cu.dtype == torch.int32
    assert most == most_k >= int(cu.diff().max())
    left, right = kwargs["window_size"]
    assert kwargs.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
    outs = []
    for start, stop in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        qs, ks, vs = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        place = torch.arange(stop - start)
        behind = place[:, None] - place[None]
        mask = ((left < 0) | (behind <= left)) & ((right < 0) | (behind >= -right))
        outs.append(F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=kwargs["scale"], enable_gqa=True))
    return torch.cat([out[0].transpose(0, 1) for out in outs])


@pytest.mark.parametrize("takes", [our_varlen._TAKES | {"enable_gqa"}, our_varlen._TAKES - {"enable_gqa"}])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("window", "causal"), [(None, True), (3, True), (50, True), (None, False)])
def test_the_call_of_torchs_variable_length_attention(
    takes: frozenset[str], groups: int, window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments, against what its documentation says they mean; tests/gpu/test_packing.py calls the real one."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_on_a_cpu)
    monkeypatch.setattr(our_varlen, "_TAKES", takes)
    mine, theirs = qkv(4, groups, 8), qkv(4, groups, 8)
    found = varlen_attention(*mine, CU, scale=0.3, causal=causal, window=window)
    same(found, by_mask(*theirs, window, causal, 0.3), mine, theirs)


@pytest.mark.parametrize("groups", [1, 2])
def test_windows_shorter_than_rows_need_no_mask(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain rows that are padded on the right. What the kernels can't do gets its mask, as before."""
    calls: list[int] = []

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return varlen_on_a_cpu(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", seen)
    monkeypatch.setattr(our_attention, "suits_varlen", lambda q, k, v: True)
    module = _Layer(groups)
    for window, more, by_kernel in ((3, {}, True), (50, {}, False), (None, {}, False), (3, {"unheard_of": 2.0}, False)):
        mine, theirs = qkv(4, groups, 8), qkv(4, groups, 8)
        given: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, **more}
        calls.clear()
        found, _ = our_attention.windowed_attention(module, *mine, None, **given)
        assert len(calls) == by_kernel
        same(found, our_attention.causal_attention(module, *theirs, None, **given)[0], mine, theirs)


def test_flash_attention_leaves_windows_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_on_a_cpu)
    monkeypatch.setattr(our_attention, "suits_varlen", lambda q, k, v: True)
    mine, theirs = qkv(4, 2, 8), qkv(4, 2, 8)
    given: dict[str, Any] = {"scaling": 0.3, "sliding_window": 3}
    found, _ = our_attention.flash_attention(_Layer(2), *mine, None, **given)
    same(found, our_attention.causal_attention(_Layer(2), *theirs, None, **given)[0], mine, theirs)


def test_torch_has_what_the_call_needs() -> None:
    assert {"scale", "window_size"} <= our_varlen._TAKES
    half = torch.zeros(1, 1, 4, 8, dtype=torch.float16)
    assert not suits_varlen(half, half, half), "not on a CPU"


@pytest.mark.skipif(library.loaded() is None, reason="no C compiler here, or no OpenMP runtime that torch loads")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_take_attention_c(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(model=llama())
    packed, plain = pair()
    engine = Engine(bank, gradient_checkpointing=checkpointing)
    engine.packing(packed.input_ids_NL.shape[1])
    calls = counted(monkeypatch)
    _, mine = backward(bank, packed, engine)
    spans = 15  # eleven examples and the padding of four rows
    assert len(calls) == (4 if checkpointing else 2) * spans
    monkeypatch.setattr(attention, "suits", lambda q, k, v: False)
    _, torchs = backward(bank, packed, Engine(bank))
    for name in ("a", "b"):
        assert difference(mine[name], torchs[name]) < 5e-3  # strong adapters on a random model: see test_attention.py
    assert_same_pass(bank, packed, plain)


def test_the_model_is_as_it_was() -> None:
    bank = make_bank()
    packed, _ = pair()
    forward_backward(Engine(bank), packed)
    assert {config._attn_implementation for config in [bank.model.config]} == {"sdpa"}


def test_the_call_is_traced_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on tensors without numbers: no graph break, and one graph for any rows, lengths and numbers of examples."""
    monkeypatch.setattr(ours, "suits_varlen", lambda q, k, v: True)
    layer, counter = _Layer(2), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return packed_attention(layer, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, position_ids=None)[0] * 2

    for rows, length, spans in ((2, 16, 3), (3, 24, 7), (4, 40, 9), (5, 17, 30)):
        sizes = ((rows, length, heads, 64) for heads in (4, 2, 2))
        inputs = [torch.empty(size, device="meta", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for size in sizes]
        cu = torch.zeros(spans + 1, dtype=torch.int32, device="meta")
        torch._dynamo.maybe_mark_dynamic(cu, 0)
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch._dynamo.maybe_mark_dynamic(x, 2)
        out = attend(*inputs, cu)
        assert out.shape == (rows, length, 4, 64)
        assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]
        assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("dtype", "features", "capability", "why"),
    [
        (torch.bfloat16, 64, (8, 0), None),
        (torch.float16, 256, (9, 0), None),
        (torch.float32, 64, (9, 0), "fp16 and bf16"),
        (torch.bfloat16, 20, (9, 0), "multiples of 8"),
        (torch.bfloat16, 512, (9, 0), "up to 256"),
        (torch.float16, 64, (7, 5), "Ampere"),
        (torch.bfloat16, 208, (8, 9), "backward"),
        (torch.bfloat16, 208, (9, 0), None),
        (torch.bfloat16, 256, (8, 9), None),
    ],
)
def test_why_packed_rows_take_masks(
    dtype: torch.dtype, features: int, capability: tuple[int, int], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = our_varlen.varlen_missing(torch.device("cuda"), dtype, features)
    assert (found is None) if why is None else (why in str(found))


def test_masks_of_windows_are_told_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(our_attention, "without_cudnn", contextlib.nullcontext)
    warn_once.cache_clear()

    def enter(features: int, length: int, **more: bool) -> None:
        config = hf.MistralConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=features
        )
        config.sliding_window = 40
        model = hf.MistralForCausalLM(config)
        with our_attention.own_attention(model.modules(), torch.device("cuda"), length=length, **more):
            pass

    enter(64, 64, maskless=True, fast=True)
    enter(208, 40, maskless=True, fast=True)  # no window is reached
    enter(208, 64)  # masks are told about elsewhere
    with pytest.warns(UserWarning, match="sliding windows of MistralConfig.*backward doesn't take heads of 208") as said:
        for _ in range(2):
            enter(208, 64, maskless=True, fast=True)
    assert len(said) == 1


def test_masks_of_packed_rows_are_told_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    warn_once.cache_clear()
    config = hf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    full: Any = hf.LlamaForCausalLM(config)
    gpu = SimpleNamespace(device=torch.device("cuda"), model=full)
    with pytest.warns(UserWarning, match="LlamaForCausalLM take a mask in every attention.*it is for fp16 and bf16") as said:
        for _ in range(2):
            packing._tell_of_masks(gpu, "attention")  # type: ignore[arg-type]
    assert len(said) == 1
    full.to(torch.bfloat16)
    packing._tell_of_masks(gpu, "attention")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="takes nothing else"):
        packing._tell_of_masks(gpu, "mask")  # type: ignore[arg-type]
    packing._tell_of_masks(SimpleNamespace(device=torch.device("cpu"), model=full), "mask")  # type: ignore[arg-type]
    warn_once.cache_clear()
