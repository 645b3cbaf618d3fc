"""Forms of rows: which one a row has, and its normal form, an `Example`."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Literal

from lorabank.config.train import DataConfig
from lorabank.data.row import NanError, Row, RowError
from lorabank.errors import ConfigError, DataError, Setting, closest

Message = dict[str, Any]
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row in its normal form. Which fields are filled follows `kind`."""

    kind: Literal["messages", "completion", "text"]
    """`messages`: a conversation. `completion`: a prompt string and its answer. `text`: text to continue."""
    origin: str = ""
    messages: tuple[Message, ...] = ()
    """Turns with at least `role` and, unless they only call tools, `content`."""
    prompt_turns: int | None = None
    """Of `messages`, how many are the prompt, where the row says so; None: the row has no such border."""
    prompt: str = ""
    """The prompt of a `completion`: the user's turn where it is rendered as a chat."""
    plain_prompt: str | None = None
    """What stands for `prompt` where no chat template is used; None: `prompt` itself."""
    completion: str = ""
    text: str = ""
    tools: tuple[Any, ...] | None = None
    """JSON schemas of the functions that the model may call."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, from the column `chat_template_kwargs`."""
    group: str | None = None
    """Value of the column `group_by`."""

    @property
    def key(self) -> str:
        """The content as one string, the same for equal rows wherever they came from and whichever tokenizer reads them."""
        if self.kind == "text":
            return self.text
        content = self.messages or (self.plain_prompt or self.prompt, self.completion)
        return json.dumps([content, self.tools], ensure_ascii=False, sort_keys=True, default=str)


@dataclass(frozen=True)
class Form:
    """One known form of rows."""

    columns: str
    """How the form is shown to a user."""
    matches: Callable[[Collection[str], Values], bool]
    """Whether a row with these column names (and, where names don't suffice, these values) has the form."""
    parse: Callable[[Values], Example]
    """The row's normal form; raises RowError where a value doesn't fit."""


def text_of(values: Values, column: str, *, may_be_empty: bool = False) -> str:
    """A column's text. Numbers become text; missing, empty and nested values are RowErrors, NaN a NanError."""
    if column not in values or values[column] is None:
        raise RowError(f"column {column!r} is missing")
    refuse_nan(values[column], column)
    return checked_text(values[column], f"column {column!r}", may_be_empty=may_be_empty)


def refuse_nan(value: object, column: str) -> None:
    """Raise NanError for the number NaN, which is how tables hold a missing value. The text "NaN" is text."""
    if not isinstance(value, str) and isinstance(value, numbers.Real) and math.isnan(value):
        raise NanError(column)


def checked_text(value: object, what: str, *, may_be_empty: bool = False) -> str:
    """The value as text. Raises RowError, about `what`, for what is no text that can be encoded."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{what} is {value}, expected text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{what}: expected text, got {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise RowError(f"{what} is empty")
    if not value.isascii() and any("\ud800" <= mark <= "\udfff" for mark in value):
        raise RowError(f"{what} holds half of a surrogate pair, which is no text")
    return value


def _parse_json(value: object, what: str) -> object:
    """CSV has only strings, so lists and objects may come as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{what}: expected a list or its JSON text, got other text") from error


def _list_of(values: Values, column: str) -> list[Any]:
    if column not in values or values[column] is None:
        raise RowError(f"column {column!r} is missing")
    refuse_nan(values[column], column)
    value = _parse_json(values[column], f"column {column!r}")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"column {column!r}: expected a list, got {type(value).__name__}")
    if not value:
        raise RowError(f"column {column!r} is an empty list")
    return list(value)


def _content_text(content: object, column: str) -> str:
    """A turn's text; a list of text parts is joined, a part that is no text is refused."""
    what = f"column {column!r}: the content of a turn"
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        parts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if not isinstance(part, Mapping) or kind != "text":
                raise RowError(f"{what} holds a part of type {kind!r}; only text can be trained on")
            refuse_nan(part.get("text"), column)
            parts.append(checked_text(part.get("text"), what, may_be_empty=True))
        return "".join(parts)
    return checked_text(content, what, may_be_empty=True)


def _messages(items: list[Any], column: str) -> tuple[Message, ...]:
    messages = []
    for item in items:
        if not isinstance(item, Mapping):
            raise RowError(f"column {column!r}: expected turns with role and content, got {type(item).__name__}")
        # Arrow fills absent keys with None; a chat template must not print them.
        message = {key: value for key, value in item.items() if value is not None}
        for key in ("role", "content", "tool_calls"):
            refuse_nan(message.get(key), column)
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RowError(f"column {column!r}: a turn has no role")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, Sequence):
            raise RowError(f"column {column!r}: tool_calls: expected a list, got {type(calls).__name__}")
        if "content" in message:
            message["content"] = _content_text(message["content"], column)
        if not calls and "content" not in message:
            raise RowError(f"column {column!r}: the {role} turn has no content")
        if not calls and role in ("user", "assistant") and not message["content"].strip():
            raise RowError(f"column {column!r}: the {role} turn is empty")
        messages.append(message)
    return tuple(messages)


def _extras(values: Values) -> dict[str, Any]:
    """Columns that any conversation may have beside its turns."""
    extras: dict[str, Any] = {}
    if values.get("tools") not in (None, "", [], "[]"):
        extras["tools"] = tuple(_list_of(values, "tools"))
    kwargs = values.get("chat_template_kwargs")
    refuse_nan(kwargs, "chat_template_kwargs")
    if kwargs:
        parsed = _parse_json(kwargs, "column 'chat_template_kwargs'")
        if not isinstance(parsed, Mapping):
            raise RowError(f"column 'chat_template_kwargs': expected an object, got {type(parsed).__name__}")
        extras["template_kwargs"] = dict(parsed)
    return extras


def turns_in(values: Values, column: str) -> Example:
    """A column of turns, a list or its JSON text, as an Example. Raises RowError naming the column."""
    return Example(kind="messages", messages=_messages(_list_of(values, column), column), **_extras(values))


def _parse_messages(values: Values) -> Example:
    return turns_in(values, "messages")


def is_list(value: object) -> bool:
    """Whether a column holds turns: a list, or its JSON text."""
    if isinstance(value, str):
        # JSON text, as a CSV file holds it; other text may begin with a list of objects too, but those have no role
        return value.startswith("[{") and '"role"' in value
    return isinstance(value, Sequence) and not isinstance(value, bytes)


def _parse_prompt_completion(values: Values) -> Example:
    for column in ("prompt", "completion"):
        refuse_nan(values.get(column), column)
    conversational = is_list(values.get("prompt")), is_list(values.get("completion"))
    if conversational[0] != conversational[1]:
        raise RowError("one of 'prompt' and 'completion' is a list of turns and the other is text; expected both alike")
    if conversational[0]:
        prompt = _messages(_list_of(values, "prompt"), "prompt")
        completion = _messages(_list_of(values, "completion"), "completion")
        return Example(kind="messages", messages=prompt + completion, prompt_turns=len(prompt), **_extras(values))
    return Example(
        kind="completion", prompt=text_of(values, "prompt"), completion=text_of(values, "completion"), **_extras(values)
    )


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _parse_sharegpt(values: Values) -> Example:
    turns = []
    for item in _list_of(values, "conversations"):
        if not isinstance(item, Mapping):
            raise RowError(f"column 'conversations': expected turns with from and value, got {type(item).__name__}")
        if "from" not in item:
            turns.append(item)  # role/content turns under ShareGPT's column name
            continue
        speaker = item["from"]
        refuse_nan(speaker, "conversations")
        role = _SHAREGPT_ROLES.get(str(speaker).lower())
        if role is None:
            raise RowError(f"column 'conversations': unknown speaker {speaker!r}; known: {', '.join(_SHAREGPT_ROLES)}")
        turns.append({"role": role, "content": item.get("value")})
    messages = _messages(turns, "conversations")
    return Example(kind="messages", messages=_with_system(messages, values.get("system")), **_extras(values))


def _with_system(messages: tuple[Message, ...], system: object) -> tuple[Message, ...]:
    refuse_nan(system, "system")
    if not isinstance(system, str) or not system.strip() or any(m["role"] == "system" for m in messages):
        return messages
    return ({"role": "system", "content": system}, *messages)


def _parse_alpaca(values: Values) -> Example:
    instruction, output = text_of(values, "instruction"), text_of(values, "output")
    given = text_of(values, "input", may_be_empty=True) if values.get("input") is not None else ""
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    plain = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    turns = _with_system(({"role": "user", "content": prompt},), values.get("system"))
    if len(turns) > 1:
        turns = (*turns, {"role": "assistant", "content": output})
        return Example(kind="messages", messages=turns, prompt_turns=2)
    return Example(kind="completion", prompt=prompt, plain_prompt=plain, completion=output)


def _parse_text(values: Values) -> Example:
    return Example(kind="text", text=text_of(values, "text"))


def _has(*needed: str) -> Callable[[Collection[str], Values], bool]:
    return lambda columns, values: all(name in columns for name in needed)


FORMATS: dict[str, Form] = {
    "messages": Form("messages: [{role, content}, …] (and tools)", _has("messages"), _parse_messages),
    "prompt-completion": Form(
        "prompt, completion: two texts, or two lists of turns", _has("prompt", "completion"), _parse_prompt_completion
    ),
    "sharegpt": Form("conversations: [{from, value}, …] (ShareGPT)", _has("conversations"), _parse_sharegpt),
    "alpaca": Form("instruction, input, output (Alpaca)", _has("instruction", "output"), _parse_alpaca),
    "text": Form("text", _has("text"), _parse_text),
}
"""Name to form, tried in this order. To add one: a `Form` whose `parse` takes a row's values and returns an `Example`."""


def detect_format(values: Values) -> str:
    """The name in FORMATS of a row's form. Raises DataError that lists the columns found and the forms known."""
    columns = list(values)
    for name, form in FORMATS.items():
        if form.matches(columns, values):
            return name
    known = "".join(f"\n  - {form.columns}" for form in FORMATS.values())
    example = columns[0] if columns else "column"
    last = columns[-1] if columns else "column"
    raise DataError(
        f"columns {', '.join(map(repr, columns)) or '(none)'} fit no known form. Known forms:{known}\n"
        f'Or name your own columns: data.prompt: "{{{example}}}" and data.completion: "{{{last}}}".'
    )


def template_columns(template: str, *, place: str) -> list[str]:
    """Columns that a template names in braces. Raises ConfigError, in the name of `place`, for a malformed one or one without."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            Setting(place), f": {template!r} is no template: {error}. For literal braces write {{{{ }}}}"
        ) from error
    columns = []
    for _, column, spec, conversion in pieces:
        if column is None:
            continue
        if not column or spec or conversion:
            raise ConfigError(Setting(place), f": {template!r}: expected plain column names in braces, such as {{question}}")
        columns.append(column)
    if not columns:
        raise ConfigError(
            Setting(place), f": {template!r} names no column, so every row would get the same text. Use {{column}}."
        )
    return columns


def _fill(template: str, values: Values, *, what: str) -> str:
    parts = []
    for literal, column, _, _ in Formatter().parse(template):
        parts.append(literal)
        if column is not None:
            parts.append(text_of(values, column, may_be_empty=True))
    text = "".join(parts)
    columns = [column for _, column, _, _ in Formatter().parse(template) if column]
    if all(not str(values[column]).strip() for column in columns):
        raise RowError(f"the {what} is empty: column {', '.join(map(repr, columns))} holds nothing")
    return text


_NOTHING = frozenset(("NaN", "nan", "NAN", "null", "NULL", "None", "<NA>"))
"""How a missing value looks once a tool has written it as text."""
MISSING_WORD = "the whole text of a column is NaN, null or None, which is trained as that word"


def is_missing_word(text: object) -> bool:
    """Whether a whole text is a word that tools write for a missing value: trained as that word, and noted (`MISSING_WORD`)."""
    return isinstance(text, str) and text.strip() in _NOTHING


class Normaliser:
    """Turns rows into Examples. It fails at once where the first row shows that no row can fit; later misfits are RowErrors."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._forms: dict[frozenset[str], str] = {}
        self._checked = False
        self.forms_seen: dict[str, int] = {}
        """Form to number of rows."""
        self.notes: dict[str, list[str]] = {}
        """Sentence for the user to the origins of the rows it is about."""
        self._columns: list[str] = []  # of the templates

    def __call__(self, row: Row) -> Example:
        """The row's Example. Raises RowError (drop this row) or DataError/ConfigError (give up)."""
        if not self._checked:
            self._check_columns(row)
            self._checked = True
        try:
            name, example = self._parse(row)
            group = None if self.config.group_by is None else text_of(row.values, self.config.group_by, may_be_empty=True)
        except RowError as error:
            raise error.at(row.origin) from error
        self.forms_seen[name] = self.forms_seen.get(name, 0) + 1
        texts = [row.values[c] for c in self._columns] or [example.prompt, example.completion, example.text]
        if any(map(is_missing_word, texts)):
            self.notes.setdefault(MISSING_WORD, []).append(row.origin)
        return replace(example, origin=row.origin, group=group)

    def _parse(self, row: Row) -> tuple[str, Example]:
        config = self.config
        if config.prompt is not None and config.completion is not None:
            prompt = _fill(config.prompt, row.values, what="prompt")
            return "template", Example(
                kind="completion", prompt=prompt, completion=_fill(config.completion, row.values, what="completion")
            )
        columns = frozenset(row.values)
        name = self._forms.get(columns)
        if name is None:
            try:
                name = detect_format(row.values)
            except DataError as error:
                raise RowError(f"its columns ({', '.join(sorted(columns))}) fit no known form") from error
            self._forms[columns] = name
        return name, FORMATS[name].parse(row.values)

    def _check_columns(self, row: Row) -> None:
        """Settings and the first row: a misspelt column is everyone's fault, not one row's."""
        named = {"group_by": [self.config.group_by] if self.config.group_by else []}
        for name, template in (("prompt", self.config.prompt), ("completion", self.config.completion)):
            named[name] = template_columns(template, place=f"data.{name}") if template is not None else []
        self._columns = named["prompt"] + named["completion"]
        for setting, columns in named.items():
            for column in columns:
                if column not in row.values:
                    found = ", ".join(map(repr, row.values))
                    hint = closest(column, row.values)
                    raise DataError(
                        Setting(f"data.{setting}"), f": no column {column!r} in {row.origin}{hint}; its columns: {found}"
                    )
        if self.config.prompt is None:
            try:
                detect_format(row.values)
            except DataError as error:
                raise DataError(f"{row.origin}: {error}") from error
