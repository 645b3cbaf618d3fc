"""`ChatSpans`: a conversation as text, and exactly which characters of it the assistant has to produce.

A chat template is an arbitrary program, and most of them don't mark the assistant's part. So the part is found by
rendering: the text up to the generation prompt is what the model is given; what the template writes after it for the
assistant's turn, up to the end of its end-of-turn marker, is what it must produce. Where a template rewrites earlier
turns (so that a prefix of the conversation isn't a prefix of the text), a stand-in for the turn's content is rendered
in its place and the texts compared. A turn that can't be located with certainty is a RowError, never a guess.

Terms: `prefix` is the text before a turn with the generation prompt, `lead` what the template writes between that and
the content (such as an empty thinking block), `closing` the end-of-turn marker, `tail` all text after the content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabank.data.formats import Message
from lorabank.data.row import RowError
from lorabank.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "Standin{}turn"


@dataclass(frozen=True)
class Turn:
    """Where one assistant turn lies in the rendered text, its end-of-turn marker included."""

    index: int
    """Of the turn among the messages."""
    start: int
    """First character that the model produces."""
    end: int
    """Character after the last."""
    body_end: int
    """Character after the turn's own text, where its end-of-turn marker begins."""
    closed: bool
    """Whether an end-of-turn marker is in the span."""
    verbatim: bool
    """Whether the text holds the turn's content as given; a template may drop or rewrite some, such as thinking."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Shape:
    """What a template writes around one plain assistant turn at the end of a conversation."""

    lead: str
    tail: str
    closing: str
    inner_closing: str
    """What ends a turn that another follows, where that differs from `closing`; else ''."""
    prompted: bool
    """Whether the template has a generation prompt, so that all after it is the model's to produce."""

    @property
    def trained_lead(self) -> str:
        """The part of `lead` that the model produces itself: all of it after a generation prompt, else only white space."""
        return self.lead if self.prompted or not self.lead.strip() else ""


class ChatSpans:
    """Renders conversations with one tokenizer's chat template and locates the assistant turns.

    It remembers the template's shape around a turn, so that most conversations cost one rendering and one more a turn.
    A remembered shape is only ever used where the rendered text confirms it literally.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        markers = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        longest_first = sorted((m for m in markers if m.strip()), key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._eos = str(tokenizer.eos_token or "")
        self._shapes: dict[tuple[object, ...], _Shape] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """The template's text, with its generation prompt if `prompt`. Raises RowError where the template refuses."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                **(kwargs or {}),
            )
        except Exception as error:  # a template is a program that may raise anything
            raise RowError(f"the chat template refused it: {first_line(error)}") from error
        return str(text)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation's text and its assistant turns in order. Raises RowError where a turn can't be located."""
        conversation = _Conversation(self, messages, tools, kwargs)
        text = conversation.text
        turns: list[Turn] = []
        marked: tuple[Turn, ...] | None = None
        for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            turn = conversation.quick(index) or conversation.locate(index)
            if turn is None:
                marked = marked or self._marked_turns(conversation)
                turn = next((t for t in marked if t.index == index), None)
            if turn is None or (turns and turn.start < turns[-1].end):
                raise RowError(
                    f"can't tell which text of the {_ordinal(len(turns) + 1)} assistant turn the model must produce: the chat "
                    "template changes the conversation around it. Give the tokenizer a template with {% generation %} "
                    "markers, or use prompt/completion rows with data.chat: false"
                )
            turns.append(turn)
        return Rendered(text, tuple(turns))

    def probe(self, conversation: _Conversation, index: int) -> _Shape | None:
        """What surrounds a plain assistant turn at `index`, found with a stand-in; None where it can't be told."""
        shape = self._probe(conversation, index)
        if shape is not None:
            self._shapes.setdefault(conversation.situation(index), shape)
        return shape

    def remembered(self, key: tuple[object, ...]) -> _Shape | None:
        """The shape known for that situation."""
        return self._shapes.get(key)

    def _probe(self, conversation: _Conversation, index: int) -> _Shape | None:
        before = conversation.messages[:index]
        stand_in, follow_up = conversation.stand_in(0), conversation.stand_in(1)
        answer = {"role": "assistant", "content": stand_in}
        split = _split_once(conversation.render([*before, answer]), stand_in)
        if split is None:
            return None
        head, tail = split
        try:
            followed = _split_once(conversation.render([*before, answer, {"role": "user", "content": follow_up}]), stand_in)
        except RowError:  # some templates allow no user turn here, such as after a tool call
            followed = None
        prefix = conversation.prefix(index)
        prompted = prefix is not None and prefix != conversation.prefix(index, prompt=False)
        inside = prefix is not None and head.startswith(prefix)
        lead = head[len(prefix) :] if inside and prefix is not None else ""
        closing = self._closing(tail, followed[1] if followed else None)
        inner = self._inner_closing(followed[1], follow_up, closing) if followed else ""
        return _Shape(lead, tail, closing, inner, prompted and inside)

    def _closing(self, tail: str, followed: str | None) -> str:
        """The end-of-turn marker: the text through the first added token after the content, where that token ends the
        turn whatever follows. `tail` ends the conversation; in `followed` a user turn comes after. '' if there is none."""
        first = self._marker.search(tail)
        if followed is None or followed.startswith(tail.rstrip()):
            # What ends the conversation also ends the turn when another follows.
            return self._through_markers(tail, first) if first else tail.rstrip()
        shared = _shared_start(tail, followed)
        markers = list(self._marker.finditer(shared))
        if markers and markers[-1].end() == len(shared) and tail[len(shared) :].strip():
            markers.pop()  # the texts part right after it, at the role's name: it opens the next turn
        if markers:
            return self._through_markers(shared[: markers[-1].end()], markers[0])
        if first and first.group() == self._eos:
            return tail[: first.end()]  # closed at the conversation's end only
        return ""

    def _inner_closing(self, followed: str, follow_up: str, closing: str) -> str:
        """The token that ends a turn only where another follows. It is known by ending the user's turn too."""
        first = self._marker.search(followed)
        after_user = followed.partition(follow_up)[2]
        if first is None or (closing and followed.startswith(closing)):
            return ""
        marker = followed[: first.end()]
        # Any text left after it would mean that it opens a generation prompt instead.
        return marker if after_user.rstrip() == marker.rstrip() else ""

    def _through_markers(self, tail: str, first: re.Match[str]) -> str:
        """`tail` through `first` and the added tokens that directly follow it, up to the end token."""
        last = first
        while last.group() != self._eos and (following := self._marker.match(tail, last.end())) is not None:
            last = following
        return tail[: last.end()]

    def has_words(self, text: str) -> bool:
        """Whether there is anything besides added tokens and white space."""
        return bool(self._marker.sub("", text).strip())

    def _marked_turns(self, conversation: _Conversation) -> tuple[Turn, ...]:
        """Turns by the template's own {% generation %} markers, if there is one with text for each turn; else none."""
        template = self._tokenizer.get_chat_template(tools=list(conversation.tools) if conversation.tools else None)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return ()
        encoded: Any = self._tokenizer.apply_chat_template(
            conversation.messages,
            tools=list(conversation.tools) if conversation.tools else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **conversation.kwargs,
        )
        spans: list[tuple[int, int]] = []
        previous = 0
        for mark, (start, end) in zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True):
            if mark and not previous:
                spans.append((start, end))
            elif mark:
                spans[-1] = (spans[-1][0], end)
            previous = mark
        indices = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(spans) != len(indices):
            return ()
        turns = tuple(self._marked_turn(conversation, index, *span) for index, span in zip(indices, spans, strict=True))
        # A template that drops a turn's content still marks its end: that would train a stop and nothing else.
        return turns if all(self.has_words(conversation.text[turn.start : turn.body_end]) for turn in turns) else ()

    def _marked_turn(self, conversation: _Conversation, index: int, start: int, end: int) -> Turn:
        text = conversation.text
        inner = list(self._marker.finditer(text, start, end))
        body_end, closed = end, False
        if inner and not text[inner[-1].end() : end].strip():
            body_end, end, closed = inner[-1].start(), inner[-1].end(), True
        elif (after := self._marker.match(text, end)) is not None and after.group() == self._eos:
            # Markers often leave the end-of-turn token out; directly after the content it belongs to the turn.
            end, closed = after.end(), True
        content = str(conversation.messages[index].get("content", "")).strip()
        return Turn(index, start, end, body_end, closed, content in text[start:end])


class _Conversation:
    """One conversation while its turns are being located."""

    def __init__(
        self, spans: ChatSpans, messages: Sequence[Message], tools: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
    ) -> None:
        self.spans, self.messages, self.tools, self.kwargs = spans, list(messages), tools, dict(kwargs or {})
        self.text = self.render(self.messages)
        self._prefixes: dict[tuple[int, bool], str | None] = {}

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self.spans.render(messages, self.tools, self.kwargs, prompt=prompt)

    def prefix(self, index: int, *, prompt: bool = True) -> str | None:
        """The text of the messages before `index`, with the generation prompt; None where the template refuses it."""
        key = (index, prompt)
        if key not in self._prefixes:
            try:
                self._prefixes[key] = self.render(self.messages[:index], prompt=prompt) if index else None
            except RowError:  # a template may refuse a conversation that ends here, though not the whole
                self._prefixes[key] = None
        return self._prefixes[key]

    def stand_in(self, number: int) -> str:
        """A word that the text doesn't hold."""
        salt = number
        while (word := _STAND_IN.format(salt)) in self.text:
            salt += 2
        return word

    def situation(self, index: int) -> tuple[object, ...]:
        """What a template's shape around a turn may depend on, apart from its neighbours' content."""
        before = self.messages[index - 1]["role"] if index else None
        return (before, index == 0, bool(self.tools), repr(sorted(self.kwargs.items(), key=lambda item: item[0])))

    def quick(self, index: int) -> Turn | None:
        """The turn where the text confirms a remembered shape: prefix, lead, content and closing, letter by letter."""
        message = self.messages[index]
        shape = self.spans.remembered(self.situation(index))
        if shape is None or not shape.closing or message.keys() - {"role", "content"}:
            return None
        prefix = self.prefix(index)
        if prefix is None or not self.text.startswith(prefix):
            return None
        content = str(message["content"])
        # A lead such as an empty thinking block may be written for the last turn only.
        for lead, kept in ((shape.lead, shape.trained_lead), ("", "")):
            for variant in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
                if variant and self.text.startswith(lead + variant + shape.closing, len(prefix)):
                    start = len(prefix) + len(lead)
                    body_end = start + len(variant)
                    end = body_end + len(shape.closing)
                    return Turn(index, start - len(kept), end, body_end, closed=True, verbatim=True)
        return None

    def locate(self, index: int) -> Turn | None:
        """The turn by rendering around it; None where that leaves a doubt."""
        shape = self.spans.probe(self, index)
        if shape is None:
            return None
        return self._from_prefix(index, shape) or self._from_stand_in(index, shape)

    def _from_prefix(self, index: int, shape: _Shape) -> Turn | None:
        """Compare the conversation up to this turn with the one before it. Needs a template that keeps its prefixes."""
        prefix = self.prefix(index)
        if prefix is None:
            return None
        try:
            until = self.render(self.messages[: index + 1])
        except RowError:
            return None
        if not until.startswith(prefix) or not until.endswith(shape.tail):
            return None
        start = len(prefix)
        if shape.lead and not shape.prompted and until.startswith(shape.lead, start):
            start += len(shape.lead) - len(shape.trained_lead)
        elif not shape.prompted and shape.lead.strip():
            return None  # without a generation prompt the role's header must be recognised
        body_end = len(until) - len(shape.tail)
        end = body_end + len(shape.closing)
        if body_end <= start or not self.text.startswith(until[:end]):
            return None
        if not shape.closing and shape.inner_closing and self.text.startswith(shape.inner_closing, end):
            end += len(shape.inner_closing)
        return self._turn(index, start, body_end, end, end > body_end)

    def _from_stand_in(self, index: int, shape: _Shape) -> Turn | None:
        """Put a stand-in where the turn's content is, in the whole conversation, and compare what surrounds it."""
        word = self.stand_in(0)
        replaced = {"role": "assistant", "content": word}
        try:
            split = _split_once(self.render([*self.messages[:index], replaced, *self.messages[index + 1 :]]), word)
        except RowError:
            return None
        if split is None:
            return None
        head, tail = split
        if shape.trained_lead and head.endswith(shape.trained_lead):
            head = head[: -len(shape.trained_lead)]
        body_end = len(self.text) - len(tail)
        if not self.text.startswith(head) or not self.text.endswith(tail) or body_end <= len(head):
            return None
        closing = next((mark for mark in (shape.closing, shape.inner_closing) if mark and tail.startswith(mark)), "")
        turn = self._turn(index, len(head), body_end, body_end + len(closing), bool(closing))
        return turn if turn is None or self._independent_of_what_follows(turn) else None

    def _independent_of_what_follows(self, turn: Turn) -> bool:
        """Whether the turn's text stays when the next message changes: some templates write a tool's answer into the call."""
        following = turn.index + 1
        if following == len(self.messages) or self.messages[following]["role"] == "assistant":
            return True
        changed = {**self.messages[following], "content": self.stand_in(1)}
        try:
            text = self.render([*self.messages[:following], changed, *self.messages[following + 1 :]])
        except RowError:
            return False
        return text.startswith(self.text[: turn.end])

    def _turn(self, index: int, start: int, body_end: int, end: int, closed: bool) -> Turn | None:
        content = str(self.messages[index].get("content", "")).strip()
        body = self.text[start:body_end]
        verbatim = bool(content) and content in body
        # A body that is empty, or shares nothing with the content, means that the comparison found something else.
        if not verbatim and (not self.spans.has_words(body) or (content and not _related(content, body))):
            return None
        return Turn(index, start, end, body_end, closed, verbatim or not content)


def _related(content: str, body: str) -> bool:
    """Whether `body` is what a template left of the content: its beginning or its end."""
    return body.strip() in content or content.endswith(body.split()[-1])


def _split_once(text: str, word: str) -> tuple[str, str] | None:
    """The text before and after `word`; None unless it occurs exactly once."""
    head, found, tail = text.partition(word)
    return (head, tail) if found and word not in tail else None


def _shared_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
