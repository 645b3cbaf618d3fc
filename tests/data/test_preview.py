"""What preview prints, with and without colours."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from lorabank.config.train import DataConfig
from lorabank.data.prepare import prepare
from lorabank.data.preview import preview, render_row
from lorabank.data.render import TokenRow


@pytest.fixture
def rows(chatml: PreTrainedTokenizerFast) -> list[TokenRow]:
    given = [{"prompt": f"Which place [{n}]?", "completion": "The Eagle 🦅\x1b[31m."} for n in range(5)]
    return prepare(DataConfig(val_split=0), chatml, seed=1, train=given).train


def printed(rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast, count: int = 3, **options: object) -> str:
    stream = io.StringIO()
    preview(rows, tokenizer, Console(file=stream, width=100, **options), count)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def test_marks_where_there_is_no_colour(rows: list[TokenRow], chatml: PreTrainedTokenizerFast) -> None:
    text = printed(rows, chatml)
    assert "⟦trained" in text.splitlines()[0]
    assert text.count("<|im_start|>assistant\n⟦The Eagle 🦅�[31m.<|im_end|>⟧") == 3, "broken characters whole, escapes harmless"
    assert "<|im_start|>user\nWhich place [0]?<|im_end|>" in text, "brackets are text, not markup"
    assert "row 1 of the train rows given: " in text
    assert printed(rows, chatml, count=1).count("⟧") == 2


def test_colours_where_there_are(rows: list[TokenRow], chatml: PreTrainedTokenizerFast) -> None:
    text = printed(rows, chatml, force_terminal=True, color_system="standard")
    assert "⟦" not in text
    assert "\x1b[1;32mThe Eagle" in text and "\x1b[2mWhich place" in text
    assert "⟦" in printed(rows, chatml, force_terminal=True, color_system="standard", no_color=True)


def test_a_terminal_without_unicode(rows: list[TokenRow], chatml: PreTrainedTokenizerFast) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    preview(rows, chatml, Console(file=stream, width=100), 1)
    stream.flush()
    assert b"[[The Eagle" in raw.getvalue() and b"<|im_end|>]]" in raw.getvalue()


def test_styles_follow_the_weights(rows: list[TokenRow], chatml: PreTrainedTokenizerFast) -> None:
    text = render_row(rows[0], chatml)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green.startswith("The Eagle") and green.endswith("<|im_end|>")
