"""Prompt/completion and text rows, `train_on`, system turns, truncation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lorabank.config.train import DataConfig
from lorabank.data.formats import Example
from lorabank.data.render import Renderer, TokenRow
from lorabank.data.row import RowError
from lorabank.errors import ConfigError, DataError

PAIR = Example(kind="completion", prompt="Which place?", completion=" The Eagle.", origin="a.csv:2", group="g")
TALK = Example(
    kind="messages",
    messages=tuple(
        {"role": role, "content": content}
        for role, content in (("user", "Hello"), ("assistant", "Fine"), ("user", "Which place?"), ("assistant", "The Eagle"))
    ),
)


def one(tokenizer: PreTrainedTokenizerFast, example: Example, **config: Any) -> TokenRow:
    (row,) = Renderer(tokenizer, DataConfig(**config)).render([example])
    assert isinstance(row, TokenRow), row
    return row


def refused(tokenizer: PreTrainedTokenizerFast, example: Example, **config: Any) -> RowError:
    (row,) = Renderer(tokenizer, DataConfig(**config)).render([example])
    assert isinstance(row, RowError), row
    return row


def trained(row: TokenRow, tokenizer: PreTrainedTokenizerFast) -> str:
    ids = [token for token, weight in zip(row.input_ids, row.weights, strict=True) if weight]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_plain_prompt_and_completion(plain: PreTrainedTokenizerFast) -> None:
    row = one(plain, PAIR)
    assert plain.decode(row.input_ids) == "<s>Which place? The Eagle.</s>"
    assert trained(row, plain) == " The Eagle.</s>"
    assert list(row.prompt_ids) == plain("Which place?")["input_ids"]
    assert (row.prompt_text, row.reference, row.origin, row.group) == ("Which place?", " The Eagle.", "a.csv:2", "g")
    assert trained(one(plain, PAIR, train_on="all"), plain) == "Which place? The Eagle.</s>"


def test_a_completion_that_merges_into_the_prompt_is_encoded_apart(plain: PreTrainedTokenizerFast) -> None:
    pair = Example(kind="completion", prompt="The riv", completion="er")
    row = one(plain, pair)
    assert list(row.prompt_ids) == plain("The riv")["input_ids"]
    assert trained(row, plain) == "er</s>"


def test_a_prompt_that_ends_with_a_space(plain: PreTrainedTokenizerFast) -> None:
    row = one(plain, Example(kind="completion", prompt="Which place? ", completion="The Eagle."))
    assert trained(row, plain).lstrip() == "The Eagle.</s>"
    assert row.input_ids[: len(row.prompt_ids)] == row.prompt_ids


def test_text_is_trained_whole_but_for_the_first_token(plain: PreTrainedTokenizerFast, make_tokenizer: Any) -> None:
    row = one(plain, Example(kind="text", text="The Eagle is cheap."))
    assert trained(row, plain) == "The Eagle is cheap.</s>"
    assert row.weights[0] == 0.0
    assert plain.decode(row.prompt_ids) == "<s>" and row.prompt_text == "" and row.reference == "The Eagle is cheap."
    without_bos = one(make_tokenizer(None, eos="</s>"), Example(kind="text", text="The Eagle"))
    assert without_bos.weights[0] == 0.0, "nothing comes before it, so it can't be predicted"
    assert all(without_bos.weights[1:]) and without_bos.prompt_ids == ()


def test_pairs_go_through_the_chat_template_where_there_is_one(chatml: PreTrainedTokenizerFast) -> None:
    row = one(chatml, Example(kind="completion", prompt="Which place?", completion="The Eagle."))
    assert chatml.decode(row.prompt_ids) == "<|im_start|>user\nWhich place?<|im_end|>\n<|im_start|>assistant\n"
    assert trained(row, chatml) == "The Eagle.<|im_end|>"
    plainly = one(chatml, PAIR, chat=False)
    assert chatml.decode(plainly.input_ids) == "Which place? The Eagle.<|im_end|>"
    alpaca = Example(kind="completion", prompt="Hello", plain_prompt="### Instruction:\nHello\n\n", completion="Fine")
    assert one(chatml, alpaca, chat=False).prompt_text == "### Instruction:\nHello\n\n"


@pytest.mark.parametrize(
    ("prompt_turns", "train_on", "expected"),
    [
        (None, None, "Fine<|im_end|>The Eagle<|im_end|>"),
        (None, "assistant", "Fine<|im_end|>The Eagle<|im_end|>"),
        (None, "completion", "The Eagle<|im_end|>"),
        (3, None, "The Eagle<|im_end|>"),
        (1, None, "Fine<|im_end|>The Eagle<|im_end|>"),
        (3, "assistant", "Fine<|im_end|>The Eagle<|im_end|>"),
    ],
)
def test_train_on(chatml: PreTrainedTokenizerFast, prompt_turns: int | None, train_on: str | None, expected: str) -> None:
    example = Example(kind="messages", messages=TALK.messages, prompt_turns=prompt_turns)
    assert trained(one(chatml, example, train_on=train_on), chatml) == expected


def test_train_on_all_trains_every_token_but_the_first(chatml: PreTrainedTokenizerFast) -> None:
    row = one(chatml, TALK, train_on="all")
    assert row.weights == (0.0, *[1.0] * (len(row.input_ids) - 1))
    assert row.prompt_text.endswith("<|im_start|>assistant\n")


def test_train_on_a_part_that_text_rows_lack_is_an_error(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="train_on: 'assistant'"):
        Renderer(plain, DataConfig(train_on="assistant")).render([Example(kind="text", text="The Eagle")])


def test_system_turn_only_where_there_is_none(chatml: PreTrainedTokenizerFast) -> None:
    given = Example(kind="messages", messages=({"role": "system", "content": "You know."}, *TALK.messages))
    assert "<|im_start|>system\nBe terse.<|im_end|>" in one(chatml, TALK, system="Be terse.").prompt_text
    kept = one(chatml, given, system="Be terse.").prompt_text
    assert "You know." in kept and "terse" not in kept
    pair = one(chatml, PAIR, system="Be terse.")
    assert trained(pair, chatml) == " The Eagle.<|im_end|>"


def test_truncation_is_marked_and_a_row_left_without_trained_tokens_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    whole = one(chatml, PAIR)
    start = len(whole.prompt_ids)
    assert not whole.truncated and not one(chatml, PAIR, max_length=len(whole.input_ids)).truncated
    cut = one(chatml, PAIR, max_length=start + 1)
    assert cut.truncated and cut.input_ids == whole.input_ids[: start + 1]
    assert sum(cut.weights) == 1.0 and cut.prompt_ids == whole.prompt_ids
    assert "max_length" in refused(chatml, PAIR, max_length=start).reason


def test_no_assistant_turn_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    only_user = Example(kind="messages", messages=TALK.messages[:1], origin="a.jsonl:7")
    assert str(refused(chatml, only_user)) == "a.jsonl:7: no assistant turn, so nothing would be trained"
    in_prompt = Example(kind="messages", messages=TALK.messages[:3], prompt_turns=2)
    assert "no assistant turn" in refused(chatml, in_prompt).reason


def test_a_single_token_of_text_is_refused(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, eos=None)
    renderer = Renderer(tokenizer, DataConfig())
    one_token, two = renderer.render([Example(kind="text", text="I"), Example(kind="text", text="I I")])
    assert isinstance(one_token, RowError) and "no trained token" in one_token.reason
    assert isinstance(two, TokenRow)
    assert any("no end token" in note for note in renderer.notes)


def test_conversations_need_a_template(plain: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no chat template"):
        Renderer(plain, DataConfig()).render([TALK])
    with pytest.raises(DataError, match=r"data.chat is false"):
        Renderer(chatml, DataConfig(chat=False)).render([TALK])
    with pytest.raises(DataError, match=r"data.chat is true"):
        Renderer(plain, DataConfig(chat=True))
    with pytest.raises(ConfigError, match=r"data.system"):
        Renderer(plain, DataConfig(system="Be terse.")).render([PAIR])


def test_batches_keep_order_and_mix_kinds(chatml: PreTrainedTokenizerFast) -> None:
    examples = [PAIR, Example(kind="text", text="The Eagle"), TALK, Example(kind="messages", messages=TALK.messages[:1])] * 100
    results = Renderer(chatml, DataConfig()).render(examples)
    singly = [Renderer(chatml, DataConfig()).render([example])[0] for example in examples[:4]]
    assert [r if isinstance(r, TokenRow) else str(r) for r in results] == [
        r if isinstance(r, TokenRow) else str(r) for r in singly * 100
    ]


class Letters(PreTrainedTokenizer):
    """A tokenizer in plain Python: a token a character, no offsets."""

    def __init__(self, **kwargs: Any) -> None:
        self.letters = {chr(code): code - 31 for code in range(32, 127)} | {"\n": 0}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {number: letter for letter, number in self.letters.items()}[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_tokenizers_without_offsets(chatml: PreTrainedTokenizerFast) -> None:
    tokenizer: Any = Letters(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    assert not tokenizer.is_fast
    tokenizer.chat_template = chatml.chat_template
    row = one(tokenizer, TALK)
    ids = [token for token, weight in zip(row.input_ids, row.weights, strict=True) if weight]
    assert tokenizer.convert_ids_to_tokens(ids) == [*"Fine", "<|im_end|>", *"The Eagle", "<|im_end|>"]
    assert trained(one(tokenizer, PAIR, chat=False), tokenizer) == " The Eagle.<|im_end|>"
