"""`chat_prompt_ids`: a conversation as the token ids that an answer is generated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Through the chat template, with its generation prompt; without a template the turns' texts, a line each."""
    if tokenizer.chat_template is None:
        text = "\n".join(str(message["content"]) for message in messages)
        return list(tokenizer(text)["input_ids"])
    text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
