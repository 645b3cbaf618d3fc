"""`ClassificationConfig`: settings of text classification and regression. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabank.config.checks import check_choice, freeze_sequences
from lorabank.errors import ConfigError, Setting

KINDS = ("auto", "single", "multi", "regression")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """What the columns are, and what labels mean."""

    text: str | None = None
    """Column of the text; None: found by its name (`text`, `sentence`, `sentence1`, `premise`, `question` …)."""
    text_pair: str | None = None
    """Column of the second text of a pair; None: found by its name, where there is one."""
    label: str | None = None
    """Column of the label; None: `label` or `labels`."""
    kind: str = "auto"
    """`single` label a row, `multi` (any number of them), `regression` (a number); `auto`: by the column's values."""
    labels: Sequence[str] | None = None
    """Names of the labels in their order; None: those that the training rows have, sorted."""

    def __post_init__(self) -> None:
        freeze_sequences(self)
        check_choice("classification.kind", self.kind, KINDS)
        if self.labels is not None and (len(self.labels) < 1 or len(set(self.labels)) != len(self.labels)):
            raise ConfigError(Setting("classification.labels"), f": expected different names, got {list(self.labels)!r}")
