"""Builders of tiny classifiers on disk, and rows that they can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.training.tiny import tiny_tokenizer

WORDS = {"good": ("fine", "great", "nice"), "bad": ("poor", "sad", "weak"), "odd": ("queer", "weird", "curious")}


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of two blocks of width 32 that reads bytes, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return folder


def labelled_rows(count: int, labels: tuple[str, ...] = ("good", "bad"), start: int = 0) -> list[dict[str, Any]]:
    """Texts of which one word says the label."""
    rows = []
    for i in range(start, start + count):
        label = labels[i % len(labels)]
        words = WORDS[label]
        rows.append({"text": f"{words[(i // len(labels)) % len(words)]} no {i}", "label": label})
    return rows
