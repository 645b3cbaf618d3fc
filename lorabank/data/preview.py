"""Rows told apart for a look before any training: trained tokens, read ones, special ones. `Printer` puts them on a console."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorabank.data.render import TokenRow
from lorabank.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""Marks around trained text where a terminal has no colours."""
_ASCII_OPEN, _ASCII_CLOSE = "[[", "]]"
Decode = Callable[[list[int]], str]
"""Tokens, special ones too, as text."""


class Printer:
    """Prints rows: trained text green and the rest dim, special tokens visible; marks where a console has no colours."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.colour = console.color_system is not None and not console.no_color
        self.marks = _marks(console)

    def legend(self) -> None:
        """What the colours, or marks, mean."""
        from rich.text import Text

        legend = Text("Legend: ")
        legend.append_text(_styled("trained: the model learns to write this", True, self.colour, self.marks))
        legend.append("  ")
        legend.append_text(_styled("read only", False, self.colour, self.marks))
        legend.append(", special tokens as they are named")
        self.console.print(legend, soft_wrap=True)

    def title(self, text: str) -> None:
        """A rule that begins a row; a text that is wider than the console stands below it, whole."""
        from rich.rule import Rule
        from rich.text import Text

        ascii_only = self.marks[0] == _ASCII_OPEN
        fits = len(text) + 4 <= self.console.width
        self.console.print(Rule(Text(text if fits else ""), align="left", characters="-" if ascii_only else "─"))
        if not fits:
            self.line(text)

    def line(self, text: str) -> None:
        """Text as it is, control characters replaced."""
        from rich.text import Text

        self.console.print(Text(_visible(text)), soft_wrap=True)

    def row(self, row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> None:
        """A row of text generation."""
        self.console.print(render_row(row, tokenizer, colour=self.colour, marks=self.marks), soft_wrap=True)

    def tokens(
        self,
        ids: Sequence[int],
        tokenizer: Any,
        *,
        learned: int | None = None,
        name: str = "",
        decode: Decode | None = None,
        special: Collection[int] | None = None,
    ) -> None:
        """Token ids, of which the last `learned` are trained (None: all). `decode`, `special`: the tokenizer's unless given."""
        from rich.text import Text

        first = 0 if learned is None else len(ids) - learned
        text = render_tokens(
            ids,
            [i >= first for i in range(len(ids))],
            decode or _decoder(tokenizer),
            set(tokenizer.all_special_ids) if special is None else special,
            colour=self.colour,
            marks=self.marks,
        )
        self.console.print(Text(f"{name}: " if name else "").append_text(text), soft_wrap=True)


def preview(rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase, console: Console, count: int = 3) -> None:
    """Print the first `count` rows: trained tokens green, the rest dim, special tokens visible; marks where no colour is."""
    out = Printer(console)
    out.legend()
    for row in rows[:count]:
        trained = sum(1 for weight in row.weights if weight)
        cut = ", cut to max_length" if row.truncated else ""
        out.title(f"{row.origin}: {counted(len(row.input_ids), 'token')}, {trained} trained{cut}")
        out.row(row, tokenizer)


def render_row(
    row: TokenRow, tokenizer: PreTrainedTokenizerBase, *, colour: bool = True, marks: tuple[str, str] = (OPEN, CLOSE)
) -> Text:
    """One row as rich text. Without `colour`, trained runs stand between `marks`."""
    special, trained = set(tokenizer.all_special_ids), [weight > 0 for weight in row.weights]
    return render_tokens(row.input_ids, trained, _decoder(tokenizer), special, colour=colour, marks=marks)


def render_tokens(
    ids: Sequence[int],
    trained: Sequence[bool],
    decode: Decode,
    special: Collection[int],
    *,
    colour: bool = True,
    marks: tuple[str, str] = (OPEN, CLOSE),
) -> Text:
    """Tokens as rich text, each trained or only read."""
    from rich.text import Text

    text = Text()
    for learned, pairs in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        run = Text()
        # Neighbouring tokens are decoded together: one character may be spread over several.
        for is_special, group in groupby((token for token, _ in pairs), key=special.__contains__):
            style = ("bold green" if learned else "dim") + (" underline" if is_special else "")
            run.append(_visible(decode(list(group))), style=style if colour else "")
        if learned and not colour:
            text.append(marks[0]).append_text(run).append(marks[1])
        else:
            text.append_text(run)
    return text


def _decoder(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _styled(words: str, trained: bool, colour: bool, marks: tuple[str, str]) -> Text:
    from rich.text import Text

    if colour:
        return Text(words, style="bold green" if trained else "dim")
    return Text(f"{marks[0]}{words}{marks[1]}" if trained else words)


def _marks(console: Console) -> tuple[str, str]:
    """Brackets that the terminal's encoding can show."""
    return (OPEN, CLOSE) if console.encoding.lower().startswith("utf") else (_ASCII_OPEN, _ASCII_CLOSE)


def _visible(text: str) -> str:
    """Control characters would move the cursor; new lines and tabs stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
