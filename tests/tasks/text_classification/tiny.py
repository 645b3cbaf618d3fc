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


def mood_rows(count: int = 48) -> list[dict[str, Any]]:
    """A text whose one telling word decides its label."""
    telling = {"good": "pos", "great": "pos", "bad": "neg", "awful": "neg"}
    words = list(telling)
    rows = []
    for i in range(count):
        word = words[i % 4]
        filler = " ".join(
            WORDS[(5 * i + j * 7) % len(WORDS)] for j in range(i % 5) if WORDS[(5 * i + j * 7) % len(WORDS)] not in telling
        )
        rows.append({"text": f"the food was {word} {filler}".strip(), "label": telling[word]})
    return rows


def price_rows(count: int = 48) -> list[dict[str, Any]]:
    """The same with three labels, which another word decides."""
    telling = {"cheap": "low", "dear": "high", "slow": "none"}
    words = list(telling)
    return [
        {"text": f"it is {words[i % 3]} {' and fast' * (i % 4)}".strip(), "label": telling[words[i % 3]]} for i in range(count)
    ]
