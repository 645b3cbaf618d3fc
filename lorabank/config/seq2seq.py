"""`Seq2SeqConfig`: settings of encoder-decoders: summaries, translations, text to text. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorabank.config.checks import check_positive_int
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

    def __post_init__(self) -> None:
        check_positive_int("seq2seq.max_target_length", self.max_target_length)
        if (self.source_lang is None) != (self.target_lang is None):
            raise ConfigError(
                Setting("seq2seq.source_lang"), " and ", Setting("seq2seq.target_lang"), " go together: give both languages"
            )
        if (self.source is None) != (self.target is None):
            raise ConfigError(Setting("seq2seq.source"), " and ", Setting("seq2seq.target"), " go together: name both columns")
