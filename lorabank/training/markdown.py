"""Texts as parts of Markdown pages."""

from __future__ import annotations


def cell(text: str) -> str:
    """A text as one cell of a table: a bar would end it, in code too, and so would a new line."""
    return " ".join(text.replace("|", "\\|").split())
