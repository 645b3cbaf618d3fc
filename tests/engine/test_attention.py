"""Our attention inside transformers models: the same losses and gradients as with torch's, and the model as it was afterwards."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorabank.engine import attention as engine_attention
from lorabank.engine.attention import own_attention
from lorabank.engine.batch import Batch, make_batch
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.kernels.native import attention, library
from tests.engine.tiny import FAMILIES, make_bank, make_model

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
    engine = Engine(bank)
    for _ in range(3):
        for p in bank.parameters():
            p.grad = None
        forward_backward(engine, even_batch())
    uncompile_blocks(compiled)
    assert calls
    assert not [record for record in caplog.records if "attention" in record.getMessage()]
    for p, expected in zip(bank.parameters(), gradients(even_batch()), strict=True):
        assert p.grad is not None
        assert (p.grad - expected).norm() < 5e-4 * expected.norm()


def test_padded_rows_take_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    batch = make_batch([([21, 22, 23], [1.0] * 3), ([24, 25, 26, 27, 28], [1.0] * 5)], ["a", "b"])
    engine = Engine(make_bank(model=llama()))
    engine.head()  # looks the model over with rows of its own
    calls.clear()
    forward_backward(engine, batch)
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


def test_a_model_elsewhere_keeps_its_own() -> None:
    """Under torch.compile our attention is a graph break, which a GPU would pay for nothing."""
    model = llama()
    with own_attention(model.modules(), torch.device("cuda")):
        assert model.config._attn_implementation == "sdpa"


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
