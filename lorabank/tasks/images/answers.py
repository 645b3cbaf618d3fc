"""`Answers`: what adapters, and the base, say of pictures, all of them in common passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabank.engine.engine import Engine
from lorabank.engine.model_batch import Tensors
from lorabank.engine.model_pass import infer
from lorabank.tasks.images.metrics import TOP, Answer
from lorabank.tasks.images.model import logits_of
from lorabank.tasks.images.rows import ImageRow
from lorabank.training.evaluate import route_of
from lorabank.training.task import Busy

if TYPE_CHECKING:
    from lorabank.tasks.images.task import ImageClassification


def _ranked(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """(N, 1 + 2 · TOP): −log p of the label, the likeliest labels' numbers, their probabilities; −1 where there are no more."""
    logits = logits_of(model, inputs["pixel_values"])
    losses = F.cross_entropy(logits, targets["labels"], reduction="none")
    best = logits.softmax(-1).topk(min(TOP, logits.shape[1]))
    more = TOP - best.indices.shape[1]
    numbers, shares = (F.pad(part.float(), (0, more), value=-1.0) for part in (best.indices, best.values))
    return torch.cat([losses[:, None], numbers, shares], 1)


class Answers:
    """Of one task over one engine."""

    def __init__(self, task: ImageClassification, engine: Engine) -> None:
        self._task, self._engine = task, engine

    def of(
        self, rows: Mapping[str, Sequence[ImageRow]], *, batch_size: int, busy: Busy, activity: str = "validation"
    ) -> dict[str, list[Answer]]:
        """Each name's answers on its rows, in their order."""
        jobs = [(name, row) for name, own in rows.items() for row in own]
        found: dict[str, list[Answer]] = {name: [] for name in rows}
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            batch = self._task.batch(
                [[row] for _, row in part], [route_of(name) for name, _ in part], examples=range(len(part)), draws=[0] * len(part)
            )
            table = infer(self._engine, batch, _ranked).float().cpu()
            for (name, _), values in zip(part, table.tolist(), strict=True):
                found[name].append(_answer(values, len(self._task.labels_of(name))))
            busy(activity, min(start + batch_size, len(jobs)), len(jobs))
        return found


def _answer(values: Sequence[float], labels: int) -> Answer:
    count = min(TOP, labels)  # a narrower head's row is filled up with labels of no probability
    numbers, shares = values[1 : 1 + count], values[1 + TOP : 1 + TOP + count]
    return Answer(tuple(map(int, numbers)), tuple(shares), values[0])
