"""Which models do without attention masks, and up to which length: exact in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank import attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE
from lorabank.engine import engine as engine_file
from lorabank.engine.attention import own_attention
from lorabank.engine.engine import Engine
from lorabank.engine.head import SplitHead, split_head
from lorabank.engine.maskless import ANY, longest_without_masks
from lorabank.engine.modes import evaluation_mode
from lorabank.notices import warn_once

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 2,
}  # fmt: skip
WINDOW = 40
MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
    ),
    "long window": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, sliding_window=262_144)),
    # these give their attention no window: without a mask it would see too much
    "phimoe": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, sliding_window=WINDOW, num_local_experts=2)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SIZES,
            **EXPERTS,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "both ways": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, use_bidirectional_attention=True)
    ),
}
FOUND = {"llama": ANY, "mistral": ANY, "gemma3": ANY, "long window": 262_144, "phimoe": 0, "qwen2_moe": 0, "both ways": 0}


def model(family: str, dtype: torch.dtype) -> tuple[AdapterBank, SplitHead]:
    torch.manual_seed(0)
    made: Any = MODELS[family]()
    bank = attach(made.to(dtype).eval())
    split = split_head(bank)
    assert split is not None
    return bank, split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_what_is_found(family: str, dtype: torch.dtype) -> None:
    assert longest_without_masks(*model(family, dtype)) == FOUND[family]


@pytest.mark.parametrize("family", ["mistral", "phimoe"])
def test_a_window_beyond_the_rows_is_not_looked_at(family: str) -> None:
    """It is the limit then: rows of a few tokens must not need memory for a long probe."""
    bank, split = model(family, torch.bfloat16)
    assert longest_without_masks(bank, split, WINDOW) == WINDOW
    assert longest_without_masks(bank, split, WINDOW + 1) == FOUND[family]


def test_an_engine_asks_again_for_longer_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    limits = {10: 40, 50: 0}

    def found(bank: AdapterBank, split: SplitHead, rows: int) -> int:
        asked.append(rows)
        return limits[rows]

    monkeypatch.setattr(engine_file, "longest_without_masks", found)
    monkeypatch.setattr(AdapterBank, "device", torch.device("cuda"))
    bank, split = model("llama", torch.float32)
    engine = Engine(bank)
    monkeypatch.setattr(engine, "head", lambda: split)
    assert [engine.maskless(length) for length in (10, 40, 50, 60, 30)] == [True, True, False, False, True]
    assert asked == [10, 50]


def test_no_memory_for_the_probe_means_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.00 GiB.")

    monkeypatch.setattr(engine_file, "longest_without_masks", none_left)
    monkeypatch.setattr(AdapterBank, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bank, split = model("llama", torch.float32)
    engine = Engine(bank)
    monkeypatch.setattr(engine, "head", lambda: split)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no memory to find out whether attention does without masks") as said:
        assert [engine.maskless(10), engine.maskless(10)] == [False, False]
    assert len(said) == 1
    warn_once.cache_clear()


@pytest.mark.parametrize("family", [family for family, found in FOUND.items() if found])
def test_rows_far_longer_than_the_probe_have_the_same_hidden_states(family: str) -> None:
    bank, split = model(family, torch.float32)
    ids = torch.randint(3, 97, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    with torch.no_grad(), evaluation_mode(bank.model.modules()), bank.route(BASE):
        expected = split.hidden(ids, mask)[mask.bool()]
        with own_attention(bank.model.modules(), bank.device, maskless=True, length=150):
            found = split.hidden(ids, None)[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_model_with_masks_of_its_own_keeps_them(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a mask says of longer rows can't be seen on a short one; a bias isn't seen in what is hidden."""
    from transformers.models.llama import modeling_llama

    def masked(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **more: Any) -> Tensor:
        order = torch.arange(inputs_embeds.shape[1])
        seen = (order[:, None] >= order)[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        distance = (order[:, None] - order).clamp(min=0)
        return torch.where(seen, -bias * distance, float("-inf")).to(inputs_embeds.dtype)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", masked)
    bank, split = model("llama", torch.float32)
    assert longest_without_masks(bank, split) == 0
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), evaluation_mode(bank.model.modules()), bank.route(BASE):
        expected = split.hidden(ids, None)
        with own_attention(bank.model.modules(), bank.device, maskless=True, length=30):
            torch.testing.assert_close(split.hidden(ids, None), expected)  # a mask that is given is used all the same


def test_compiled_modules_are_looked_into() -> None:
    bank, split = model("phimoe", torch.float32)
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph

    for block in bank.model.get_submodule("model.layers"):  # type: ignore[union-attr]
        assert isinstance(block, nn.Module)
        block.compile(backend=backend)
    assert longest_without_masks(bank, split) == 0
    assert not calls


def test_torchs_attention_is_what_is_watched() -> None:
    """transformers' attention reaches it by this name, or nothing would be compared."""
    from lorabank.engine.maskless import _Watched

    bank, split = model("mistral", torch.float32)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), bank.route(BASE), own_attention(bank.model.modules(), bank.device, maskless=True), _Watched() as seen:
        split.hidden(ids, None)
        F.relu(torch.ones(1))
    assert len(seen.sights) == 2
