"""`Renderer`: Examples to `TokenRow`s, with a weight for every token that says whether it is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorabank.config.train import DataConfig
from lorabank.data.chat import ChatSpans, Turn
from lorabank.data.formats import Example, Message
from lorabank.data.row import RowError
from lorabank.errors import ConfigError, DataError, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens."""

    input_ids: tuple[int, ...]
    """The whole row, cut to `max_length`."""
    weights: tuple[float, ...]
    """As long as `input_ids`. 1: the model must predict this token from those before it; 0: it is only read."""
    prompt_ids: tuple[int, ...]
    """What generation starts from: the tokens before the last answer, generation prompt included. Never cut."""
    prompt_text: str
    """The text of `prompt_ids`."""
    reference: str
    """The last answer's plain text."""
    origin: str
    """`file:line` or `row N of …`."""
    group: str | None
    """Value of the column `group_by`, if one is set."""
    truncated: bool
    """Whether tokens were cut off."""

    @property
    def example(self) -> tuple[Sequence[int], Sequence[float]]:
        """Token ids and weights, as a batch takes them."""
        return self.input_ids, self.weights

    @property
    def size(self) -> int:
        """Tokens of the whole row."""
        return len(self.input_ids)

    @property
    def content(self) -> tuple[Sequence[int], Sequence[float]]:
        """What training depends on."""
        return self.input_ids, self.weights


@dataclass(frozen=True)
class _Draft:
    """A row as text: which characters are trained, and where the answer begins."""

    example: Example
    text: str
    spans: tuple[tuple[int, int], ...]
    answer: tuple[int, int] | None
    """The last answer's span; None: the row has none to prompt for."""
    reference: str
    plain: bool
    """No chat template: the tokenizer adds its special tokens, and the end token is put after the text."""


_Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and for each token the characters [start, end) of the text that it stands for."""

_BATCH = 256
_UNCLOSED = "an assistant turn has no end-of-turn token in the chat template, so the model isn't taught to stop there"
_REWRITTEN = "the chat template drops or rewrites part of an assistant turn (such as thinking), and what it renders is trained"
_NO_END_TOKEN = "the tokenizer has no end token, so the model isn't taught to stop"


class Renderer:
    """Renders Examples with one tokenizer and one DataConfig."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.spans = ChatSpans(tokenizer)
        self.notes: dict[str, list[str]] = {}
        """Sentence for the user to the origins of the rows it is about."""
        # Some tokenizers have templates by name; get_chat_template picks one. Here only whether there is any counts.
        self._has_template = bool(tokenizer.chat_template)
        if config.chat and not self._has_template:
            raise DataError(
                Setting("data.chat"),
                " is true, but the tokenizer has no chat template. Use an instruct model, or leave ",
                Setting("data.chat"),
                " out: prompt and completion are then joined as they are",
            )

    def render(self, examples: Sequence[Example]) -> list[TokenRow | RowError]:
        """One TokenRow for each Example, or the RowError that says why there is none. Order is kept.

        Raises DataError or ConfigError where the fault lies in the settings or the tokenizer and not in one row.
        """
        results: list[TokenRow | RowError] = []
        for first in range(0, len(examples), _BATCH):
            results.extend(self._render_batch(examples[first : first + _BATCH]))
        return results

    def _render_batch(self, examples: Sequence[Example]) -> list[TokenRow | RowError]:
        results: list[TokenRow | RowError | None] = [None] * len(examples)
        drafts: dict[int, _Draft] = {}
        for position, example in enumerate(examples):
            try:
                drafts[position] = self._draft(example)
            except RowError as error:
                results[position] = error.at(example.origin)
        for plain in (False, True):
            chosen = [position for position, draft in drafts.items() if draft.plain is plain]
            encodings = self._encode([drafts[position] for position in chosen], special=plain)
            for position, encoding in zip(chosen, encodings, strict=True):
                try:
                    results[position] = self._row(drafts[position], encoding)
                except RowError as error:
                    results[position] = error.at(drafts[position].example.origin)
        return [result for result in results if result is not None]

    # -- Example to text ----------------------------------------------------------------------------------------------

    def _draft(self, example: Example) -> _Draft:
        if example.kind == "text":
            return self._draft_text(example)
        if example.kind == "messages":
            return self._draft_chat(example, example.messages, example.prompt_turns)
        chat = self._has_template if self.config.chat is None else self.config.chat
        if chat:
            turns = ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion})
            return self._draft_chat(example, turns, 1)
        if self.config.system is not None:
            raise ConfigError(
                Setting("data.system"), " needs a chat template: leave it out, or use a model whose tokenizer has one"
            )
        prompt = example.prompt if example.plain_prompt is None else example.plain_prompt
        text = prompt + example.completion
        answer = (len(prompt), len(text))
        spans = ((0, len(text)) if self.config.train_on == "all" else answer,)
        return _Draft(example, text, spans, answer, example.completion, plain=True)

    def _draft_text(self, example: Example) -> _Draft:
        if self.config.train_on not in (None, "all"):
            raise ConfigError(
                Setting("data.train_on"),
                f": {self.config.train_on!r} needs rows with turns or a completion, but {example.origin or 'a row'} "
                "is plain text. Leave train_on out, or name the columns with data.prompt and data.completion",
            )
        span = (0, len(example.text))
        return _Draft(example, example.text, (span,), None, example.text, plain=True)

    def _draft_chat(self, example: Example, messages: Sequence[Message], prompt_turns: int | None) -> _Draft:
        if not self._has_template or self.config.chat is False:
            why = "data.chat is false" if self._has_template else "the tokenizer has no chat template"
            raise DataError(
                f"{example.origin or 'a row'}: a conversation can't be rendered, since {why}. Use an instruct model, set "
                "tokenizer.chat_template, or give rows of prompt and completion texts"
            )
        messages, prompt_turns = with_system(messages, prompt_turns, self.config.system)
        rendered = self.spans(messages, tools=example.tools, kwargs=example.template_kwargs)
        mode = self.config.train_on or ("assistant" if prompt_turns is None else "completion")
        trained = rendered.turns
        if mode == "completion":
            trained = trained[-1:] if prompt_turns is None else tuple(t for t in trained if t.index >= prompt_turns)
        if mode != "all" and not trained:
            raise RowError("no assistant turn, so nothing would be trained")
        self._note_turns(example, trained)
        spans = ((0, len(rendered.text)),) if mode == "all" else tuple((turn.start, turn.end) for turn in trained)
        last = rendered.turns[-1] if rendered.turns else None
        answer = (last.start, last.end) if last else None
        reference = _reference(messages[last.index], rendered.text, last) if last else rendered.text
        return _Draft(example, rendered.text, spans, answer, reference, plain=False)

    def _note_turns(self, example: Example, turns: Sequence[Turn]) -> None:
        if any(not turn.closed for turn in turns):
            self._note(_UNCLOSED, example)
        if any(not turn.verbatim for turn in turns):
            self._note(_REWRITTEN, example)

    def _note(self, text: str, example: Example) -> None:
        self.notes.setdefault(text, []).append(example.origin)

    # -- text to tokens -----------------------------------------------------------------------------------------------

    def _encode(self, drafts: Sequence[_Draft], *, special: bool) -> list[_Encoding]:
        if not drafts:
            return []
        if not self.tokenizer.is_fast:
            return [self._encode_pieces(draft, special=special) for draft in drafts]
        encoded: Any = self.tokenizer(
            [draft.text for draft in drafts],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _encode_pieces(self, draft: _Draft, *, special: bool) -> _Encoding:
        """For tokenizers without offsets: the text cut at the spans' borders, each piece encoded alone."""
        borders = sorted({0, len(draft.text), *(border for span in draft.spans for border in span), *(draft.answer or ())})
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in pairwise(borders):
            piece = self._ids(draft.text[start:end])
            ids += piece
            offsets += [(start, end)] * len(piece)
        whole = self._ids(draft.text)
        if not draft.plain and ids != whole:
            raise DataError(
                f"{draft.example.origin}: this tokenizer ({type(self.tokenizer).__name__}) gives no character offsets, and "
                "tokens cross the border of an assistant turn. Use its fast version"
            )
        bos = self.tokenizer.bos_token_id
        if special and isinstance(bos, int) and self._ids("a", special=True)[0] == bos:
            ids, offsets = [bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _row(self, draft: _Draft, encoding: _Encoding) -> TokenRow:
        ids, offsets = list(encoding[0]), encoding[1]
        eos = self.tokenizer.eos_token_id
        if draft.plain and eos is not None and ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:
            ids, offsets = ids[:-1], offsets[:-1]  # the tokenizer's own end token; put back below, where it counts as trained
        weights = [0.0] * len(ids)
        try:
            found = {span: _tokens_of(draft.text, offsets, *span) for span in draft.spans}
            for first, last in found.values():
                weights[first:last] = [1.0] * (last - first)
            if draft.answer is None:
                prompt_length = _leading_special(offsets)
            else:
                prompt_length = (found.get(draft.answer) or _tokens_of(draft.text, offsets, *draft.answer))[0]
        except _StraddleError as error:
            if not draft.plain or draft.answer is None:
                raise RowError("a token covers both text of the chat template and text of an assistant turn") from error
            # Prompt and completion merge into one token: encode them apart, as generation would meet them.
            ids, weights, prompt_length = self._apart(draft, draft.answer[0])
        if draft.plain:
            self._close(draft, ids, weights)
        return self._finish(draft, ids, weights, prompt_length)

    def _apart(self, draft: _Draft, border: int) -> tuple[list[int], list[float], int]:
        prompt, completion = self._ids(draft.text[:border], special=True), self._ids(draft.text[border:])
        if prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt.pop()
        trained = 1.0 if self.config.train_on == "all" else 0.0
        return prompt + completion, [trained] * len(prompt) + [1.0] * len(completion), len(prompt)

    def _close(self, draft: _Draft, ids: list[int], weights: list[float]) -> None:
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            self._note(_NO_END_TOKEN, draft.example)
        elif not ids or ids[-1] != eos:
            ids.append(eos)
            weights.append(1.0)

    def _finish(self, draft: _Draft, ids: list[int], weights: list[float], prompt_length: int) -> TokenRow:
        if weights:
            weights[0] = 0.0  # nothing precedes the first token, so it can't be predicted
        if not any(weights):
            raise RowError("no trained token")
        limit = self.config.max_length
        if not any(weights[:limit]):
            raise RowError(f"no trained token within max_length = {limit}: the prompt alone fills it")
        return TokenRow(
            input_ids=tuple(ids[:limit]),
            weights=tuple(weights[:limit]),
            prompt_ids=tuple(ids[:prompt_length]),
            prompt_text=draft.text[: draft.answer[0]] if draft.answer else "",
            reference=draft.reference,
            origin=draft.example.origin,
            group=draft.example.group,
            truncated=len(ids) > limit,
        )


def with_system(turns: Sequence[Message], prompt_turns: int | None, system: str | None) -> tuple[tuple[Message, ...], int | None]:
    """`turns`, and how many of them are the prompt's, with a system turn before those that have none. None: as they are."""
    if system is None or any(turn["role"] in ("system", "developer") for turn in turns):
        return tuple(turns), prompt_turns
    return ({"role": "system", "content": system}, *turns), None if prompt_turns is None else prompt_turns + 1


class _StraddleError(Exception):
    """A token lies across a border that tokens must not cross."""


def _tokens_of(text: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) that stand for the characters [start, end). A token may reach out over white space only."""
    first = last = None
    for position, (left, right) in enumerate(offsets):
        # Byte-level tokenizers give a token of mere spaces an empty range at its end.
        if (left < end and right > start) if left < right else start < left <= end:
            first = position if first is None else first
            last = position
    if first is None or last is None:
        raise RowError("no trained token")
    if text[offsets[first][0] : start].strip() or text[end : offsets[last][1]].strip():
        raise _StraddleError
    return first, last + 1


def _leading_special(offsets: Sequence[tuple[int, int]]) -> int:
    """How many tokens at the start stand for no text, such as a beginning-of-text token."""
    return next((position for position, (left, right) in enumerate(offsets) if left < right), 0)


def _reference(message: Mapping[str, Any], text: str, turn: Turn) -> str:
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return content
    body = text[turn.start : turn.body_end].strip()
    return body or json.dumps(message.get("tool_calls"), ensure_ascii=False)
