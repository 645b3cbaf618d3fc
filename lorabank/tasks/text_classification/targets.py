"""Losses of rows whose adapters have labels of different kinds and numbers, in one pass. N rows, K outputs of the widest head.

As transformers' classifiers have them (`problem_type`): cross-entropy in nats; binary cross-entropy, the mean over the labels;
squared error. Each a number a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabank.errors import DataError
from lorabank.tasks.text_classification.labels import KINDS, MULTI, REGRESSION, SINGLE, Label, LabelSet

Tensors = Mapping[str, Tensor]
_CODE = {kind: code for code, kind in enumerate(KINDS)}


def targets_of(labels: Sequence[tuple[LabelSet, Label | None]], width: int) -> dict[str, Tensor]:
    """What `row_losses` compares outputs with, from each row's label set and label. `width`: outputs of the widest head, K.

    A label of None, for rows that are only predicted, is any. Raises RowError for a label that the set lacks.
    """
    kinds = torch.tensor([_CODE[known.kind] for known, _ in labels])
    places, values = torch.zeros(len(labels), dtype=torch.int64), torch.zeros(len(labels), width)
    own = torch.zeros(len(labels), width, dtype=torch.bool)
    for i, (known, label) in enumerate(labels):
        if known.outputs > width:
            raise DataError(f"{known.outputs} labels, and the widest head has {width} outputs")
        own[i, : known.outputs] = True
        target: Any = 0.0 if label is None else known.target(label)
        if known.kind == SINGLE:
            places[i] = int(target)
        elif known.kind == MULTI:
            values[i, : known.outputs] = torch.tensor(target)
        else:
            values[i, 0] = target
    return {"kinds": kinds, "places": places, "values": values, "own": own}


def outputs_of(model: nn.Module, inputs: Tensors) -> Tensor:
    """The model's logits (N, K), fp32; a head with fewer outputs than the pass's widest has −inf there."""
    return model(**inputs).logits.float()


def row_losses(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """Each row's loss (N,), by the kind of its labels."""
    return losses_of(outputs_of(model, inputs), targets)


def losses_of(logits_NK: Tensor, targets: Tensors) -> Tensor:
    """The same of logits."""
    width = logits_NK.shape[1]
    own, values = targets["own"][:, :width], targets["values"][:, :width]
    # outputs that aren't the row's: no part of a softmax, and zeros in a sum, since 0 · inf is no number
    among = logits_NK.masked_fill(~own, -torch.inf)
    inside = logits_NK.masked_fill(~own, 0.0)
    single = torch.logsumexp(among, 1) - inside.gather(1, targets["places"][:, None])[:, 0]
    several = F.binary_cross_entropy_with_logits(inside, values, reduction="none")
    several = (several * own).sum(1) / own.sum(1)
    number = (inside[:, 0] - values[:, 0]) ** 2
    kinds = targets["kinds"]
    return torch.where(kinds == _CODE[SINGLE], single, torch.where(kinds == _CODE[REGRESSION], number, several))
