"""Labels for rows of a file, one column an adapter, with the probability of each label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorabank.data.answers import refuse_taken
from lorabank.data.row import Row, RowError, typical
from lorabank.engine.engine import Engine
from lorabank.formats.files import write_files
from lorabank.tasks.asked import check_json_lines, cut_note, rows_asked
from lorabank.tasks.own_head import base_note, check_trained
from lorabank.tasks.text_classification.columns import find_columns
from lorabank.tasks.text_classification.labels import REGRESSION, LabelSet
from lorabank.tasks.text_classification.model import positions
from lorabank.tasks.text_classification.pages import decided, probabilities
from lorabank.tasks.text_classification.rows import ClassRow, encode, texts_of
from lorabank.tasks.text_classification.texts_a_row import warn_of_texts
from lorabank.training.evaluate import route_of
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorabank.tasks.text_classification.task import TextClassification

UNREAD = "unread"
"""Column that says why a row has no prediction."""
DIGITS = 6


def predict_rows(task: TextClassification, engine: Engine, wanted: Prediction, busy: Busy) -> str:
    """Write every row with a column for each name, with its label and the probabilities; returns what was done.

    Rows need no label. One whose text is empty or missing keeps its place: null, and why.
    """
    check_json_lines(wanted.output)
    check_trained(wanted.names, task.model, named=task.own is not None)
    rows = rows_asked(wanted.data, wanted.max_rows, column=task.config.classification.text or "text")
    refuse_taken(rows, wanted.names)
    longest = min(task.config.data.max_length, positions(task.model) or task.config.data.max_length)
    readable = _encoded(task, rows, longest)
    trained = {name: task.texts[name] for name in wanted.names if name in task.texts}
    warn_of_texts(trained, (row for row in readable if isinstance(row, ClassRow)))
    answers: list[dict[str, Any]] = [dict.fromkeys(wanted.names) for _ in rows]
    for i, row in enumerate(readable):
        if isinstance(row, RowError):
            answers[i][UNREAD] = row.reason
    jobs = [(i, name, row) for i, row in enumerate(readable) if isinstance(row, ClassRow) for name in wanted.names]
    jobs.sort(key=lambda job: job[2].size)
    for start in range(0, len(jobs), wanted.batch_size):
        part = jobs[start : start + wanted.batch_size]
        logits, _ = task.outputs(engine, [(name, row) for _, name, row in part])
        for (i, name, _), values in zip(part, logits.double().numpy(), strict=True):
            labels = task.labels_of(route_of(name))
            answers[i][name] = _answer(values[None, : labels.outputs], labels)
        busy("predicting", min(start + wanted.batch_size, len(jobs)), len(jobs))
    lines = [
        json.dumps({**row.values, **own}, ensure_ascii=False, default=str) + "\n" for row, own in zip(rows, answers, strict=True)
    ]
    write_files(wanted.output.parent, {wanted.output.name: "".join(lines)})
    unread = sum(isinstance(row, RowError) for row in readable)
    left = f" ({unread} of them unread, see column {UNREAD!r})" if unread else ""
    own = "" if task.own is None else base_note(wanted.names, task.own.names, [known.names for known in task.sets.values()])
    cut = cut_note((row.origin for row in readable if isinstance(row, ClassRow) and row.truncated), longest)
    return f"{counted(len(rows), 'row')}{left} labelled by {', '.join(wanted.names)}{own}: {wanted.output}{cut}"


def _encoded(task: TextClassification, rows: Sequence[Row], longest: int) -> list[ClassRow | RowError]:
    """Each row as the model takes it, at most `longest` tokens of it, or why it can't be read."""
    chosen = task.config.classification
    usual = typical(rows)
    columns = find_columns(
        usual.values, text=chosen.text, pair=chosen.text_pair, label=chosen.label, origin=usual.origin, need_label=False
    )
    texts = texts_of(rows, columns.without_label(), kind=None, need_label=False)
    kept = [text for text in texts if not isinstance(text, RowError)]
    coded = iter(encode(kept, task.processor, max_length=longest))
    return [text if isinstance(text, RowError) else next(coded) for text in texts]


def _answer(outputs_1K: NDArray[np.float64], labels: LabelSet) -> dict[str, Any]:
    """`label`, its `score` and all `probabilities`; `labels` where a row may have several; the `value` of a regression."""
    (found,) = decided(outputs_1K, labels)
    if labels.kind == REGRESSION:
        return {"value": round(float(outputs_1K[0, 0]), DIGITS)}
    shares = {
        name: round(float(share), DIGITS) for name, share in zip(labels.names, probabilities(outputs_1K, labels)[0], strict=True)
    }
    if isinstance(found, str):
        return {"label": found, "score": shares[found], "probabilities": shares}
    return {"labels": found, "probabilities": shares}
