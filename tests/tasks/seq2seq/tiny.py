"""Tiny encoder-decoders built from their configurations, tokenizers of a few words, and pairs that can be learned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

WORDS = (
    "the cat dog sat ran on a mat hill red blue die katze hund sass lief auf einer matte rote blaue summarize : translate to"
).split()
PIECES = [*((f"▁{word}", -1.0) for word in WORDS), ("▁", -3.0)]
SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
GERMAN = {"the": "die", "cat": "katze", "dog": "hund", "sat": "sass", "ran": "lief", "on": "auf", "a": "einer", "mat": "matte"}
SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 48,
    "init_std": 0.2,
}


def t5(seed: int = 0, **more: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = T5Tokenizer(vocab=[SPECIAL[1], SPECIAL[2], SPECIAL[3], *PIECES], extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=1.0,
        tie_word_embeddings=False,
        **more,
    )
    return T5ForConditionalGeneration(config).eval(), tokenizer


def bart(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """With mBART's tokenizer in BART's manner: a start of text before, and an end after."""
    tokenizer = _bart_tokenizer()
    torch.manual_seed(seed)
    return BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **SIZES)
    ).eval(), tokenizer


def _bart_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram([*SPECIAL, *PIECES], unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def mbart(seed: int = 0, *, fifty: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """mBART-50, whose targets begin with their language, or mBART, whose targets end with it."""
    kind: Any = MBart50Tokenizer if fifty else MBartTokenizer
    tokenizer = kind(vocab=[*SPECIAL, *PIECES], src_lang="en_XX", tgt_lang="en_XX")
    torch.manual_seed(seed)
    config = MBartConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **SIZES)
    return MBartForConditionalGeneration(config).eval(), tokenizer


def sentences(count: int = 48) -> list[tuple[str, str]]:
    """English, and the same word for word in German."""
    found = []
    for i in range(count):
        english = f"the {('cat', 'dog')[i % 2]} {('sat', 'ran')[i // 2 % 2]} on {('a mat', 'the mat', 'a cat')[i // 4 % 3]}"
        english += " on the dog" * (i // 12)
        found.append((english, " ".join(GERMAN[w] for w in english.split())))
    return found


def summary_rows(count: int = 48) -> list[dict[str, str]]:
    """What is to be kept of a document is its animal."""
    return [{"document": english, "summary": english.split()[1]} for english, _ in sentences(count)]


def translation_rows(count: int = 48) -> list[dict[str, dict[str, str]]]:
    return [{"translation": {"en": english, "de": german}} for english, german in sentences(count)]
