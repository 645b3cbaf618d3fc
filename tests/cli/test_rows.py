"""`predict` asks what training taught: its prompt ids are those of the same row in training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lorabank.config.train import DataConfig
from lorabank.data.prompt import chat_prompt_ids
from lorabank.data.row import RowError
from lorabank.tasks.asked_prompts import prompt_of, read_prompts
from tests.data.conftest import CHATML, build_tokenizer

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}{{ style | default('') }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is defined %}{{ m['content'] }}{% endif %}"
    "{% if m['tool_calls'] is defined %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_GENERATION_PROMPT = CHATML.partition("{% if add")[0]
PLAIN = {"chat": False}
HI, FINE = {"role": "user", "content": "hi 0"}, {"role": "assistant", "content": "fine"}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " 0"}]}, FINE]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, FINE]
TEMPLATE = {"prompt": "Say {q} {more}", "completion": "{a}"}


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    return build_tokenizer(template, eos="<|im_end|>", bos="<s>", adds_bos=template is None)


@pytest.mark.parametrize(
    ("template", "row", "settings", "without"),
    [
        (CHATML, {"prompt": "name 0", "completion": "value"}, {}, "completion"),
        (CHATML, {"prompt": "name 0", "completion": "value"}, PLAIN, "completion"),
        (CHATML, {"prompt": "name: ", "completion": "value"}, PLAIN, "completion"),
        (CHATML, {"prompt": "name 0", "completion": "value"}, {"system": "Be kind."}, "completion"),
        (None, {"prompt": "name 0", "completion": " value"}, {}, "completion"),
        (CHATML, {"prompt": [HI], "completion": [FINE]}, {"system": "Be kind."}, "completion"),
        (CHATML, {"prompt": json.dumps([HI]), "completion": json.dumps([FINE])}, {}, "completion"),
        (CHATML, {"prompt": '[{"sku": 1}] describe', "completion": "value"}, {}, "completion"),
        (CHATML, {"instruction": "say 0", "input": "n 0", "output": "0"}, {}, "output"),
        (CHATML, {"instruction": "say 0", "input": "n 0", "output": "0"}, PLAIN, "output"),
        (None, {"instruction": "say 0", "input": "n 0", "output": "0"}, {}, "output"),
        (CHATML, {"instruction": "say 0", "output": "0", "system": "Be nice."}, {"system": "Be kind."}, "output"),
        (CHATML, {"messages": [HI, FINE]}, {"system": "Be kind."}, "answer"),
        (CHATML, {"messages": [HI, FINE, HI, FINE]}, {"train_on": "completion"}, "answer"),
        (CHATML, {"messages": PARTS}, {}, "answer"),
        (CHATML, {"messages": json.dumps([HI, FINE])}, {}, "answer"),
        (TOOLS, {"messages": CALLED, "tools": [CALL], "chat_template_kwargs": {"style": "!"}}, {}, "answer"),
        (TOOLS, {"messages": CALLED[:2], "tools": json.dumps([CALL])}, {}, "answer"),
        (NO_GENERATION_PROMPT, {"messages": [HI, FINE]}, {}, "answer"),
        (
            CHATML,
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "S"},
            {},
            "answer",
        ),
        (CHATML, {"q": 1.5, "more": "", "a": "y"}, TEMPLATE, "a"),
        (CHATML, {"q": 1.5, "more": "x", "a": "y"}, {**TEMPLATE, **PLAIN}, "a"),
    ],
)
def test_predict_asks_what_training_taught(
    template: str | None, row: dict[str, Any], settings: Mapping[str, Any], without: str, tmp_path: Path
) -> None:
    """With the row's answer and, more usual, without it: its column is missing, or the last turn is."""
    from lorabank.data.prepare import prepare

    tokenizer, config, path = tokenizer_with(template), DataConfig(val_split=0, **settings), tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (trained,) = prepare(config, tokenizer, seed=0, train=str(path)).train
    unanswered = {name: value for name, value in row.items() if name != without}
    for column in {"messages", "conversations"} & row.keys():
        turns = row[column]
        unanswered[column] = json.dumps(json.loads(turns)[:-1]) if isinstance(turns, str) else turns[:-1]
    for values in (row, unanswered):
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")
        (asked,) = read_prompts(str(path))
        prompt = prompt_of(asked, template=config.prompt, completion=config.completion, system=config.system)
        ids = chat_prompt_ids(tokenizer, prompt, chat=config.chat)
        assert ids == list(trained.prompt_ids), tokenizer.decode(ids)


def test_a_conversation_without_a_template_is_its_texts() -> None:
    """What `chat` sends: the text alone, as a run with `data.chat: false` was trained, and tools are refused."""
    tokenizer = tokenizer_with(CHATML)
    assert tokenizer.decode(chat_prompt_ids(tokenizer, [HI], chat=False)) == "hi 0"
    assert tokenizer.decode(chat_prompt_ids(tokenizer, [HI, FINE, HI], chat=False)) == "hi 0\nfine\nhi 0"
    assert tokenizer.decode(chat_prompt_ids(tokenizer, [HI])) == "<|im_start|>user\nhi 0<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(RowError, match="tools and their calls need a chat template"):
        chat_prompt_ids(tokenizer, CALLED[:3], chat=False)


def test_a_stream_takes_the_runs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`chat` and `predict` both ask through `generate_stream`, which knows the run."""
    from lorabank import api

    asked: list[list[int]] = []

    def stream(bank: object, prompts: list[list[int]], *rest: object, **more: object) -> list[object]:
        asked.extend(prompts)
        return []

    monkeypatch.setattr("lorabank.engine.generate.stream", stream)
    monkeypatch.setattr("lorabank.engine.step.Engine", lambda bank: bank)
    monkeypatch.setattr("lorabank.training.evaluate.end_tokens", lambda engine, tokenizer: [])
    tokenizer = tokenizer_with(CHATML)
    run: Any = SimpleNamespace(bank=None, tokenizer=tokenizer, config=SimpleNamespace(data=DataConfig(chat=False)))
    list(api.generate_stream(run, [("base", [HI])]))
    assert tokenizer.decode(asked[0]) == "hi 0"
