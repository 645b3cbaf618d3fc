"""Captions that `predict` draws, from a file or rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorabank.errors import DataError
from lorabank.tasks.diffusion.prompts import read_captions


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": None}, "expected a caption in column 'text', got an empty one"),
        ({"text": " "}, "expected a caption in column 'text', got an empty one"),
        ({"prompt": 3}, "expected a caption in column 'prompt', got int"),
        ({"words": "a cat"}, "expected a caption in a column prompt, text, caption, got words"),
    ],
)
def test_a_row_without_a_caption_is_named(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=rf"row 2 of .*{re.escape(told)}"):
        read_captions([{"text": "a cat"}, row], None)


def test_an_empty_cell_of_a_table_is_named(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('text\n"a cat"\n""\n')
    with pytest.raises(DataError, match=r"captions\.csv:3: expected a caption in column 'text', got an empty one"):
        read_captions(str(table), None)
