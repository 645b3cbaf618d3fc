"""Tiny classifiers built from their configurations, a word-level tokenizer, and rows that can be learned."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = "the a food was is good bad great awful place cheap dear by river in city and not it we they service slow fast".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with BERT's special tokens and segments."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def tiny_bert(seed: int = 0, num_labels: int = 2) -> BertForSequenceClassification:
    """Two blocks of width 32."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


def tiny_llama(seed: int = 0, num_labels: int = 2) -> LlamaForSequenceClassification:
    """Two blocks of width 32, padded with the id of its end token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=3,
        eos_token_id=3,
        bos_token_id=2,
        num_labels=num_labels,
    )
    return LlamaForSequenceClassification(config).eval()


NEUTRAL = "the a food was is place by river in city and it we they service".split()


def filler(i: int) -> str:
    """Up to four words that tell nothing, others for each of the first 200 or so."""
    return " ".join(NEUTRAL[j % len(NEUTRAL)] for j in (i, i // 15, 3 * i + 1, 7 * i)[: 2 + i % 3])


def mood_rows(count: int = 48) -> list[dict[str, Any]]:
    """A text whose one telling word decides its label."""
    telling = {"good": "pos", "bad": "neg", "great": "pos", "awful": "neg"}
    words = list(telling)
    return [{"text": f"the food was {words[i % 4]} {filler(i)}", "label": telling[words[i % 4]]} for i in range(count)]


def price_rows(count: int = 48) -> list[dict[str, Any]]:
    """The same with three labels, which another word decides."""
    telling = {"cheap": "low", "dear": "high", "slow": "none"}
    words = list(telling)
    return [{"text": f"it is {words[i % 3]} {filler(i)}", "label": telling[words[i % 3]]} for i in range(count)]


def star_rows(count: int = 48) -> list[dict[str, Any]]:
    """Pairs with a number."""
    words = {"good": 4.5, "bad": 1.5, "great": 5.0, "awful": 0.5}
    telling = [list(words)[i % 4] for i in range(count)]
    return [{"sentence1": f"the food was {word}", "sentence2": filler(i), "score": words[word]} for i, word in enumerate(telling)]


def tag_rows(count: int = 48) -> list[dict[str, Any]]:
    """Any number of labels a row."""
    rows = []
    for i in range(count):
        said = {"cheap": i % 2 == 1, "fast": i % 3 > 0}
        rows.append(
            {
                "text": " ".join(["it is", *(word for word, on in said.items() if on), filler(i)]),
                "labels": [tag for tag, on in zip(("price", "speed"), said.values(), strict=True) if on],
            }
        )
    return rows
