"""Our attention inside transformers models: the same losses and gradients as with torch's, and the model as it was afterwards."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorabank.engine import attention as engine_attention
from lorabank.engine import engine
from lorabank.engine.attention import own_attention, without_cudnn
from lorabank.engine.batch import Batch, make_batch, pack_batch
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.kernels.gpu import flash
from lorabank.kernels.native import attention, library
from tests.engine.tiny import FAMILIES, backward, batch_of, difference, make_bank, make_model
from tests.kernels.gpu.stand_in import stand_in

pytestmark = pytest.mark.skipif(library.loaded() is None, reason="no C compiler here, or no OpenMP runtime that torch loads")


CPU = torch.device("cpu")


def even_batch() -> Batch:
    """Rows of one length, so that no mask is made."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(20, 60, (4, 9), generator=generator).tolist()
    return make_batch([(row, [1.0] * 9) for row in rows], ["a", "a", "b", "b"])


def llama() -> LlamaForCausalLM:
    """Heads that are wide enough."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(config).eval()


def gradients(batch: Batch, *, checkpointing: bool = False) -> list[torch.Tensor]:
    bank = make_bank(model=llama())
    forward_backward(Engine(bank, gradient_checkpointing=checkpointing), batch)
    return [p.grad for p in bank.parameters() if p.grad is not None]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of attention.c."""
    calls: list[int] = []
    real = attention.attention

    def attend(*args: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
        calls.append(1)
        return real(*args, scale=scale, causal=causal)

    monkeypatch.setattr(attention, "attention", attend)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_same_gradients(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    mine = gradients(even_batch(), checkpointing=checkpointing)
    assert len(calls) >= (4 if checkpointing else 2)  # two layers, again in the recomputation
    calls.clear()
    monkeypatch.setattr(library, "loaded", lambda: None)
    torchs = gradients(even_batch(), checkpointing=checkpointing)
    assert not calls
    assert len(mine) == len(torchs) > 0
    for a, b in zip(mine, torchs, strict=True):
        # against float64, torch's gradients here are off by 5e-5 and ours by 1e-4: strong adapters on a random model
        assert (a - b).norm() < 5e-4 * b.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_take_it_without_a_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A trace into it would compile anew for every call, since pointers differ, and say so."""
    calls = counted(monkeypatch)
    bank = make_bank(model=llama())
    compiled = compile_blocks(bank.model)
    verbs = Engine(bank)
    for _ in range(3):
        for p in bank.parameters():
            p.grad = None
        forward_backward(verbs, even_batch())
    uncompile_blocks(compiled)
    assert calls
    assert not [record for record in caplog.records if "attention" in record.getMessage()]
    for p, expected in zip(bank.parameters(), gradients(even_batch()), strict=True):
        assert p.grad is not None
        assert (p.grad - expected).norm() < 5e-4 * expected.norm()


def test_padded_rows_take_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    batch = make_batch([([21, 22, 23], [1.0] * 3), ([24, 25, 26, 27, 28], [1.0] * 5)], ["a", "b"])
    verbs = Engine(make_bank(model=llama()))
    verbs.head()  # looks the model over with rows of its own
    calls.clear()
    forward_backward(verbs, batch)
    assert not calls


def test_scoring_uses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(model=llama())
    calls = counted(monkeypatch)
    mine = logprobs(Engine(bank), even_batch())
    assert len(calls) >= 2
    monkeypatch.setattr(library, "loaded", lambda: None)
    torch.testing.assert_close(mine, logprobs(Engine(bank), even_batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "suits", lambda q, k, v: False)  # heads of 8 features would not go through it anyway
    bank = make_bank(family)
    mine = logprobs(Engine(bank), even_batch())
    monkeypatch.setattr(library, "loaded", lambda: None)
    torch.testing.assert_close(mine, logprobs(Engine(bank), even_batch()), rtol=1e-5, atol=1e-5)


def test_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with pytest.raises(ZeroDivisionError), own_attention(model.modules(), CPU):
        assert model.config._attn_implementation == engine_attention.NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with own_attention(model.modules(), CPU):
        assert model.config._attn_implementation == "eager"  # what the user chose stays


def test_a_model_elsewhere_takes_torchs() -> None:
    """Under torch.compile attention.c is a graph break, which a GPU would pay for nothing."""
    model = llama()
    with own_attention(model.modules(), torch.device("cuda")):
        assert model.config._attn_implementation == engine_attention.MASKED
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("causal", [True, False])
def test_keys_repeated_for_kernels_that_do_not_share_them(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_attention, "_repeats_keys", lambda query, key: True)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 9, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    layer: Any = SimpleNamespace(is_causal=causal, num_key_value_groups=2)
    mine, _ = engine_attention.causal_attention(layer, *inputs, None, scaling=0.3)  # type: ignore[arg-type]
    theirs, _ = engine_attention.sdpa_attention_forward(layer, *inputs, None, scaling=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn(mine.shape, generator=generator)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, maskless: bool) -> list[tuple[bool, bool]]:
    """Attention as the engine has it on a GPU from now on; (whether it has a mask, whether it may be cuDNN's) of each call."""
    calls: list[tuple[bool, bool]] = []
    own, sdpa = own_attention, torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"] is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(engine, "own_attention", lambda modules, device, **more: own(modules, torch.device("cuda"), **more))
    monkeypatch.setattr(Engine, "maskless", lambda self, length: maskless)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "maskless", "tokens", "masks", "cudnn"),
    [
        ("llama", True, 9, {False}, True),
        ("llama", False, 9, {True}, False),
        ("mistral", True, 5, {False}, True),  # its window
        ("mistral", True, 9, {True}, False),
        ("mistral", False, 9, {True}, False),
    ],
)
def test_on_a_gpu_masks_do_without_cudnns(
    family: str,
    maskless: bool,
    tokens: int,
    masks: set[bool],
    cudnn: bool,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In recomputation as well; and losses and gradients are what they are on a CPU."""
    lengths = [tokens, 3, tokens, 2]  # behind the padding of which a window sees nothing
    bank, batch = make_bank(family), batch_of(lengths, ["a", "a", "b", "b"], prompt=1)
    expected_losses, expected = backward(bank, batch)
    verbs = Engine(bank, gradient_checkpointing=checkpointing)
    verbs.head()
    calls = as_on_a_gpu(monkeypatch, maskless=maskless)
    monkeypatch.setattr(verbs, "cuda_graphs", False)  # which would lengthen the rows
    losses, found = backward(bank, batch, verbs)
    assert len(calls) == (4 if checkpointing else 2)
    assert {mask for mask, _ in calls} == masks
    assert {may for _, may in calls} == {cudnn}
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for name, loss in expected_losses.items():
        assert losses[name].row_losses == pytest.approx(loss.row_losses, rel=1e-4)
        assert difference(found[name], expected[name]) < 1e-3
    logprobs(verbs, batch)
    assert {may for _, may in calls} == {cudnn}


def test_packed_rows_do_without_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank("llama")
    examples = [([21, 22, 23], [1.0] * 3), ([24, 25, 26, 27], [1.0] * 4)]
    calls = as_on_a_gpu(monkeypatch, maskless=True)
    packed, verbs = pack_batch([examples, examples[:1]], ["a", "b"]), Engine(bank)
    verbs.packing(packed.input_ids_NL.shape[1])
    calls.clear()
    forward_backward(verbs, packed)
    assert {may for _, may in calls} == {False}


def test_without_cudnn_leaves_the_switch_as_it_was() -> None:
    """Of passes in two threads the last to leave sets it again."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(without_cudnn())
        second.enter_context(without_cudnn())
        first.close()
        assert not enabled()
    assert enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with without_cudnn():
            assert not enabled()
        assert not enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_what_was_compiled_outside_of_a_pass_is_not_used_in_one() -> None:
    """The kernel chosen in tracing, which may be cuDNN's, is part of it."""
    made: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    model = llama()
    for block in model.model.layers:
        block.compile(backend=backend)
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    counts = []
    with torch.no_grad():
        for inside in (False, False, True, True, False):
            with own_attention(model.modules(), torch.device("cuda")) if inside else contextlib.nullcontext():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            counts.append(len(made))
    torch._dynamo.reset()
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4]


def test_a_choice_made_meanwhile_stays() -> None:
    model = llama()
    with own_attention(model.modules(), CPU):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_mixture_of_experts_takes_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks pass more arguments on to the attention than others."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    bank = make_bank(model=MixtralForCausalLM(config).eval(), targets=["q_proj", "v_proj"])
    calls = counted(monkeypatch)
    mine = logprobs(Engine(bank), even_batch())
    assert calls
    monkeypatch.setattr(library, "loaded", lambda: None)
    torch.testing.assert_close(mine, logprobs(Engine(bank), even_batch()), rtol=1e-4, atol=1e-4)


def test_a_model_that_asks_for_torchs_by_name_keeps_it() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config)
    with own_attention(model.modules(), CPU):
        assert model.config._attn_implementation != engine_attention.NAME
    with own_attention(make_model("llama").modules(), CPU):
        pass


@pytest.mark.parametrize("length", [9, 40])
def test_flash_attention_where_it_does_what_is_asked_for(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch here, called as the real kernels are: the model's logits and gradients stay, and short windows get a mask."""
    model = llama().bfloat16()
    ids = torch.arange(2 * length).view(2, length) % 61
    wanted, calls = torch.autograd.grad(model(ids).logits.square().sum(), model.model.embed_tokens.weight)[0], []

    def interface() -> object:
        calls.append(1)
        return stand_in()

    monkeypatch.setattr(flash, "_interface", interface)
    monkeypatch.setattr(flash, "HEADS", (32,))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(flash, "ready", lambda device, features, shared: asked.append((features, shared)) or True)
    with own_attention(model.modules(), CPU, maskless=True, fast=True):
        found = torch.autograd.grad(model(ids).logits.square().sum(), model.model.embed_tokens.weight)[0]
    assert len(calls) == 4  # two layers, forward and backward
    assert asked == [(32, 2)]
    assert (found - wanted).float().norm() <= 3e-2 * wanted.float().norm()
    q = torch.randn(1, 2, length, 32, dtype=torch.bfloat16)
    given = {"attention_mask": None, "sliding_window": 16}
    windowed, _ = engine_attention.flash_attention(model, q, q[:, :1], q[:, :1], **given)
    plain, _ = engine_attention.causal_attention(model, q, q[:, :1], q[:, :1], **given)
    assert len(calls) == (5 if length < 16 else 4)
    torch.testing.assert_close(windowed, plain, rtol=2e-2, atol=2e-2)
    with own_attention(model.modules(), CPU, maskless=True):
        model(ids)
    assert len(calls) == (5 if length < 16 else 4)
