"""Files for people at the end of a run: confusion matrices, contact sheets, and `samples.md` that shows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.config.train import EvalConfig
from lorabank.data.row import RowError
from lorabank.engine.engine import Engine
from lorabank.errors import OutputError
from lorabank.tasks.images.answers import Answers
from lorabank.tasks.images.confusion_plot import confusion_plot
from lorabank.tasks.images.metrics import Answer, confusion, mistaken, scores
from lorabank.tasks.images.pictures import open_picture
from lorabank.tasks.images.rows import ImageRow
from lorabank.tasks.images.sheet import Sample, contact_sheet
from lorabank.training.task import Busy
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.tasks.images.task import ImageClassification

TILES = 6
"""Pictures on a sheet for each of `eval.samples`."""
LISTED = 5
"""Commonest mistakes in `samples.md`."""


def write_samples(
    task: ImageClassification,
    engine: Engine,
    rows: Mapping[str, Sequence[ImageRow]],
    folder: Path,
    *,
    config: EvalConfig,
    busy: Busy,
) -> None:
    """Write `confusion-NAME.png`, `samples-NAME.png` and `samples.md`. Raises OutputError."""
    found = Answers(task, engine).of(rows, batch_size=config.batch_size, busy=busy, activity="samples")
    lines = ["# Held-out pictures", ""]
    try:
        for name, answers in found.items():
            if not answers:
                continue
            labels, true = task.labels_of(name), task.true(name, rows[name])
            counts = confusion(true, [answer.ranked[0] for answer in answers], len(labels))
            file = name.replace("/", "_")
            confusion_plot(
                counts, labels, folder / f"confusion-{file}.png", title=f"{name}: {counted(len(answers), 'held-out picture')}"
            )
            contact_sheet(_tiles(rows[name], answers, labels, TILES * config.samples), folder / f"samples-{file}.png")
            said = ", ".join(f"{key} {value:.4f}" for key, value in scores(answers, true, len(labels)).items())
            lines += [f"## {name}", "", f"{counted(len(answers), 'picture')}: {said}.", ""]
            if pairs := mistaken(counts, LISTED):
                often = "; ".join(f"{labels[a]} for {labels[b]} ({n} ×)" for b, a, n in pairs)
                lines += [f"Mistaken most often: {often}.", ""]
            lines += [f"![pictures and what was said of them](samples-{file}.png)", ""]
            lines += [f"![confusion matrix](confusion-{file}.png)", ""]
        (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: pictures of the results couldn't be written: {error}. The adapters are saved.") from error


def _tiles(rows: Sequence[ImageRow], answers: Sequence[Answer], labels: Sequence[str], count: int) -> list[Sample]:
    """Up to half of them mistakes, the surest first; the rest evenly from what was right."""
    pairs = list(zip(rows, answers, strict=True))
    wrong = sorted((p for p in pairs if labels[p[1].ranked[0]] != p[0].label), key=lambda pair: -pair[1].shares[0])
    right = [p for p in pairs if labels[p[1].ranked[0]] == p[0].label]
    shown = wrong[: max(count // 2, count - len(right))]
    left = min(count - len(shown), len(right))
    shown += [right[i * len(right) // left] for i in range(left)]
    return [sample_of(row, answer, labels) for row, answer in shown]


def sample_of(row: ImageRow, answer: Answer, labels: Sequence[str]) -> Sample:
    """A tile of a sheet; an empty one where the file went away after its pixels were read: that is to cost no results."""
    try:
        picture = open_picture(row.picture)[0]
    except RowError:
        picture = None
    return Sample(picture=picture, true=row.label, predicted=labels[answer.ranked[0]], share=answer.shares[0])
