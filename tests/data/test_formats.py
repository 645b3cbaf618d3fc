"""Every known form in its normal form; what fits none, or has a bad value, says so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from lorabank.config.train import DataConfig
from lorabank.data.formats import FORMATS, Example, Normaliser, detect_format
from lorabank.data.row import NanError, Row, RowError
from lorabank.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine"}
TURNS = (USER, ASSISTANT)

GOOD: dict[str, tuple[str, dict[str, Any], Example]] = {
    "messages": ("messages", {"messages": [USER, ASSISTANT]}, Example(kind="messages", messages=TURNS)),
    "messages beside a prompt column": (
        "messages",
        {"prompt": "Hello", "messages": [USER, ASSISTANT]},
        Example(kind="messages", messages=TURNS),
    ),
    "messages as JSON text, as in CSV": ("messages", {"messages": json.dumps(TURNS)}, Example(kind="messages", messages=TURNS)),
    "keys that Arrow fills in": (
        "messages",
        {"messages": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None}], "tools": None},
        Example(kind="messages", messages=TURNS),
    ),
    "text parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}, ASSISTANT]},
        Example(kind="messages", messages=TURNS),
    ),
    "tools and template arguments": (
        "messages",
        {"messages": [USER, ASSISTANT], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}},
        Example(kind="messages", messages=TURNS, tools=({"name": "f"},), template_kwargs={"enable_thinking": False}),
    ),
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "Hello", "completion": "Fine"},
        Example(kind="completion", prompt="Hello", completion="Fine"),
    ),
    "conversational prompt and completion": (
        "prompt-completion",
        {"prompt": [USER], "completion": [ASSISTANT]},
        Example(kind="messages", messages=TURNS, prompt_turns=1),
    ),
    "ShareGPT": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Fine"}], "system": "Be terse."},
        Example(kind="messages", messages=({"role": "system", "content": "Be terse."}, *TURNS)),
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        Example(
            kind="completion",
            prompt="Add\n\n1 2",
            plain_prompt="### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n",
            completion="3",
        ),
    ),
    "Alpaca without input": (
        "alpaca",
        {"instruction": "Hello", "input": "", "output": "Fine"},
        Example(kind="completion", prompt="Hello", plain_prompt="### Instruction:\nHello\n\n### Response:\n", completion="Fine"),
    ),
    "text": ("text", {"text": "Hello", "id": 3}, Example(kind="text", text="Hello")),
}


def normalise(values: dict[str, Any], **config: Any) -> Example:
    return Normaliser(DataConfig(**config))(Row(values, "a.jsonl:3"))


@pytest.mark.parametrize("name", GOOD)
def test_known_forms(name: str) -> None:
    form, values, expected = GOOD[name]
    assert detect_format(values) == form
    example = normalise(values)
    assert example.origin == "a.jsonl:3"
    assert Example(**{**vars(example), "origin": ""}) == expected


def test_every_form_is_tested() -> None:
    assert {form for form, _, _ in GOOD.values()} == set(FORMATS)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"messages": "Hello"}, "expected a list or its JSON text"),
    "a number": ({"messages": 3}, "expected a list, got int"),
    "no turns": ({"messages": []}, "empty list"),
    "missing": ({"messages": None}, "'messages' is missing"),
    "turn that is text": ({"messages": ["Hello"]}, "expected turns with role and content, got str"),
    "no role": ({"messages": [{"content": "Hello"}]}, "no role"),
    "no content": ({"messages": [{"role": "user"}]}, "the user turn has no content"),
    "empty turn": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the assistant turn is empty"),
    "content of another type": ({"messages": [{"role": "user", "content": {"a": 1}}]}, "expected text, got dict"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
    "infinity": ({"prompt": "a", "completion": math.inf}, "column 'completion' is inf, expected text"),
    "None": ({"prompt": "a", "completion": None}, "column 'completion' is missing"),
    "empty": ({"prompt": "a", "completion": "  "}, "column 'completion' is empty"),
    "one list, one text": ({"prompt": [USER], "completion": "Fine"}, "expected both alike"),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown speaker 'narrator'"),
    "bool": ({"text": True}, "expected text, got bool"),
    "half a surrogate pair": ({"text": "caf\ud83d"}, "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_their_line(name: str) -> None:
    values, expected = BAD[name]
    with pytest.raises(RowError) as caught:
        normalise(values)
    assert expected in caught.value.reason
    assert str(caught.value).startswith("a.jsonl:3: ")


NAN: dict[str, tuple[str, dict[str, Any]]] = {
    "a text": ("completion", {"prompt": "a", "completion": math.nan}),
    "NumPy's": ("text", {"text": np.float32("nan")}),
    "the other is a list of turns": ("prompt", {"prompt": math.nan, "completion": [ASSISTANT]}),
    "in place of turns": ("messages", {"messages": math.nan}),
    "a role": ("messages", {"messages": [{"role": math.nan, "content": "Hello"}, ASSISTANT]}),
    "a content": ("messages", {"messages": [{"role": "user", "content": math.nan}, ASSISTANT]}),
    "a text part": ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": math.nan}]}, ASSISTANT]}),
    "tools": ("tools", {"messages": [USER, ASSISTANT], "tools": math.nan}),
    "template arguments": ("chat_template_kwargs", {"messages": [USER, ASSISTANT], "chat_template_kwargs": math.nan}),
    "a speaker": ("conversations", {"conversations": [{"from": math.nan, "value": "Hello"}]}),
    "a system turn": ("system", {"instruction": "Add", "output": "3", "system": math.nan}),
    "an input": ("input", {"instruction": "Add", "input": math.nan, "output": "3"}),
}


@pytest.mark.parametrize("name", NAN)
def test_nan_names_its_column(name: str) -> None:
    column, values = NAN[name]
    with pytest.raises(NanError) as caught:
        normalise(values)
    assert str(caught.value) == f"a.jsonl:3: column {column!r} holds NaN"


def test_no_known_form_lists_columns_and_forms() -> None:
    with pytest.raises(DataError) as caught:
        normalise({"question": "a", "answer": "b"})
    message = str(caught.value)
    assert not isinstance(caught.value, RowError), "the first row speaks for all"
    assert "a.jsonl:3" in message and "'question', 'answer'" in message
    assert all(form.columns in message for form in FORMATS.values())
    assert 'data.prompt: "{question}" and data.completion: "{answer}"' in message


def test_a_later_row_without_a_form_is_dropped() -> None:
    normaliser = Normaliser(DataConfig())
    normaliser(Row({"text": "a"}, "a.jsonl:1"))
    with pytest.raises(RowError, match=r"a.jsonl:2: its columns .txt. fit no known form"):
        normaliser(Row({"txt": "a"}, "a.jsonl:2"))
    with pytest.raises(RowError, match=r"'text' is missing|fit no known form"):
        normaliser(Row({}, "a.jsonl:3"))
    assert normaliser.forms_seen == {"text": 1}


def test_templates_fill_in_columns() -> None:
    example = normalise(
        {"mr": "name[x]", "n": 3, "ref": "X."}, prompt="Describe {{{n}}}: {mr}", completion="{ref}", group_by="mr"
    )
    assert (example.prompt, example.completion, example.group) == ("Describe {3}: name[x]", "X.", "name[x]")


@pytest.mark.parametrize(
    ("config", "error", "expected"),
    [
        ({"prompt": "{mrs}", "completion": "{ref}"}, DataError, r"data.prompt: no column 'mrs'.*did you mean 'mr'.*'mr', 'ref'"),
        ({"prompt": "{mr}", "completion": "{reff}"}, DataError, "data.completion: no column 'reff'.*did you mean 'ref'"),
        (
            {"prompt": "{mr}", "completion": "{ref}", "group_by": "Mr"},
            DataError,
            "data.group_by: no column 'Mr'.*did you mean 'mr'",
        ),
        ({"prompt": "{mr", "completion": "{ref}"}, ConfigError, "is no template"),
        ({"prompt": "{}", "completion": "{ref}"}, ConfigError, "plain column names"),
        ({"prompt": "{mr:>10}", "completion": "{ref}"}, ConfigError, "plain column names"),
        ({"prompt": "Describe", "completion": "{ref}"}, ConfigError, "names no column"),
    ],
)
def test_bad_templates(config: dict[str, str], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected) as caught:
        normalise({"mr": "a", "ref": "b"}, **config)
    assert not isinstance(caught.value, RowError)


@pytest.mark.parametrize(
    ("ref", "expected"), [("", "completion is empty"), (None, "missing"), (math.nan, "column 'ref' holds NaN"), ([], "got list")]
)
def test_bad_values_in_templates(ref: object, expected: str) -> None:
    with pytest.raises(RowError, match=expected):
        normalise({"mr": "a", "ref": ref}, prompt="{mr}", completion="{ref}")
