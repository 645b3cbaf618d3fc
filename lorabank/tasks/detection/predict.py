"""`lorabank predict` of detectors: COCO's results, and pictures with the boxes drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.config.checks import check_fraction
from lorabank.config.train import DataConfig
from lorabank.data.bad_rows import listed
from lorabank.data.files import READERS
from lorabank.data.reasons import MAX_ORIGINS
from lorabank.data.row import RowError
from lorabank.data.sources import ToScore
from lorabank.engine.engine import Engine
from lorabank.errors import ConfigError, closest
from lorabank.formats.files import escaped, write_files
from lorabank.tasks.detection.draw import drawn
from lorabank.tasks.detection.prepare import prepare
from lorabank.tasks.detection.rows import Box, DetectionRow
from lorabank.tasks.own_head import base_note, check_trained, numbered
from lorabank.tasks.picture_bytes import SUFFIXES
from lorabank.training.base_rows import is_base
from lorabank.training.task import Busy, Prediction
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.detection.task import ObjectDetection

OPTIONS = ("threshold", "draw", "bad_rows")
LEFT_OUT = "left_out.jsonl"
"""Pictures that couldn't be used, a line each: {file_name, error}."""
NO_FOLDERS = {*READERS, *SUFFIXES, ".txt", ".xml", ".yaml", ".zip"} - {".json"}
"""Suffixes of files, that nobody means a folder by."""
DRAWN = 20
"""Pictures that are drawn unless said otherwise."""


def predict(task: ObjectDetection, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
    """Write NAME.json (COCO's results) and drawn pictures into the folder `output`; of one adapter and an output that ends in
    `.json`, that file alone. `left_out.jsonl` there, or the returned sentences, have every picture that can't be used, and why.

    Options: `threshold`, the lowest score that is written (0) and drawn (the run's `detection.threshold`); `draw`, how many
    pictures are drawn; `bad_rows`, what becomes of those that can't be used (the run's `data.bad_rows`).
    """
    least, draw = _options(wanted)
    check_output(wanted.output)
    suffix = wanted.output.suffix.lower()
    check_trained(wanted.names, task.model, named=task.scores_base or not numbered(task.base_labels))
    bad = wanted.options.get("bad_rows") or task.config.data.bad_rows
    named = wanted.data if isinstance(wanted.data, str) else None
    data = DataConfig(test=named, val_split=0, limit=wanted.max_rows, bad_rows=bad, nan_rows=bad)
    given = None if named is not None else ToScore(wanted.data)
    sets = prepare(data, task.config.detection, seed=0, train=given, val=None, keep=task.store.keep, boxed=False)
    rows = sets.test
    alone = suffix == ".json"
    if alone and len(wanted.names) > 1:
        raise ConfigError(
            f"output {str(wanted.output)!r}: a file holds the results of one adapter, and there are {', '.join(wanted.names)}. "
            "Name a folder, or one of them (--adapters)."
        )
    shown = task.config.detection.threshold if least is None else least
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted.names}
    files: dict[str, bytes] = {}
    for start in range(0, len(rows), wanted.batch_size):
        part = rows[start : start + wanted.batch_size]
        _, found = task.find(engine, dict.fromkeys(wanted.names, part), batch_size=wanted.batch_size, busy=_quiet)
        for name, answers in found.items():
            for row, boxes in zip(part, answers, strict=True):
                results[name] += _results(task, name, row, [each for each in boxes if each[0] >= (least or 0.0)])
        for i, row in enumerate(part, start):
            for name in wanted.names if i < draw and not alone else ():
                boxes = [each for each in found[name][i - start] if each[0] >= shown]
                files[f"{name}-{i + 1:04d}.png"] = _png(task, row, boxes)
        busy("finding", min(start + wanted.batch_size, len(rows)), len(rows))
    encoded = {name: (json.dumps(entries) + "\n").encode() for name, entries in results.items()}
    if alone:
        write_files(wanted.output.parent, {wanted.output.name: encoded[wanted.names[0]]})
    else:
        left = [json.dumps({"file_name": error.origin, "error": error.reason}) + "\n" for error in sets.errors]
        beside = {LEFT_OUT: "".join(left).encode()} if left else {}
        write_files(wanted.output, {f"{name}.json": content for name, content in encoded.items()} | beside)
        if files:
            write_files(wanted.output / "pictures", files)
    counts = ", ".join(f"{name} {sum(entry['score'] >= shown for entry in own):,}" for name, own in results.items())
    own = base_note(wanted.names, task.base_labels, [task.labels_of(name) for name in wanted.names if not is_base(name)])
    told = f"{counted(len(rows), 'picture')}{own}; boxes with a score of at least {shown:g}: {counts}: {wanted.output}"
    told += _left_out(sets.errors, alone) + "".join(f"\n{note}: {each.some}" for note, each in sets.report.notes.items())
    return escaped(told)  # names that aren't UTF-8 can't be printed as they are


def check_output(output: Path) -> None:
    """Raise ConfigError for the name of a file that isn't written."""
    if (suffix := output.suffix.lower()) in NO_FOLDERS:
        raise ConfigError(
            f"output {str(output)!r}: object-detection writes JSON, no {suffix}. Name a folder, or a file ending in .json."
        )


def _left_out(errors: Sequence[RowError], alone: bool) -> str:
    """Lines on pictures that were left out: all of them, or the first where a file of the output has all."""
    if not errors:
        return ""
    all_in = "" if alone else f" (all in {LEFT_OUT})"
    lines = listed(errors, len(errors) if alone else MAX_ORIGINS)
    return f"\n{counted(len(errors), 'picture')} left out{all_in}:{lines}"


def _options(wanted: Prediction) -> tuple[float | None, int]:
    for name in wanted.options:
        if name not in OPTIONS:
            raise ConfigError(f"predict: object-detection knows no option {name!r}{closest(name, OPTIONS)}")
    least = wanted.options.get("threshold")
    if least is not None:
        check_fraction("threshold", least)
    draw = wanted.options.get("draw")
    return least, DRAWN if draw is None else int(draw)


def _results(task: ObjectDetection, name: str, row: DetectionRow, boxes: Sequence[tuple[float, Box]]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": row.image_id,
            "file_name": row.origin,
            "category_id": task.category_id(name, box.label),
            "category": box.label,
            "bbox": [round(value, 2) for value in box[1:5]],
            "score": round(score, 6),
        }
        for score, box in boxes
    ]


def _png(task: ObjectDetection, row: DetectionRow, boxes: Sequence[tuple[float, Box]]) -> bytes:
    buffer = io.BytesIO()
    drawn(task.store.picture(row), boxes).save(buffer, format="PNG")
    return buffer.getvalue()


def _quiet(what: str, done: int, total: int) -> None:
    """The bar is over the whole data set."""
