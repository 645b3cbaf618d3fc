"""Whisper's tokens: what a transcript's labels begin with, where timestamps start, and text ⇄ ids.

Works for English-only and multilingual models: it looks at the vocabulary, never at a model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabank.config.speech import SpeechConfig
from lorabank.data.row import RowError
from lorabank.errors import ConfigError, ModelError, Setting, closest
from lorabank.tasks.speech.transcripts import STEP_S, UNSPACED, Segment, has_times

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

ENGLISH = "en"


@dataclass(frozen=True, kw_only=True)
class SpeechTokens:
    """What the labels of one model are made of."""

    tokenizer: WhisperTokenizer
    start: int
    end: int
    no_timestamps: int
    tasks: dict[str, int]
    """Empty for an English-only model."""
    languages: dict[str, int]
    """Code to token; empty for an English-only model."""
    longest: int
    """Positions of the decoder."""

    @property
    def multilingual(self) -> bool:
        """Whether labels name a language and a task."""
        return bool(self.languages)

    @property
    def first_timestamp(self) -> int:
        """The token of 0.00 s; one more for each fiftieth of a second."""
        return self.no_timestamps + 1

    def prefix(self, language: str | None, task: str, *, timestamps: bool) -> list[int]:
        """What a transcript's tokens begin with: start, language and task where there are such, and that no times follow."""
        ids = [self.start]
        if self.multilingual:
            ids += [self.languages[self.code(language)], self.tasks[task]]
        return ids if timestamps else [*ids, self.no_timestamps]

    def knows(self, language: str) -> bool:
        """Whether it is the name or code of a language that labels can be in."""
        return self._code(language) in (self.languages or (ENGLISH,))

    def _code(self, language: str) -> str:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        lowered = language.strip().lower()
        return TO_LANGUAGE_CODE.get(lowered, lowered)

    def code(self, language: str | None) -> str:
        """The code of a language's name or code. Raises ConfigError for an unknown one, or none where one is needed."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        if language is None:
            if not self.multilingual:
                return ENGLISH
            raise ConfigError(
                Setting("speech.language"),
                ": this model knows many languages, and labels name one. Say which the transcripts are in, such as german or de, "
                "or give the rows a column language.",
            )
        code = self._code(language)
        if not self.knows(language):
            hint = closest(language, [*(name for name, of in TO_LANGUAGE_CODE.items() if of in self.languages), *self.languages])
            which = f"a language of this model{hint}" if self.multilingual else "english: this model knows no other"
            raise ConfigError(Setting("speech.language"), f": expected {which}, got {language!r}")
        return code

    def labels(self, segments: Sequence[Segment], language: str | None, task: str) -> tuple[tuple[int, ...], int]:
        """(start … end, how many of them are the prefix) for a transcript. With times where every segment has them.

        Raises RowError for more tokens than the decoder has positions, ConfigError for a language that isn't the model's.
        """
        timed = has_times(segments)
        code = self.code(language)
        spaced = code not in UNSPACED
        ids = self.prefix(language, task, timestamps=timed)
        begin = len(ids)
        for segment in segments:
            text = self.text_ids(f" {segment.text}" if spaced and segment.text else segment.text)
            if not timed:
                ids += text
                continue
            closing = [] if segment.end is None else [self.stamp(segment.end)]
            ids += [self.stamp(segment.start or 0.0), *text, *closing]
        ids.append(self.end)
        if len(ids) > self.longest:
            raise RowError(f"the transcript has more tokens than the decoder has positions ({self.longest})")
        return tuple(ids), begin

    def stamp(self, seconds: float) -> int:
        """The timestamp token nearest to a moment."""
        return self.first_timestamp + round(seconds / STEP_S)

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def segments(self, ids: Sequence[int]) -> list[Segment]:
        """Generated ids as segments: their times where the model gave any, one without times else.

        Tokens before the first pair of times, or behind the last one, are kept: no word is lost. Padding and marks are skipped.
        """
        found: list[Segment] = []
        text: list[int] = []
        start: float | None = None
        for token in ids:
            if token >= self.first_timestamp:
                moment = round((token - self.first_timestamp) * STEP_S, 2)
                if text:
                    found.append(Segment(self.text(text), start, moment))
                    text, start = [], None
                start = moment
            elif token < self.end:
                text.append(token)
        if text:
            found.append(Segment(self.text(text), start, None))
        return [segment for segment in found if segment.text]

    def text(self, ids: Sequence[int]) -> str:
        """The words of ids, without marks and times."""
        kept = [token for token in ids if token < self.end]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()


def speech_tokens(tokenizer: Any, model: Any, config: SpeechConfig) -> SpeechTokens:
    """The tokens of a loaded model. Raises ModelError where it isn't Whisper's vocabulary, ConfigError for a language or a task
    that the model doesn't know."""
    names = ("<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>")
    known = tokenizer.get_vocab()
    if missing := [name for name in names if name not in known]:
        raise ModelError(f"its tokenizer lacks {', '.join(missing)}: speech recognition is for Whisper models")
    start, end, none = (known[name] for name in names)
    size = model.config.vocab_size
    multilingual = bool(getattr(model.generation_config, "is_multilingual", size >= 51865))
    between = {name: number for name, number in known.items() if start < number < known.get("<|translate|>", start)}
    tokens = SpeechTokens(
        tokenizer=tokenizer,
        start=start,
        end=end,
        no_timestamps=none,
        tasks={task: known[f"<|{task}|>"] for task in ("translate", "transcribe")} if multilingual else {},
        languages={name[2:-2]: number for name, number in between.items()} if multilingual else {},
        longest=model.config.max_target_positions,
    )
    if config.language is not None:
        tokens.code(config.language)
    if not multilingual and config.task != "transcribe":
        raise ConfigError(Setting("speech.task"), f": this model knows English alone, so it can't {config.task}")
    return tokens
