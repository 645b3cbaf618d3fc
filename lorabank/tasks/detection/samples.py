"""Sample pictures of a run: held-out ones with what is there, and what each adapter found."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.config.train import EvalConfig
from lorabank.engine.engine import Engine
from lorabank.formats.files import write_files
from lorabank.tasks.detection.draw import drawn, sheet
from lorabank.tasks.detection.rows import DetectionRow
from lorabank.training.evaluate import spread
from lorabank.training.task import Busy

if TYPE_CHECKING:
    from lorabank.tasks.detection.task import ObjectDetection

SAMPLES = "samples"
"""Folder in a run's."""


def write_samples(
    task: ObjectDetection,
    engine: Engine,
    rows: Mapping[str, Sequence[DetectionRow]],
    folder: Path,
    *,
    config: EvalConfig,
    busy: Busy,
) -> None:
    """`samples/NAME.png`, a sheet an adapter: left what is there, right what it found with a score of at least the threshold."""
    chosen = {name: list(spread(own, config.samples)) for name, own in rows.items() if own}
    if not config.samples or not chosen:
        return
    _, found = task.find(engine, chosen, batch_size=config.batch_size, busy=busy)
    least = task.config.detection.threshold
    files: dict[str, bytes] = {}
    for name, own in chosen.items():
        pictures = [task.store.picture(row) for row in own]
        known = set(task.labels_of(name))
        truth = [
            drawn(picture, [(None, box) for box in row.boxes if box.label in known])
            for picture, row in zip(pictures, own, strict=True)
        ]
        answers = [
            drawn(picture, [each for each in boxes if each[0] >= least])
            for picture, boxes in zip(pictures, found[name], strict=True)
        ]
        buffer = io.BytesIO()
        sheet([("what is there", truth), (f"found by {name}, score from {least:g}", answers)]).save(buffer, format="PNG")
        files[f"{name}.png"] = buffer.getvalue()
    write_files(folder / SAMPLES, files)
