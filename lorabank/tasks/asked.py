"""Rows to predict: files that training reads too, or a text a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lorabank.data.files import read_text
from lorabank.data.read import Source, read_rows
from lorabank.data.reasons import gather
from lorabank.data.row import Row
from lorabank.errors import DataError, OutputError
from lorabank.wording import counted

OTHER_KINDS = (".csv", ".tsv", ".parquet", ".xlsx")
"""Suffixes of tables that JSON lines would be misnamed by."""


def check_json_lines(output: Path, others: Sequence[str] = OTHER_KINDS) -> None:
    """Raises OutputError for a name that says another form."""
    if (kind := output.suffix.lower()) in others:
        raise OutputError(f"{output}: expected a name for JSON lines, got {kind}. Name it {output.stem}.jsonl.")


def rows_asked(source: Source, limit: int | None, *, column: str, blank: bool = False) -> list[Row]:
    """At most `limit` rows of a file, folder or data set, or of a .txt file a row a line that isn't empty, called `column`.

    `blank`: a row of a blank line, too, so that it can be told of. Raises DataError, naming file and line.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or path.suffix.lower() != ".txt" or not path.is_file():
        return read_rows(source, limit=limit, role="test")[:limit]
    lines = enumerate(read_text(path).splitlines(), start=1)
    rows = [Row({column: line}, f"{source}:{number}") for number, line in lines if blank or line.strip()]
    if not rows:
        raise DataError(f"{source}: expected a text a line, got an empty file")
    return rows[:limit]


def cut_note(origins: Iterable[str], tokens: int) -> str:
    """A line that names the rows of which only the first `tokens` were read; empty where there are none."""
    cut = gather(origins)
    return f"\n{counted(cut.count, 'row')} cut to {tokens:,} tokens (data.max_length): {cut.some}" if cut.count else ""
