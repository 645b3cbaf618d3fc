"""`predict` for pictures without labels: a line a picture with every adapter's answer, and a contact sheet beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.data.bad_rows import refuse
from lorabank.engine.engine import Engine
from lorabank.errors import ConfigError, DataError, closest
from lorabank.formats.files import write_files
from lorabank.tasks.asked import OTHER_KINDS, check_json_lines
from lorabank.tasks.decoding import quiet_pillow
from lorabank.tasks.images.answers import Answers
from lorabank.tasks.images.metrics import Answer
from lorabank.tasks.images.prepare import open_found
from lorabank.tasks.images.rows import ImageRow, in_order
from lorabank.tasks.images.samples import sample_of
from lorabank.tasks.images.sheet import contact_sheet
from lorabank.tasks.images.sources import Columns, find_pictures
from lorabank.tasks.own_head import base_note, check_trained
from lorabank.tasks.picture_bytes import SUFFIXES
from lorabank.training.base_rows import BASE_NAME
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.images.task import ImageClassification

OPTIONS = ("bad_rows",)
SHEET = 24
"""Pictures on the contact sheet."""


def predict(task: ImageClassification, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
    """Write `wanted.output` (JSON lines) and a sheet of the first pictures. Of one that can't be read the line says why.

    Option `bad_rows`: whether such a one stops it (`stop`; `drop` goes on; else the run's). Raises DataError for that, and where
    no picture can be read; OutputError, also for a name that promises another kind of file.
    """
    for name in wanted.options:
        if name not in OPTIONS:
            raise ConfigError(f"predict: image-classification has no option {name!r}{closest(name, OPTIONS)}")
    check_output(wanted.output)
    check_trained(wanted.names, task.model, named=task.base_is_trained)
    images = task.config.images
    columns = Columns(image=images.image_column)
    found = find_pictures(wanted.data, role="test", columns=columns, labelled=False, limit=wanted.max_rows)[: wanted.max_rows]
    with quiet_pillow():
        opened = list(in_order(lambda each: open_found(each, images.min_size, task.store), found))
    rows = [each.row for each in opened if each.row is not None]
    data = replace(task.config.data, bad_rows=wanted.options.get("bad_rows") or task.config.data.bad_rows)
    refuse([each.error for each in opened if each.error is not None], len(found), data, what="pictures")
    if not rows:
        raise DataError(f"{wanted.data_name}: none of {counted(len(found), 'picture')} can be read: {opened[0].error}")
    answers = Answers(task, engine).of(
        dict.fromkeys(wanted.names, rows), batch_size=wanted.batch_size, busy=busy, activity="predicting"
    )
    place, lines = iter(range(len(rows))), []
    for each, source in zip(opened, found, strict=True):
        line: dict[str, Any] = {"image": source.origin}
        if each.row is None:
            line["error"] = each.error.reason if each.error is not None else "no picture"
        else:
            number = next(place)
            line |= {name: _said(answers[name][number], task.labels_of(name)) for name in wanted.names}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_files(wanted.output.parent, {wanted.output.name: "".join(lines)})
    bad = len(found) - len(rows)
    sheets = _sheets(task, rows, answers, wanted)
    drawn = f"; the first of them in {', '.join(sheets)}" if sheets else ""
    dropped = f", {bad} couldn't be read" if bad else ""
    own = base_note(wanted.names, task.labels_of(BASE_NAME), task.adapter_labels)
    return f"{counted(len(rows), 'picture')} labelled by {', '.join(wanted.names)}{own}{dropped}: {wanted.output}{drawn}"


def check_output(output: Path) -> None:
    """Raise OutputError for a name of a table or a picture."""
    check_json_lines(output, (*OTHER_KINDS, *SUFFIXES))


def _said(answer: Answer, labels: Sequence[str]) -> dict[str, Any]:
    named = {labels[number]: round(share, 6) for number, share in zip(answer.ranked, answer.shares, strict=True)}
    label, score = next(iter(named.items()))
    return {"label": label, "score": score, "top": named}


def _sheets(
    task: ImageClassification, rows: Sequence[ImageRow], answers: Mapping[str, Sequence[Answer]], wanted: Prediction
) -> list[str]:
    """A contact sheet for each that answered, beside the output and named after it; none in the place of a file that is there."""
    drawn = []
    for name in wanted.names:
        whose = f"-{name}" if len(wanted.names) > 1 else ""
        sheet = wanted.output.with_name(f"{wanted.output.stem}{whose}.png")
        if sheet.exists():
            continue
        labels, own = task.labels_of(name), zip(rows[:SHEET], answers[name][:SHEET], strict=True)
        contact_sheet([sample_of(row, answer, labels) for row, answer in own], sheet)
        drawn.append(str(sheet))
    return drawn
