"""`text-classification`: texts, or pairs of them, with labels or numbers."""

from lorabank.tasks.text_classification.task import KIND as KIND
