"""Encoders and decoders whose heads differ: each trains label sets of two sizes jointly, and pads without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import lorabank as lb
from lorabank.config.train import DataConfig, TrainConfig
from lorabank.errors import ConfigError
from lorabank.tasks import task_kind
from lorabank.tasks.text_classification.model import positions
from lorabank.training.data_sets import RowObjects
from tests.tasks.text_classification.tiny import SPECIAL, WORDS, mood_rows, price_rows, words_tokenizer

VOCABULARY = len(SPECIAL) + len(WORDS)
BLOCKS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER: dict[str, Any] = {**BLOCKS, "max_position_embeddings": 40, "initializer_range": 0.2}
DECODER: dict[str, Any] = {**BLOCKS, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "init_std": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": 2,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(vocab_size=VOCABULARY, type_vocab_size=1, **ENCODER)),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40),
    ),
    "deberta-v2": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(
            vocab_size=VOCABULARY,
            type_vocab_size=0,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=8,
            **ENCODER,
        ),
    ),
    "deberta-v3": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(
            vocab_size=VOCABULARY,
            type_vocab_size=0,
            relative_attention=True,
            share_att_key=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            **ENCODER,
        ),
    ),
    "albert": (
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, **ENCODER),
    ),
    "modernbert": (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(vocab_size=VOCABULARY, pad_token_id=0, **BLOCKS),
    ),
    "qwen3": (tf.Qwen3ForSequenceClassification, tf.Qwen3Config(vocab_size=VOCABULARY, head_dim=8, **DECODER)),
    "gpt2": (
        tf.GPT2ForSequenceClassification,
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0),
    ),
    "bart": (tf.BartForSequenceClassification, tf.BartConfig(vocab_size=VOCABULARY, **SIZES)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_label_sets_on_every_family(family: str) -> None:
    make, config = FAMILIES[family]
    torch.manual_seed(0)
    model = make(config).eval()
    result = lb.train(
        task="text-classification",
        model=model,
        tokenizer=words_tokenizer(),
        data={"mood": mood_rows(24), "price": price_rows(24)},
        adapters={"mood": {"rank": 2}, "price": {"rank": 4}},
        batch_size=4,
        learning_rate=1e-2,
        max_steps=4,
        eval={"every": 0},
    )
    task: Any = task_kind("text-classification").open(
        TrainConfig(task="text-classification", data=DataConfig(val_split=0)), model, words_tokenizer(), dict(result.trained)
    )
    bank = lb.attach(model)
    for name, adapter in result.trained.items():
        bank.load(name, adapter)
    engine = task.engine(bank)
    rows = task.read(task.config, RowObjects(train=[*mood_rows(5), *price_rows(4)])).by_adapter["default"].train
    assert len({row.size for row in rows}) > 1
    jobs = [(("mood", "price")[i % 2], row) for i, row in enumerate(rows)]
    together = task.outputs(engine, [(name, row) for name, row in jobs if row.label in task.sets[name].names])[0]
    for (name, row), expected in zip([j for j in jobs if j[1].label in task.sets[j[0]].names], together, strict=True):
        alone = task.outputs(engine, [(name, row)])[0][0]
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
        assert bool(expected[: task.sets[name].outputs].isfinite().all())


def test_positions_that_padding_takes() -> None:
    """RoBERTa counts from its padding's place, so two of its table's rows are never a token's."""
    make, config = FAMILIES["roberta"]
    assert positions(make(config)) == 40 - (config.pad_token_id + 1)
    make, config = FAMILIES["gpt2"]
    assert positions(make(config)) == 40


def test_deberta_jointly_as_alone() -> None:
    """Its positions are projected once for all rows, so adapters go through it in turn; the result is law 3's all the same."""
    make, config = FAMILIES["deberta-v3"]

    def run(names: list[str]) -> Any:
        torch.manual_seed(0)
        rows = {"mood": mood_rows(24), "price": price_rows(24)}
        return lb.train(
            task="text-classification",
            model=make(config).eval(),
            tokenizer=words_tokenizer(),
            data={name: rows[name] for name in names},
            adapters={name: {"rank": 2} for name in names},
            batch_size=4,
            learning_rate=1e-2,
            eps=1e-5,
            max_steps=4,
            eval={"every": 0},
        )

    both = run(["mood", "price"])
    for name in ("mood", "price"):
        alone = run([name])
        for path, layer in both.trained[name].layers.items():
            torch.testing.assert_close(layer.delta(), alone.trained[name].layers[path].delta(), rtol=1e-3, atol=1e-5, msg=path)
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"adapter 'mood': dropout is drawn row by row.*Set dropout to 0"):
        lb.train(
            task="text-classification",
            model=make(config).eval(),
            tokenizer=words_tokenizer(),
            data=mood_rows(24),
            adapters={"mood": {"dropout": 0.1}},
            max_steps=1,
        )
