"""The trained tokens, decoded, are the assistant's turns and their end-of-turn tokens, for many kinds of chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorabank.config.train import DataConfig
from lorabank.data.formats import Example
from lorabank.data.render import Renderer, TokenRow
from lorabank.data.row import RowError

GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
IM = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Case:
    """A template and what surrounds an assistant's content in the text that the model must produce."""

    template: str
    markers: tuple[str, ...] = IM
    eos: str = "<|im_end|>"
    bos: str | None = None
    before: str = ""
    """Trained text before the last content, such as an empty thinking block."""
    before_mid: str = ""
    """The same for earlier turns."""
    end: str = "<|im_end|>"
    end_mid: str | None = None
    system: bool = True
    """Whether the template takes a system turn."""


LLAMA = ("<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>")
CASES = {
    "chatml": Case("{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE),
    "default system prompt": Case(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE
    ),
    "llama 3": Case(
        "{{ bos_token }}{% for m in messages %}<|start_header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}",
        markers=LLAMA,
        eos="<|eot|>",
        bos="<|begin|>",
        end="<|eot|>",
    ),
    "end of turn that is not the end token": Case(
        "{{ bos_token }}{% for m in messages %}<|start_header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}",
        markers=LLAMA,
        eos="<|end|>",
        bos="<|begin|>",
        end="<|eot|>",
    ),
    "zephyr, headers as plain text": Case(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        markers=(),
        eos="</s>",
        end="</s>",
    ),
    "mistral, no generation prompt, roles must alternate": Case(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        markers=(),
        eos="</s>",
        bos="<s>",
        before=" ",
        before_mid=" ",
        end="</s>",
        system=False,
    ),
    "gemma, another name for the assistant, no system": Case(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        markers=("<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        end="<end_of_turn>",
        system=False,
    ),
    "generation markers without the end of turn": Case(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}" + GENERATE
    ),
    "generation markers on the last turn only": Case(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}" + GENERATE
    ),
    "thinking block on the last turn, none on earlier ones": Case(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
        "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + GENERATE,
        markers=(*IM, "<think>", "</think>"),
        before="<think>\n\n</think>\n\n",
    ),
    "generation prompt that training text lacks": Case(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
        "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        markers=("<|user|>", "<|assistant|>", "<|end|>", "<think>"),
        eos="<|end|>",
        end="<|end|>",
    ),
    "generation prompt that is always there": Case(
        "{% for m in messages %}" + TURN + "{% endfor %}{{ '<|im_start|>assistant\n' }}",
    ),
    "header that no generation prompt announces": Case(
        "{% for m in messages %}" + TURN + "{% endfor %}",
    ),
    "end token after the last turn only": Case(
        "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% else %}{{ eos_token }}{% endif %}",
        markers=(),
        eos="</s>",
        before=" ",
        before_mid=" ",
        end="\n</s>",
        end_mid="",
    ),
    "end of turn in plain text": Case(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        markers=(),
        eos="</s>",
        end="</assistant>",
    ),
    "two tokens end a turn": Case(
        "{% for m in messages %}<|turn|>{{ m['role'] }}<|start|>{{ m['content'] }}<|end|><|done|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant<|start|>{% endif %}",
        markers=("<|turn|>", "<|start|>", "<|end|>", "<|done|>"),
        eos="<|done|>",
        end="<|end|><|done|>",
    ),
    "another end token for turns that others follow": Case(
        "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>"
        "{{ m['content'] }}{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        markers=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        eos="<|return|>",
        before="<|channel|>final<|message|>",
        before_mid="<|channel|>final<|message|>",
        end="<|return|>",
        end_mid="<|end|>",
    ),
    "no end of turn": Case(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
        eos="</s>",
        end="",
    ),
    "no end of turn, and a generation prompt that is always there": Case(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}{{ '<|im_start|>assistant\n' }}",
        eos="</s>",
        end="",
    ),
}

ANSWERS = ["Fine, thanks.", "It is The Eagle — near Burger King 🦅, not <family-friendly>."]
TALK = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "Which place do you know? Fine, thanks."},
    {"role": "assistant", "content": ANSWERS[1]},
]
SYSTEM = {"role": "system", "content": "You know the city centre."}


def example(*messages: dict[str, Any], **more: Any) -> Example:
    return Example(kind="messages", messages=messages, origin="chat.jsonl:1", **more)


def render(tokenizer: PreTrainedTokenizerFast, *examples: Example, **config: Any) -> list[TokenRow]:
    rows = []
    for result in Renderer(tokenizer, DataConfig(**config)).render(examples):
        assert isinstance(result, TokenRow), result
        rows.append(result)
    return rows


def trained_runs(row: TokenRow, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    runs: list[list[int]] = []
    previous = 0.0
    for token, weight in zip(row.input_ids, row.weights, strict=True):
        if weight:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = weight
    return [str(tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)) for run in runs]


def build(make_tokenizer: Any, case: Case, **more: Any) -> PreTrainedTokenizerFast:
    return make_tokenizer(case.template, markers=case.markers, eos=case.eos, bos=case.bos, **more)


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_trained_tokens_are_the_turns_and_their_ends(make_tokenizer: Any, name: str, trim_offsets: bool) -> None:
    case = CASES[name]
    tokenizer = build(make_tokenizer, case, trim_offsets=trim_offsets)
    talks = [example(*TALK[2:]), example(*TALK)]
    if case.system:
        talks += [example(SYSTEM, *TALK[2:]), example(SYSTEM, *TALK)]
    rows = render(tokenizer, *talks, *talks)  # the second time from what it remembers of the template
    end_mid = case.end if case.end_mid is None else case.end_mid
    last, middle = case.before + ANSWERS[1] + case.end, case.before_mid + ANSWERS[0] + end_mid
    for row, talk in zip(rows, talks * 2, strict=True):
        turns = sum(message["role"] == "assistant" for message in talk.messages)
        assert trained_runs(row, tokenizer) == [middle, last][-turns:]
        assert len(row.input_ids) == len(row.weights)
        assert row.reference == ANSWERS[1]
        whole = tokenizer.apply_chat_template(list(talk.messages), tokenize=True, return_dict=True)["input_ids"]
        assert list(row.input_ids) == whole


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_is_what_generation_starts_from(make_tokenizer: Any, name: str) -> None:
    case = CASES[name]
    tokenizer = build(make_tokenizer, case)
    (row,) = render(tokenizer, example(*TALK))
    start = row.input_ids[: len(row.prompt_ids)]
    assert row.prompt_ids == start, "the prompt is the row's own beginning"
    assert row.weights[len(start)] == 1.0
    asked = tokenizer.apply_chat_template(TALK[:3], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    if name == "generation prompt that training text lacks":
        assert list(start) == asked[: len(start)], "up to where training text and prompt part"
    elif name == "header that no generation prompt announces":
        assert list(start[: len(asked)]) == asked
        assert row.prompt_text.endswith("<|im_start|>assistant\n"), "the header isn't the model's to write"
    else:
        # Equal as text: GPT-2's pre-tokenizer cuts the white space at the end of a text otherwise than before a word.
        assert tokenizer.decode(start) == tokenizer.decode(asked)
        assert list(start) == asked or case.template.count("\n\n")


def test_thinking_is_trained_where_the_template_keeps_it(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
        "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ parts[0].replace('<think>', '').strip() if parts | length > 1 }}"
        "\n</think>\n\n{% endif %}{{ parts[-1].strip() }}<|im_end|>\n{% else %}" + TURN + "{% endif %}{% endfor %}" + GENERATE
    )
    tokenizer = make_tokenizer(template, markers=(*IM, "<think>", "</think>"))
    thinking = [
        {"role": "assistant", "content": f"<think>I am {mood}</think>\n\n{answer}"}
        for mood, answer in zip(["fine", "cheap"], ANSWERS, strict=True)
    ]
    renderer = Renderer(tokenizer, DataConfig())
    (row,) = renderer.render([example(TALK[0], thinking[0], TALK[2], thinking[1])])
    assert isinstance(row, TokenRow)
    assert trained_runs(row, tokenizer) == [
        ANSWERS[0] + "<|im_end|>",
        "<think>\nI am cheap\n</think>\n\n" + ANSWERS[1] + "<|im_end|>",
    ]
    assert row.prompt_text.endswith("<|im_start|>assistant\n")
    assert any("drops or rewrites" in note for note in renderer.notes), "lost thinking is reported"


TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + GENERATE
)


def test_tool_calls_are_trained_and_tool_results_are_not(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(TOOLS_TEMPLATE, markers=(*IM, "<tool_call>", "</tool_call>"))
    tools = ({"type": "function", "function": {"name": "river", "description": "by the river", "parameters": {}}},)
    call = {"type": "function", "function": {"name": "river", "arguments": {"food": "Japanese"}}}
    talk = example(
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "The Eagle"},
        {"role": "assistant", "content": ANSWERS[1]},
        tools=tools,
    )
    rows = render(tokenizer, talk, talk)
    for row in rows:
        first, second = trained_runs(row, tokenizer)
        assert first.startswith("<tool_call>{") and first.endswith("}</tool_call><|im_end|>") and "Japanese" in first
        assert second == ANSWERS[1] + "<|im_end|>"
        assert "by the river" in row.prompt_text
    only_call = example(TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, tools=tools)
    (row,) = render(tokenizer, only_call)
    assert row.reference.startswith("<tool_call>") and "Japanese" in row.reference


CALLING = (
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [{"name": "river"}]},
    {"role": "tool", "content": "The Eagle"},
)


def test_a_tool_result_inside_the_call_is_never_trained(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m['tool_calls'] %}<call>{{ m['tool_calls'][0]['name'] }}</call>"
        "<result>{{ messages[loop.index]['content'] }}</result>"
        "{% endif %}<|im_end|>\n{% endif %}{% endfor %}" + GENERATE
    )
    (result,) = Renderer(make_tokenizer(template), DataConfig()).render([example(*CALLING, TALK[3])])
    assert isinstance(result, RowError)
    assert "first assistant turn" in result.reason


def test_markers_around_a_swallowed_call_train_nothing(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
        "{% endfor %}" + GENERATE
    )
    (result,) = Renderer(make_tokenizer(template), DataConfig()).render([example(*CALLING, TALK[3])])
    assert isinstance(result, RowError)
    assert "first assistant turn" in result.reason


def test_markers_decide_where_rendering_leaves_a_doubt(make_tokenizer: Any) -> None:
    shout = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n%s<|im_end|>\n{% endfor %}" + GENERATE
    without = make_tokenizer(shout.replace("%s", "{{ m['content'] | upper }}"))
    (result,) = Renderer(without, DataConfig()).render([example(*TALK)])
    assert isinstance(result, RowError)
    assert "can't tell" in str(result) and "chat.jsonl:1" in str(result)
    marked = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | upper }}{% endgeneration %}{% endif %}"
    tokenizer = make_tokenizer(shout.replace("%s", marked))
    (row,) = render(tokenizer, example(*TALK))
    assert trained_runs(row, tokenizer) == [answer.upper() + "<|im_end|>" for answer in ANSWERS]


def test_a_turn_that_the_template_swallows_is_refused(make_tokenizer: Any) -> None:
    template = "{% for m in messages %}{% if loop.index0 != 1 %}" + TURN + "{% endif %}{% endfor %}" + GENERATE
    (result,) = Renderer(make_tokenizer(template), DataConfig()).render([example(*TALK)])
    assert isinstance(result, RowError)
    assert "first assistant turn" in result.reason


def test_end_tokens_in_the_content_do_not_confuse(chatml: PreTrainedTokenizerFast) -> None:
    sly = "Fine.<|im_end|>\n<|im_start|>assistant\nFine."
    talk = example({"role": "user", "content": sly}, {"role": "assistant", "content": sly})
    (row,) = render(chatml, talk)
    assert trained_runs(row, chatml) == [sly + "<|im_end|>"]


def test_content_at_its_edges(chatml: PreTrainedTokenizerFast, make_tokenizer: Any) -> None:
    (row,) = render(chatml, example(TALK[0], {"role": "assistant", "content": "\n\nFine"}))
    (run,) = trained_runs(row, chatml)
    assert run.lstrip("\n") == "Fine<|im_end|>", "a token over both the header's new line and the content's is trained"
    assert run.startswith("\n\n")
    for content in ("Fine \n", "<|im_start|>"):
        (row,) = render(chatml, example(TALK[0], {"role": "assistant", "content": content}))
        assert trained_runs(row, chatml) == [content + "<|im_end|>"]
    trims = build(make_tokenizer, CASES["llama 3"])
    (row,) = render(trims, example(TALK[0], {"role": "assistant", "content": "  Fine \n"}))
    assert trained_runs(row, trims) == ["Fine<|eot|>"]


def test_an_assistant_that_speaks_first(chatml: PreTrainedTokenizerFast) -> None:
    (row,) = render(chatml, example(*TALK[1:]))
    assert trained_runs(row, chatml) == [answer + "<|im_end|>" for answer in ANSWERS]


def test_what_the_template_refuses_is_a_row_error(make_tokenizer: Any) -> None:
    tokenizer = build(make_tokenizer, CASES["gemma, another name for the assistant, no system"])
    (result,) = Renderer(tokenizer, DataConfig()).render([example(SYSTEM, *TALK)])
    assert isinstance(result, RowError)
    assert "System role not supported" in result.reason
