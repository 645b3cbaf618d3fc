"""Prompts for `predict`: each row of a file as the messages before the answer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabank.data.formats import FORMATS, detect_format, refuse_nan
from lorabank.data.row import Row, RowError
from lorabank.errors import DataError, closest

Message = dict[str, str]
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input", "text")


def read_prompts(source: str, limit: int | None = None) -> list[Row]:
    """Rows of a file that training reads too, or of a .txt file with a prompt a line. Raises DataError naming file and line."""
    from lorabank.data.files import read_text
    from lorabank.data.read import check_source, read_rows

    if Path(source).suffix != ".txt" or not Path(source).is_file():
        check_source(source, place="--data")
        return read_rows(source, limit=limit, role="test")[:limit]
    lines = enumerate(read_text(Path(source)).splitlines(), 1)
    rows = [Row({"prompt": line}, f"{source}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{source}: expected a prompt a line, got an empty file")
    return rows[:limit]


def messages_of(row: Row, *, template: str | None, system: str | None) -> list[Message]:
    """The messages before the answer. `template` fills `{column}`; else `messages`, or the first prompt column there is."""
    try:
        messages = _from_template(row, template) if template is not None else _from_columns(row)
    except RowError as error:
        raise DataError(f"{error.at(row.origin)}. Correct or delete that row.") from error
    while messages and messages[-1]["role"] == "assistant":  # the answer that we are asked for
        messages.pop()
    if not messages:
        raise DataError(f"{row.origin}: there is no turn before the answer")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def template_columns(template: str) -> list[str]:
    """Names in braces. Raises DataError for braces that don't close."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        raise DataError(f"--prompt {template!r}: {error}. A literal brace is written twice: {{{{ or }}}}") from None


def _from_template(row: Row, template: str) -> list[Message]:
    for name in template_columns(template):
        if name not in row.values:
            raise DataError(
                f"{row.origin}: --prompt asks for column {name!r}{closest(name, row.values)}; there are {', '.join(row.values)}"
            )
        refuse_nan(row.values[name], name)
    return [{"role": "user", "content": template.format_map(dict(row.values))}]


def _from_columns(row: Row) -> list[Message]:
    values = row.values
    if "messages" in values:
        return _turns(values["messages"], row.origin, "messages")
    if "conversations" in values:
        return _turns(list(FORMATS[detect_format(values)].parse(values).messages), row.origin, "conversations")
    column = next((name for name in PROMPT_COLUMNS if values.get(name)), None)
    if column is None:
        raise DataError(
            f"{row.origin}: expected a column messages, {', '.join(PROMPT_COLUMNS)}; got {', '.join(values)}. "
            "Name it with --prompt '{column}'."
        )
    if isinstance(values[column], list):
        return _turns(values[column], row.origin, column)
    refuse_nan(values[column], column)
    text = str(values[column])
    if column == "instruction" and values.get("input"):  # Alpaca keeps the material apart from the question
        refuse_nan(values["input"], "input")
        text += f"\n\n{values['input']}"
    return [{"role": "user", "content": text}]


def _turns(value: Any, origin: str, column: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value):
        raise DataError(f"{origin}: expected messages as a list of {{role, content}}, got {str(value)[:80]!r}")
    for turn in value:
        refuse_nan(turn["content"], column)
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in value]
