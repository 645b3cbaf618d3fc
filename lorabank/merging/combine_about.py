"""What adapters that are to be combined say of themselves: their task, their labels. The combination says it where they agree."""

from __future__ import annotations

from collections.abc import Sequence

from lorabank.errors import MergeError
from lorabank.formats.adapter import Adapter
from lorabank.formats.labels import label_names
from lorabank.formats.peft import TENSOR_METADATA
from lorabank.merging.weights import Weights

OWN = (TENSOR_METADATA, "combine.", "peft.")
"""Beginnings of what is of one file, or one combination, alone."""


Weighted = Sequence[tuple[Adapter, Weights]]


def check_labels(parts: Weighted, called: Sequence[str]) -> None:
    """Raise MergeError for heads whose outputs mean other labels: of one size they would add up, to nonsense.

    `called`: what messages call the adapters.
    """
    said = [
        (name, labels)
        for name, (adapter, weight) in zip(called, parts, strict=True)
        if weight != 0 and (labels := label_names(adapter))
    ]
    for name, labels in said[1:]:
        if labels != said[0][1]:
            raise MergeError(
                f"combine: the head of {said[0][0]} has the labels {', '.join(said[0][1])}, that of {name} {', '.join(labels)}: "
                "their outputs mean different things. Combine adapters of the same labels in the same order, or keep them apart."
            )


def agreed(parts: Weighted) -> dict[str, str]:
    """What all adapters with a weight say alike: the task, the names of labels, a task's settings."""
    first, *others = [adapter.metadata for adapter, weight in parts if weight != 0] or [{}]
    return {
        key: value for key, value in first.items() if not key.startswith(OWN) and all(other.get(key) == value for other in others)
    }
