"""A detector's loss, a number a picture, and what it finds.

The loss is that of the model's own family in transformers (Hungarian matching; classes, L1, generalised IoU, with the weights of
its configuration), computed picture by picture: each is matched and normalised by its own boxes alone. See docs/decisions.

N pictures, Q queries, M boxes (the most of a batch), K found boxes a picture.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.in_full.heads import extra_outputs
from lorabank.engine.model_batch import Tensors

MASK, PIXELS = "pixel_mask", "pixel_values"
BOXES, LABELS, CLASSES = "boxes", "labels", "classes"
"""Targets: (N, M, 4) centre x, centre y, width, height as shares of the picture; (N, M) int64, −1 where there is none; (N,)
outputs of each row's own head, "no object" aside."""
MOST = 100
"""Boxes that are looked at of a picture, as COCO's scores have it."""
_COLUMNS = 6
"""Of a found box: score, label, centre x, centre y, width, height."""
_ROW_FIRST = {
    "intermediate_logits": "outputs_class",
    "intermediate_reference_points": "outputs_coord",
    "enc_topk_logits": "enc_topk_logits",
    "enc_topk_bboxes": "enc_topk_bboxes",
}
"""Outputs of the RT-DETR family, rows first → arguments of its loss, which is over all layers of its decoder."""


def detection_loss(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """The loss of each picture (N,)."""
    outputs = model(**inputs)
    return torch.stack([_row_loss(model, outputs, targets, row) for row in range(len(targets[CLASSES]))])


def _row_loss(model: Any, outputs: Any, targets: Tensors, row: int) -> Tensor:
    classes = int(targets[CLASSES][row])
    width = classes + extra_outputs(model)
    logits, boxes = outputs.logits[row : row + 1, :, :width].float(), outputs.pred_boxes[row : row + 1].float()
    if not (logits.isfinite().all() and boxes.isfinite().all()):
        return logits.sum() * torch.nan  # nothing can be matched with it: its adapter stops alone
    there = targets[LABELS][row] >= 0
    wanted = {"class_labels": targets[LABELS][row][there], "boxes": targets[BOXES][row][there]}
    config = copy.copy(model.config)
    config.num_labels = classes
    more: dict[str, Tensor] = {}
    if "intermediate_logits" in outputs:
        for name, argument in _ROW_FIRST.items():
            part = outputs[name][row : row + 1].float()
            more[argument] = part[..., :width] if name.endswith("logits") else part
    else:
        config.auxiliary_loss = False  # what the layers before the last would find isn't in the outputs
    loss, _, _ = model.loss_function(logits, [wanted], logits.device, boxes, config, **more)
    return loss


def found_boxes(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """(N, 1 + K · 6): each picture's loss, then its likeliest boxes: score, label, centre x, centre y, width, height."""
    outputs: Any = model(**inputs)
    extra, rows = extra_outputs(model), []
    for row in range(len(targets[CLASSES])):
        classes = int(targets[CLASSES][row])
        logits = outputs.logits[row, :, : classes + extra].float()
        boxes = outputs.pred_boxes[row].float()
        count = min(MOST, len(logits))
        if extra:
            best = logits.softmax(-1)[:, :classes].max(-1)
            scores, order = best.values.topk(count)
            labels = best.indices[order]
        else:
            scores, flat = logits.sigmoid().reshape(-1).topk(count)
            order, labels = flat // classes, flat % classes
        table = torch.cat([scores[:, None], labels[:, None].float(), boxes[order]], 1)
        loss = _row_loss(model, outputs, targets, row)
        rows.append(torch.cat([loss[None].detach(), table.reshape(-1)]))
    return torch.stack(rows)


def split_found(table: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) and boxes (N, K, 6) of what `found_boxes` gives."""
    return table[:, 0], table[:, 1:].reshape(len(table), -1, _COLUMNS)
