"""`preview`: a few rendered rows with the trained tokens told apart, for a look before any training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lorabank.data.render import TokenRow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""Marks around trained text where a terminal has no colours."""
_ASCII_OPEN, _ASCII_CLOSE = "[[", "]]"


def preview(rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase, console: Console, count: int = 3) -> None:
    """Print the first `count` rows: trained tokens green, the rest dim, special tokens visible; marks where no colour is."""
    from rich.rule import Rule
    from rich.text import Text

    colour = console.color_system is not None and not console.no_color
    marks = _marks(console)
    legend = Text("Legend: ")
    legend.append_text(_styled("trained: the model learns to write this", True, colour, marks))
    legend.append("  ")
    legend.append_text(_styled("read only", False, colour, marks))
    legend.append(", special tokens as they are named")
    console.print(legend, soft_wrap=True)
    for row in rows[:count]:
        trained = sum(1 for weight in row.weights if weight)
        cut = ", cut to max_length" if row.truncated else ""
        title = f"{row.origin}: {len(row.input_ids)} tokens, {trained} trained{cut}"
        console.print(Rule(Text(title), align="left", characters="-" if marks[0] == _ASCII_OPEN else "─"))
        console.print(render_row(row, tokenizer, colour=colour, marks=marks), soft_wrap=True)


def render_row(
    row: TokenRow, tokenizer: PreTrainedTokenizerBase, *, colour: bool = True, marks: tuple[str, str] = (OPEN, CLOSE)
) -> Text:
    """One row as rich text. Without `colour`, trained runs stand between `marks`."""
    from rich.text import Text

    special = set(tokenizer.all_special_ids)
    text = Text()
    for trained, pairs in groupby(zip(row.input_ids, row.weights, strict=True), key=lambda pair: pair[1] > 0):
        run = Text()
        # Neighbouring tokens are decoded together: one character may be spread over several.
        for is_special, group in groupby((token for token, _ in pairs), key=special.__contains__):
            piece = str(tokenizer.decode(list(group), skip_special_tokens=False, clean_up_tokenization_spaces=False))
            style = ("bold green" if trained else "dim") + (" underline" if is_special else "")
            run.append(_visible(piece), style=style if colour else "")
        if trained and not colour:
            text.append(marks[0]).append_text(run).append(marks[1])
        else:
            text.append_text(run)
    return text


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
