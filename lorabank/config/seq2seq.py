"""`Seq2SeqConfig`: settings of encoder-decoders: summaries, translations, text to text. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorabank.config.checks import check_non_negative_int, check_number, check_positive_int
from lorabank.errors import ConfigError, Setting


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """What is read and what is written."""

    source: str | None = None
    """Column of the text that is read; None: found by its name (`document`, `article`, `source`, `prompt` …)."""
    target: str | None = None
    """Column of the text that is to be written; None: found with `source`."""
    source_lang: str | None = None
    """Language of the source: a key of the column `translation`, and the code that mBART and its kin have for it (`en_XX`)."""
    target_lang: str | None = None
    """Language of the target."""
    prefix: str | None = None
    """Text before every source; None: what the model's configuration has for the task (T5's `summarize: `), else none."""
    max_target_length: int = 256
    """Tokens of a target; longer ones are cut at the end, and counted."""

    beams: int = 1
    """Beams that texts are written with, in scores, samples and predictions; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent of the length by which a beam's log-likelihood is divided: above 0 longer texts are preferred, below 0 shorter."""
    no_repeat_ngram_size: int = 0
    """So many tokens in a row never come twice in a text; 0: they may."""

    def __post_init__(self) -> None:
        check_positive_int("seq2seq.max_target_length", self.max_target_length)
        check_positive_int("seq2seq.beams", self.beams)
        check_number("seq2seq.length_penalty", self.length_penalty)
        check_non_negative_int("seq2seq.no_repeat_ngram_size", self.no_repeat_ngram_size)
        if (self.source_lang is None) != (self.target_lang is None):
            raise ConfigError(
                Setting("seq2seq.source_lang"), " and ", Setting("seq2seq.target_lang"), " go together: give both languages"
            )
        if (self.source is None) != (self.target is None):
            raise ConfigError(Setting("seq2seq.source"), " and ", Setting("seq2seq.target"), " go together: name both columns")
