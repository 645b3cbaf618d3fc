"""Builders of tiny real things: a Llama of 40,000 parameters, a byte-level tokenizer with a chat template, rows, a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and the two of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[0]]})
    fast.chat_template = template
    return fast


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two blocks of width 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # at the usual 0.02 so small a model can't say anything with confidence, so it can't learn
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_rows(count: int = 40, word: str = "name") -> list[dict[str, str]]:
    """Prompt and completion, of different lengths."""
    return [{"prompt": f"{word} {i}", "completion": f"it is {i * i}" + "!" * (i % 5)} for i in range(count)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def files_of(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Relative path to content of every file below `folder`, but for the top-level names in `leave_out`."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: content for name, content in found.items() if name.split("/")[0] not in leave_out}


def lines_without_clock(path: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` but for what a clock measured."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "clock"} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """All that two runs of one configuration left is the same, but for checkpoints, the clock and the picture (drawn from it)."""
    first, second = (files_of(path, leave_out=("checkpoints", "metrics.jsonl", "loss.png")) for path in (one, other))
    assert sorted(first) == sorted(second)
    for name, content in first.items():
        assert content == second[name], name
    lines, wanted = lines_without_clock(one / "metrics.jsonl"), lines_without_clock(other / "metrics.jsonl")
    for index, (line, expected) in enumerate(zip(lines, wanted, strict=False)):
        assert line == expected, f"metrics.jsonl:{index + 1}"
    assert len(lines) == len(wanted)


def delta_weights(adapter: Any) -> Mapping[str, torch.Tensor]:
    """ΔW of every layer."""
    return {path: layer.delta() for path, layer in adapter.layers.items()}
