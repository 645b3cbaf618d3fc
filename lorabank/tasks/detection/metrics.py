"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from lorabank.errors import MissingExtraError
from lorabank.tasks.detection.rows import Box, DetectionRow

METRICS: Mapping[str, int] = {"mAP": 0, "mAP50": 1, "mAP75": 2}
"""Name → its place in `COCOeval.stats`: over IoU 0.5 to 0.95, at 0.5, at 0.75; 0 to 1, the mean over the categories."""


def coco_scores(
    rows: Sequence[DetectionRow], found: Sequence[Sequence[tuple[float, Box]]], labels: Sequence[str]
) -> dict[str, float]:
    """mAP, mAP50 and mAP75 of found boxes (score, box) over the rows' own. NaN where no row has a box of these labels.

    Boxes of other labels aren't wanted here. Raises MissingExtraError without pycocotools.
    """
    coco, evaluation = _library()
    numbers = {label: i for i, label in enumerate(labels, 1)}
    truth = [(i, box) for i, row in enumerate(rows, 1) for box in row.boxes if box.label in numbers]
    if not any(not box.crowd for _, box in truth):
        return dict.fromkeys(METRICS, float("nan"))
    answers = [(i, score, box) for i, boxes in enumerate(found, 1) for score, box in boxes]
    if not answers:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports by print
        known = coco()
        known.dataset = {
            "images": [{"id": i, "width": row.width, "height": row.height} for i, row in enumerate(rows, 1)],
            "categories": [{"id": number, "name": label} for label, number in numbers.items()],
            "annotations": [
                {
                    "id": k,
                    "image_id": i,
                    "category_id": numbers[box.label],
                    "bbox": list(box[1:5]),
                    "area": box.width * box.height,
                    "iscrowd": int(box.crowd),
                }
                for k, (i, box) in enumerate(truth, 1)
            ],
        }
        known.createIndex()
        results = known.loadRes(
            [
                {"image_id": i, "category_id": numbers[box.label], "bbox": list(box[1:5]), "score": score}
                for i, score, box in answers
            ]
        )
        scorer = evaluation(known, results, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: max(0.0, float(scorer.stats[place])) for name, place in METRICS.items()}


def check_libraries() -> None:
    """Raise MissingExtraError where what detection needs isn't installed."""
    _library()


def _library() -> tuple[Any, Any]:
    try:
        import scipy.optimize  # noqa: F401  (transformers' losses match boxes with it)
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingExtraError("object-detection: needs pycocotools and scipy: pip install 'lorabank[detection]'") from error
    return COCO, COCOeval
