"""Prompts for `predict`: each row of a file in the normal form that training gives it, whether it has an answer or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorabank.config.train import DataConfig, TrainConfig
from lorabank.data.formats import FORMATS, Example, Normaliser, is_list, template_columns, text_of, turns_in
from lorabank.data.prompt import turns_of
from lorabank.data.render import with_system
from lorabank.data.row import Row, RowError
from lorabank.errors import DataError, Setting, closest

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


def prompts_of(rows: Sequence[Row], config: TrainConfig | None, *, template: str | None, system: str | None) -> list[Example]:
    """Each row in the form that the run's training gives it; `template` and `system` in place of the run's.

    Raises DataError naming the row.
    """
    data = config.data if config is not None else DataConfig()
    template = template or _template_of_run(data.prompt, rows[0].values)
    completion = data.completion if template == data.prompt else None
    return [prompt_of(row, template=template, completion=completion, system=system or data.system) for row in rows]


def _template_of_run(template: str | None, values: Mapping[str, object]) -> str | None:
    """The template that the run was trained with, where the rows have its columns."""
    if template is None or any(name not in values for name in template_columns(template, place="data.prompt")):
        return None
    return template


def prompt_of(row: Row, *, template: str | None, completion: str | None = None, system: str | None = None) -> Example:
    """The row in the normal form that training gives it, with or without an answer; turns that end with the user's have none.

    `template` fills `{column}`, and `completion` is the run's other template; without one the row's form decides, or the first
    prompt column there is. `system` goes before turns that have none. Raises DataError naming the row.
    """
    try:
        example = _trained(row, template, completion)
        if example is None:
            example = _from_template(row, template) if template is not None else _from_columns(row)
    except RowError as error:
        raise DataError(f"{error.at(row.origin)}. Correct or delete that row.") from error
    if not turns_of(example):
        raise DataError(f"{row.origin}: there is no turn before the answer")
    return replace(_with_system(example, system), origin=row.origin)


def _trained(row: Row, template: str | None, completion: str | None) -> Example | None:
    """The row as training reads it; None for one without an answer, or whose text is no prompt."""
    if template is not None and completion is None:
        return None
    turns = template is None and ("messages" in row.values or "conversations" in row.values)
    try:
        example = Normaliser(DataConfig(prompt=template, completion=completion))(row)
    except DataError:
        if turns:  # these need no answer
            raise
        return None  # what is wrong with the prompt itself is found again, and told, without the answer
    return None if example.kind == "text" else example


def _from_template(row: Row, template: str) -> Example:
    texts = {}
    for name in template_columns(template, place="data.prompt"):
        if name not in row.values:
            raise DataError(
                f"{row.origin}: ",
                Setting("prompt"),
                f" asks for column {name!r}{closest(name, row.values)}; there are {', '.join(row.values)}",
            )
        texts[name] = text_of(row.values, name, may_be_empty=True)  # as training writes it
    return Example(kind="completion", prompt=template.format_map(texts))


def _from_columns(row: Row) -> Example:
    """A row without an answer: its form's own parser, with a word for the answer that is taken out again."""
    values = row.values
    column = next((name for name in PROMPT_COLUMNS if values.get(name)), None)
    if column is None:
        raise DataError(
            f"{row.origin}: expected a column messages, {', '.join(PROMPT_COLUMNS)}; got {', '.join(values)}. Name it with ",
            Setting("prompt"),
            " '{column}'.",
        )
    if isinstance(values[column], list) or (column == "prompt" and is_list(values[column])):
        return turns_in(values, column)
    if column == "prompt":
        return replace(FORMATS["prompt-completion"].parse({**values, "completion": "-"}), completion="")
    if column == "instruction":
        example = FORMATS["alpaca"].parse({**values, "output": "-"})
        return replace(example, completion="", messages=example.messages[:-1])
    return Example(kind="completion", prompt=text_of(values, column))


def _with_system(example: Example, system: str | None) -> Example:
    """`system` before turns that have none, as training puts it; a completion becomes turns for it."""
    if not system:
        return example
    if example.kind == "messages":
        turns, border = with_system(example.messages, example.prompt_turns, system)
        return replace(example, messages=turns, prompt_turns=border)
    answer = ({"role": "assistant", "content": example.completion},) if example.completion else ()
    turns, border = with_system((*turns_of(example), *answer), 1, system)
    return replace(example, kind="messages", messages=turns, prompt_turns=border, prompt="", plain_prompt=None, completion="")
