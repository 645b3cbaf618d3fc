"""`TextStream`: token ids to text as they come, never half a character."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Decodes a growing answer and gives out what is new."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that this token completes; '' while a character is incomplete."""
        self._tokens.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        return self._take(text)

    def end(self) -> str:
        """What is left. A character that the answer's length cut in two is left out."""
        return self._take(self._text().rstrip("\ufffd"))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _take(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new
