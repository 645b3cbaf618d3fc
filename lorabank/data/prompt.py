"""`chat_prompt_ids`: a row or a conversation as the token ids that an answer is generated from, as training made them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorabank.config.train import DataConfig
from lorabank.data.chat import ChatSpans
from lorabank.data.formats import Example, Message
from lorabank.data.render import Renderer
from lorabank.data.row import RowError
from lorabank.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "Answer"
"""Stands for an answer that isn't there, so that training's renderer can say where one would begin."""


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Example | Sequence[Mapping[str, Any]], *, chat: bool | None = None
) -> list[int]:
    """The `TokenRow.prompt_ids` that training has for this row. `chat` is the run's `data.chat`.

    An Example may lack its answer: an empty completion, or turns that don't end with the assistant's. A sequence of turns is
    all prompt. Without a chat template, or with `chat` False, turns are their texts, a line each. Where the chat template hides
    where an answer begins, which training refuses, its generation prompt decides. Raises DataError for what can't be rendered.
    """
    if not isinstance(prompt, Example):
        example = Example(kind="messages", messages=(*map(dict, prompt), {"role": "assistant", "content": _ANSWER}))
    else:
        example = prompt
    templated = bool(tokenizer.chat_template) and chat is not False
    if not templated and example.kind == "messages":
        example = _plain(example)
    # Only the answer's border matters: how much fits, and what else would be trained, doesn't.
    config = DataConfig(chat=None if templated else False, train_on="completion", max_length=sys.maxsize)
    whole = _with_answer(replace(example, prompt_turns=None), templated=templated)
    try:
        (row,) = Renderer(tokenizer, config).render([whole])
    except DataError:  # a slow tokenizer whose tokens cross the border
        if not templated:
            raise
        row = None
    if row is not None and not isinstance(row, RowError):
        return list(row.prompt_ids)
    if row is not None and not templated:
        raise row
    try:
        text = ChatSpans(tokenizer).render(turns_of(example), example.tools, example.template_kwargs, prompt=True)
    except RowError as error:
        raise error.at(example.origin) from error
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def turns_of(example: Example) -> list[Message]:
    """The turns before the answer; of a completion, the user's."""
    if example.kind != "messages":
        return [{"role": "user", "content": example.prompt}]
    return list(example.messages[:-1] if _answered(example) else example.messages)


def _answered(example: Example) -> bool:
    return bool(example.messages) and example.messages[-1]["role"] == "assistant"


def _with_answer(example: Example, *, templated: bool) -> Example:
    if example.kind == "messages":
        answer = () if _answered(example) else ({"role": "assistant", "content": _ANSWER},)
        return replace(example, messages=(*example.messages, *answer))
    if example.completion:
        return example
    prompt = example.prompt if example.plain_prompt is None else example.plain_prompt
    # Glued to a word, the stand-in could change that word's tokens.
    glued = templated or not prompt or prompt[-1].isspace()
    return replace(example, completion=_ANSWER if glued else f" {_ANSWER}")


def _plain(example: Example) -> Example:
    """Turns as a text, a line each, for models that have no other form of them."""
    turns = turns_of(example)
    if example.tools or any("content" not in turn or turn.get("tool_calls") for turn in turns):
        raise RowError("tools and their calls need a chat template, and there is none or data.chat is false", example.origin)
    return Example(kind="completion", origin=example.origin, prompt="\n".join(str(turn["content"]) for turn in turns))
