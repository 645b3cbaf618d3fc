"""Small byte-level tokenizers, trained in milliseconds on a few sentences, so that no test downloads anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The Eagle is a cheap coffee shop in the city centre, near Burger King.",
    "Which place do you know by the river? It serves Japanese food and is not family-friendly.",
    "system user assistant model tool\n\n Hello, how are you? I am fine, thanks. 12 + 30 = 42",
]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def build_tokenizer(
    template: str | None = None,
    *,
    markers: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    trim_offsets: bool = False,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*markers, *(token for token in (bos, eos) if token)]))
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(str(bos), core.token_to_id(str(bos)))]
        )
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    # SmolLM2's padding token is its end token too: no mask may go by the id.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    return build_tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="session")
def plain(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(None, markers=("<s>", "</s>"), eos="</s>", bos="<s>", adds_bos=True)
