"""What an adapter's own folder says of the texts that it knows, and of how its answers are looked for."""

from __future__ import annotations

from lorabank.tasks.kept import Kept

KEPT = Kept(
    section="seq2seq",
    names=("source_lang", "target_lang", "prefix", "max_target_length", "beams", "length_penalty", "no_repeat_ngram_size"),
    optional={"source_lang": str, "target_lang": str, "prefix": str},
    way_out="",
)
